"""data/epochs.py: every epoch has each sample once, in rows that two integers restore."""

from statistics import fmean
from typing import Any

import numpy as np
import pytest

from data.epochs import Epochs
from data.tokens.pieces import ROW
from data.tokens.stored_samples import StoredSamples

LENGTHS = [5, 30, 7, 64, 12, 9, 33, 5, 20, 41, 18]
KINDS = pytest.mark.parametrize(
    "kind", [{}, {"row_length": 64}, {"group_by_length": True}], ids=str
)


def samples() -> StoredSamples:
    """Sample i has the token i everywhere, each of them a target but the first."""
    rows = np.zeros(len(LENGTHS), dtype=ROW)
    rows["length"] = LENGTHS
    rows["num_targets"] = rows["length"] - 1
    ids = np.repeat(np.arange(len(LENGTHS), dtype=np.int32), LENGTHS)
    return StoredSamples(ids, ids, rows)


def make(kind: dict[str, Any], batch_size: int = 2, micro_batches_per_step: int = 100) -> Epochs:
    return Epochs(samples(), 1, True, batch_size, micro_batches_per_step, **kind)


def rows_of(epochs: Epochs, epoch: int) -> list[list[int]]:
    """All rows of an epoch, which is one step long."""
    return [row for rows in epochs.micro_batches(epoch) for row in rows]


@KINDS
def test_every_epoch_has_each_sample_once(kind: dict[str, Any]) -> None:
    epochs = make(kind)
    orders = []
    for epoch in range(3):
        rows = rows_of(epochs, epoch)
        assert len(rows) == epochs.num_rows
        orders.append([index for row in rows for index in row])
        assert sorted(orders[-1]) == list(range(len(LENGTHS)))
    assert orders[0] != orders[1] != orders[2]


@KINDS
def test_an_epoch_is_a_function_of_seed_and_number(kind: dict[str, Any]) -> None:
    first, again = (make(kind) for _ in range(2))
    assert rows_of(first, 3) == rows_of(again, 3)
    rows_of(again, 5)
    assert rows_of(first, 4) == rows_of(again, 4)
    assert rows_of(first, 3) == rows_of(again, 3)


@KINDS
def test_no_batch_is_larger_than_the_largest(kind: dict[str, Any]) -> None:
    epochs = make(kind)
    largest = epochs.largest_batch()
    assert largest.input_ids.shape == (2, 64)
    assert largest.input_ids.shape[1] == epochs.row_length
    micro_batches = epochs.micro_batches(0)
    batches = [epochs.batch(rows) for rows in micro_batches]
    assert all(batch.input_ids.numel() <= largest.input_ids.numel() for batch in batches)
    assert sum(batch.num_tokens for batch in batches) == sum(LENGTHS) == epochs.num_tokens
    assert (largest.positions is not None) == ("row_length" in kind)


@KINDS
def test_the_largest_batch_has_no_more_rows_than_an_epoch(kind: dict[str, Any]) -> None:
    epochs = make(kind, batch_size=100)
    assert epochs.largest_batch().input_ids.shape == (epochs.num_rows, 64)


@KINDS
def test_a_token_of_packed_rows_is_in_a_sample_of_so_many_on_average(kind: dict[str, Any]) -> None:
    expected = fmean(length for length in LENGTHS for _ in range(length))
    found = make(kind).packed_sample_tokens
    assert found == (pytest.approx(expected, rel=1e-12) if "row_length" in kind else None)


@KINDS
def test_what_is_counted_is_what_the_batches_have(kind: dict[str, Any]) -> None:
    epochs = make(kind, batch_size=2, micro_batches_per_step=2)
    total = 0
    for step in range(2 * epochs.num_steps):
        micro_batches = epochs.micro_batches(step)
        assert 1 <= len(micro_batches) <= 2
        batches = [epochs.batch(rows) for rows in micro_batches]
        num_targets = sum(batch.num_target_tokens for batch in batches)
        assert epochs.count(micro_batches) == (sum(b.num_tokens for b in batches), num_targets)
        total += num_targets
    assert total == 2 * epochs.num_target_tokens == 2 * (sum(LENGTHS) - len(LENGTHS))
