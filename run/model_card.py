"""README.md of an adapter folder, with the front matter that the hub reads."""

from run.config import TrainConfig

CARD_FILE = "README.md"


def model_card(config: TrainConfig, figures: dict[str, str]) -> str:
    """Compose the card: what the adapter belongs to, how it was trained, what came out."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    base = "NF4" if config.quant == "nf4" else "its own number format"
    return f"""---
base_model: {config.model}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- qlora
---

# LoRA adapter for {config.model}

Rank {config.lora_r}, alpha {config.lora_alpha:g}, on {config.target_modules}; trained on
`{config.data}` with the base model frozen in {base}. `config.json` has every setting,
`metrics.jsonl` every step.

| | |
|---|---|
{rows}

Load it with PEFT:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""
