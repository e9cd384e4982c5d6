"""The model card of an adapter, its README.md: the front matter that the hub reads, in PEFT's form,
and how the adapter was trained."""

import html
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

from foreign.terminal import one_line
from run.config import FREE_ON_RESUME, TrainConfig
from run.metrics import GIB, Row
from run.places import read_places
from run.usage import Usage

CARD_FILE = "README.md"
# flags left out of the recipe: they do not change the adapter, or the card names them elsewhere
_LEFT_OUT = FREE_ON_RESUME | {"model", "sample_prompt", "device"}
_PATHS = ("eval_data", "chat_template", "init_adapter")
_LIBRARIES = ("torch", "triton", "safetensors", "tokenizers")
# transformers' BitsAndBytesConfig has no other
_THEIR_BLOCK_SIZE = 64
# for readers to whom adapter_config.json came without the base model's folder
_ADVICE = """The base model was read from a folder of that name: write the folder's place into
`adapter_config.json`, as `base_model_name_or_path`, where it has the name alone.

"""
# readers of the adapter multiply in 16 bits
_8BIT_PRODUCTS = """
In training a part of the base's products was in {formats}. Evaluations multiplied in 16 bits, as
those do who use the adapter.
"""
# characters with a meaning in Markdown inside a line; a bar ends a table's cell
_MARKS = re.compile(r"[\\`*\[\]|]")


def _text(value: object) -> str:
    """Escape a name or a value: one line, without Markdown and HTML."""
    return _MARKS.sub(r"\\\g<0>", html.escape(one_line(value), quote=False))


def _front_matter(config: TrainConfig, base: str | None) -> str:
    """The fields that the hub indexes; the base model is named only if it is on the hub."""
    tags = ["lora", "transformers"]
    if config.quant == "nf4":
        tags.append("qlora")
    if base is not None:
        tags.append(f"base_model:adapter:{base}")
    lines = [] if base is None else [f"base_model: {base}"]
    lines += ["library_name: peft", "pipeline_tag: text-generation", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in sorted(tags)), "---"])


def _table(names: tuple[str, str], rows: dict[str, object]) -> str:
    lines = [f"| {names[0]} | {names[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {_text(value)} |" for name, value in rows.items())])


def _known(rows: Sequence[Row], name: str) -> list[float]:
    """The values of a column; a skipped step has none."""
    return [row[name] for row in rows if row.get(name) is not None]


def _figures(rows: Sequence[Row]) -> dict[str, object]:
    """The results of the run, from the rows of metrics.jsonl."""
    last = rows[-1]
    found: dict[str, object] = {
        "steps": f"{last['step']:,}",
        "epochs": f"{last['epoch']:.2f}",
        "tokens": f"{last['tokens']:,}, of them learned {last['target_tokens']:,}",
    }
    for name, what in (("loss", "training loss"), ("eval_loss", "evaluation loss")):
        if losses := _known(rows, name):
            found[what] = f"{losses[-1]:.4f} (at first {losses[0]:.4f}, at best {min(losses):.4f})"
    if losses := _known(rows, "eval_loss"):
        found["perplexity of the evaluation data"] = f"{math.exp(losses[-1]):.3f}"
    if speeds := sorted(_known(rows, "tokens_per_second")):
        found["tokens per second, the median"] = f"{speeds[len(speeds) // 2]:,.0f}"
    found["memory"] = f"{max(_known(rows, 'peak_memory_bytes')) / GIB:.2f} GiB"
    return found


def _recipe(config: TrainConfig) -> dict[str, object]:
    found: dict[str, object] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in _LEFT_OUT and value != "":
            # the folders of this disk are private
            if f.name == "data":
                value = ", ".join(place.public for place in read_places(value))
            elif f.name in _PATHS:
                value = Path(value).name
            found[f"`--{f.name.replace('_', '-')}`"] = value
    return found


