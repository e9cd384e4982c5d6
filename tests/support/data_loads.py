"""Tokenizes data files, without torch; for `small_process`."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np

from data.reading import texts
from data.samples import Sample
from data.tokenizer import Tokenizer
from data.tokens import documents
from data.tokens.pieces import Counts
from data.tokens.recipe import Recipe
from data.tokens.tokenization import tokenize_files

tokenizer_in = cache(Tokenizer.from_folder)


def tokenized(
    paths: Sequence[Path], tokenizer: Tokenizer, recipe: Recipe, processes: int = 1
) -> tuple[list[Sample], Counts]:
    """The samples of files, and what was counted."""
    counts = Counts()
    samples = []
    for piece in tokenize_files(paths, tokenizer, recipe, processes)[1]:
        counts.add(piece.counts)
        ends = np.cumsum(piece.rows["length"])
        for start, end in zip(ends - piece.rows["length"], ends, strict=True):
            samples.append(
                Sample(piece.input_ids[start:end].tolist(), piece.labels[start:end].tolist())
            )
    return samples, counts


def tokenized_in_windows(
    characters: int, overlap: int, path: Path, tokenizer: Path, recipe: Recipe
) -> tuple[list[Sample], Counts]:
    """The same of a file whose texts are cut into windows of so many characters."""
    with (
        patch.object(texts, "_TEXT_CHARACTERS", characters),
        patch.object(documents, "_OVERLAP", overlap),
    ):
        return tokenized([path], tokenizer_in(tokenizer), recipe)
