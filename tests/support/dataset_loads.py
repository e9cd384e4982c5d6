"""Loads data sets as train.py does; for `small_process`."""

from pathlib import Path
from typing import Any

from support.data_loads import tokenizer_in

from data.dataset import load_dataset
from data.samples import Sample
from data.tokens.pieces import Counts


def loaded(
    path: Path, tokenizer: Path, chat_template: str, **options: Any
) -> tuple[list[Sample], Counts]:
    """The samples of a file, and what was counted."""
    dataset = load_dataset([path], tokenizer_in(tokenizer, chat_template), **options)
    return list(dataset.samples), dataset.counts