def _use(config: TrainConfig, usage: Usage) -> str:
    """Say how to load the adapter and to generate with it, in lines that run as they stand."""
    prompt = f'"{usage.prompt}"'
    request, door = f'"prompt": {prompt}', "completions"
    encode = f'tokenizer({prompt}, return_tensors="pt")'
    if usage.is_chat:
        prompt = f'[{{"role": "user", "content": {prompt}}}]'
        request, door = f'"messages": {prompt}', "chat/completions"
        encode = "tokenizer.apply_chat_template(\n"
        encode += f"    {prompt},\n    add_generation_prompt=True,\n    return_dict=True,\n"
        encode += '    return_tensors="pt",\n)'
    is_as_trained = config.quant == "nf4" and config.block_size == _THEIR_BLOCK_SIZE
    model = "adapter" if "--lora-modules" in usage.serve else usage.merged
    warning = f"**{usage.warning}.**\n\n" if usage.warning else ""
    with_ollama, ollama = "", ""
    if usage.has_gguf:
        with_ollama = ", with Ollama"
        ollama = f"\nollama create my-model -f {usage.merged}/Modelfile"
        ollama += f'\nollama run my-model "{usage.prompt}"'
    return f"""{warning}With Quatrain, on the terminal:

```bash
{usage.talk if usage.is_chat else usage.answer}
```

With transformers (`pip install transformers peft accelerate bitsandbytes`), the base model in
NF4{" as in training" if is_as_trained else ""}:

```python
import torch
from transformers import BitsAndBytesConfig, pipeline

nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={config.double_quant},
    bnb_4bit_compute_dtype=torch.bfloat16,
)
folder = "{usage.adapter}"
loading = {{"quantization_config": nf4}}
writer = pipeline("text-generation", folder, device_map="auto", model_kwargs=loading)
prompt = {prompt}
print(writer(prompt, max_new_tokens=200, return_full_text=False)[0]["generated_text"])
```

In 16 bits:

```python
import torch
from transformers import pipeline

folder = "{usage.adapter}"
writer = pipeline("text-generation", folder, device_map="auto", dtype=torch.bfloat16)
prompt = {prompt}
print(writer(prompt, max_new_tokens=200, return_full_text=False)[0]["generated_text"])
```

With PEFT's own class:

```python
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "{usage.adapter}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder, device_map="auto", dtype=torch.bfloat16)
inputs = {encode}.to(model.device)
output = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

With vLLM:

```bash
{usage.serve}
curl http://localhost:8000/v1/{door} -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", {request}}}'
```

Merged into the base model's weights by Quatrain{with_ollama}:

```bash
{usage.merge}{ollama}
```"""


def model_card(
    config: TrainConfig,
    rows: Sequence[Row],
    files: Sequence[str],
    base: str,
    usage: Usage,
    *,
    is_on_hub: bool,
) -> str:
    """Write the card: the adapter's base model, how it was trained, the results, and its use.

    Args:
        rows: the rows of metrics.jsonl, at least one.
        files: names of the adapter's files.
        base: the base model's public name: a hub id, with @revision if there is one, or the name of
            a folder.
        usage: of this run; its places are private, and the card has others.
    """
    name, _, revision = base.partition("@") if is_on_hub else (base, "", "")
    advice = "" if is_on_hub else _ADVICE
    usage = replace(
        usage,
        adapter="path/to/this/folder",
        merged="merged",
        base=name if is_on_hub else "path/to/the/base",
        revision=revision or None,
    )
    frozen = "in NF4" if config.quant == "nf4" else "as its checkpoint has it"
    formats = "INT8 and FP8 (E4M3)" if config.base_compute == "int8" else "FP8 (E4M3)"
    products = _8BIT_PRODUCTS.format(formats=formats) if config.base_compute != "bf16" else ""
    versions = [f"- {library} {version(library)}" for library in _LIBRARIES]
    return f"""{_front_matter(config, name if is_on_hub else None)}

# LoRA adapter for {_text(name)}

Trained by Quatrain with the base model frozen {frozen}. The adapter's files are
{", ".join(map(_text, sorted(files)))} and this card.
{products}
## Results

{_table(("figure", "value"), _figures(rows))}

## Training procedure

{_table(("flag", "value"), _recipe(config))}

## Use

{advice}{_use(config, usage)}

### Framework versions

{chr(10).join(versions)}
- Python {platform.python_version()}
"""
