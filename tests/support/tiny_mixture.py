"""A tiny mixture of experts with the bundled model's tokenizer, for whole runs."""

import json
import shutil
from pathlib import Path
from typing import Any

from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint

from prepare.job import BUNDLED


def mixture_model(folder: Path, **more: Any) -> Path:
    """Write a tiny OLMoE; more fields are config.json's."""
    vocabulary = json.loads((BUNDLED / "model" / "config.json").read_text())["vocab_size"]
    fields = FIELDS | VARIANTS["olmoe"] | {"vocab_size": vocabulary, **more}
    write_checkpoint(folder, fields, random_tensors(fields))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BUNDLED / "model" / name, folder)
    return folder
