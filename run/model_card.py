"""The model card of an adapter, its README.md: the front matter that the hub reads, in PEFT's form,
and how the adapter was trained."""

import html
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from foreign.terminal import one_line
from run.config import FREE_ON_RESUME, TrainConfig
from run.metrics import GIB, Row

CARD_FILE = "README.md"
# flags left out of the recipe: they do not change the adapter, or the card names them elsewhere
_LEFT_OUT = FREE_ON_RESUME | {"model", "sample_prompt", "device"}
_PATHS = ("data", "eval_data", "chat_template", "init_adapter")
_LIBRARIES = ("torch", "triton", "safetensors", "tokenizers")
# for readers to whom adapter_config.json came without the base model's folder
_ADVICE = """The base model was read from a folder of that name: write the folder's place into
`adapter_config.json`, as `base_model_name_or_path`, where it has the name alone.

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
            value = Path(value).name if f.name in _PATHS else value
            found[f"`--{f.name.replace('_', '-')}`"] = value
    return found


def model_card(
    config: TrainConfig, rows: Sequence[Row], files: Sequence[str], base: str, *, is_on_hub: bool
) -> str:
    """Write the card: the adapter's base model, how it was trained, and the results.

    Args:
        rows: the rows of metrics.jsonl, at least one.
        files: names of the adapter's files.
        base: the base model's public name: a hub id, with @revision if there is one, or the name of
            a folder.
    """
    name = base.partition("@")[0] if is_on_hub else base
    place = base if is_on_hub else "path/to/the/base"
    advice = "" if is_on_hub else _ADVICE
    frozen = "in NF4" if config.quant == "nf4" else "as its checkpoint has it"
    versions = [f"- {library} {version(library)}" for library in _LIBRARIES]
    return f"""{_front_matter(config, name if is_on_hub else None)}

# LoRA adapter for {_text(name)}

Trained by Quatrain with the base model frozen {frozen}. The adapter's files are
{", ".join(map(_text, sorted(files)))} and this card.

## Results

{_table(("figure", "value"), _figures(rows))}

## Training procedure

{_table(("flag", "value"), _recipe(config))}

## Use

{advice}With PEFT:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```

Merged into the base model's weights, by Quatrain:

```bash
python merge.py --model {place} --adapter path/to/this/folder --output merged
```

### Framework versions

{chr(10).join(versions)}
- Python {platform.python_version()}
"""
