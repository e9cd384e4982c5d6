"""checkpoint/untrained_rows.py: rows that are zero or another's are found, in whatever file they
lie."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_llama import FIELDS, random_tensors, write_checkpoint

from checkpoint.opening import open_checkpoint
from checkpoint.untrained_rows import untrained_rows

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {"tie_word_embeddings": True}


def found(folder: Path, changes: dict[str, dict[int, Any]], more: dict[str, Any]) -> set[int]:
    """Look at tokens 3 to 6 among 3 to 9 of a checkpoint with some rows changed."""
    fields = FIELDS | more
    tensors = random_tensors(fields, torch.bfloat16)
    for name, rows in changes.items():
        for index, row in rows.items():
            tensors[name][index] = tensors[name][row] if isinstance(row, int) else row
    write_checkpoint(folder, fields, tensors, num_shards=2)
    return untrained_rows(open_checkpoint(folder), range(3, 7), range(3, 10))


@pytest.mark.parametrize("more", [{}, TIED], ids=["with a head", "tied"])
def test_trained_rows_are_passed_over(tmp_path: Path, more: dict[str, Any]) -> None:
    # equal rows of tokens that nobody asks for
    assert found(tmp_path, {EMBEDDINGS: {20: 21, 8: 9, 0: 0.0}}, more) == set()


@pytest.mark.parametrize("more", [{}, TIED], ids=["with a head", "tied"])
def test_rows_that_are_zero_or_equal_are_found(tmp_path: Path, more: dict[str, Any]) -> None:
    assert found(tmp_path, {EMBEDDINGS: {3: 0.0, 4: -0.0, 6: 9}}, more) == {3, 4, 6}


def test_rows_of_the_head_are_looked_at_too(tmp_path: Path) -> None:
    assert found(tmp_path, {HEAD: {5: 0.0, 6: 7}}, {}) == {5, 6}


def test_a_token_that_the_model_has_no_row_for_is_passed_over(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, FIELDS, random_tensors(FIELDS))
    first, far = FIELDS["vocab_size"], 10**6
    assert untrained_rows(open_checkpoint(tmp_path), [first, far], [first, far]) == set()
