"""data/epochs.py: every epoch has each sample once, in rows that two integers restore."""

import math
from collections import Counter
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from data.epochs import Epochs
from data.samples import NO_LOSS
from data.shares import Share
from data.tokens.pieces import ROW
from data.tokens.stored_samples import StoredSamples
from rows.batch import Batch

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


def num_tokens_of(batch: Batch) -> int:
    """Count the tokens of a batch without its padding."""
    assert batch.lengths is not None
    return int((batch.lengths > 0).sum())


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
    assert sum(num_tokens_of(batch) for batch in batches) == sum(LENGTHS) == epochs.num_tokens
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
        num_tokens = sum(num_tokens_of(batch) for batch in batches)
        num_targets = sum(int((batch.labels[:, 1:] != NO_LOSS).sum()) for batch in batches)
        assert epochs.count(micro_batches) == (num_tokens, num_targets)
        total += num_targets
    assert total == 2 * epochs.num_target_tokens == 2 * (sum(LENGTHS) - len(LENGTHS))


SHARES = [Share("a", 0.5, 6), Share("b", 1.5, 5)]


@KINDS
def test_a_weight_is_kept_in_rows_of_every_kind(kind: dict[str, Any]) -> None:
    epochs = make(kind | {"shares": SHARES}, micro_batches_per_step=1)
    counted: Counter[int] = Counter()
    steps = [epochs.steps_in(number) for number in range(5)]
    for epoch in range(4):
        rows = [
            row
            for step in range(steps[epoch], steps[epoch + 1])
            for rows in epochs.micro_batches(step)
            for row in rows
        ]
        indices = [index for row in rows for index in row]
        assert sum(index < 6 for index in indices) == 3
        # 7.5 of 5 samples, to the nearest whole number
        assert len(indices) == 3 + 8
        counted.update(indices)
    assert [counted[index] for index in range(6)] == [2] * 6


@KINDS
def test_weighted_epochs_are_a_function_of_seed_and_step(kind: dict[str, Any]) -> None:
    first, again = (make(kind | {"shares": SHARES}, 1, 2) for _ in range(2))
    steps = range(first.steps_in(6))
    forwards = [first.micro_batches(step) for step in steps]
    # as a run that is resumed at its end, and another in its middle
    assert [again.micro_batches(step) for step in reversed(steps)] == forwards[::-1]
    # ranks share the micro-batches of a step among each other
    assert [b for step in forwards for b in step] == [
        batch
        for step in range(make(kind | {"shares": SHARES}, 1, 1).steps_in(6))
        for batch in make(kind | {"shares": SHARES}, 1, 1).micro_batches(step)
    ]


@KINDS
def test_sets_of_weight_one_are_as_one_file(kind: dict[str, Any]) -> None:
    one, two = make(kind), make(kind | {"shares": [Share("a", 1.0, 4), Share("b", 1.0, 7)]})
    assert [rows_of(one, epoch) for epoch in range(3)] == [
        rows_of(two, epoch) for epoch in range(3)
    ]
    assert one.num_tokens == two.num_tokens
    assert one.packed_sample_tokens == two.packed_sample_tokens


def test_packed_epochs_of_parts_may_have_other_numbers_of_steps() -> None:
    epochs = make({"row_length": 64, "shares": [Share("a", 0.3, 11)]}, 1, 1)
    sizes = [epochs.steps_in(n + 1) - epochs.steps_in(n) for n in range(9)]
    assert len(set(sizes)) > 1
    assert epochs.num_steps == epochs.num_rows == sizes[0]
    for number, size in enumerate(sizes):
        start = epochs.steps_in(number)
        assert epochs.epochs_after(start) == number
        assert epochs.steps_in(number + 0.5) == start + math.ceil(size / 2)
        rows = [row for step in range(start, start + size) for row in epochs.micro_batches(step)[0]]
        assert sum(len(row) for row in rows) == 3
        assert epochs.epochs_after(start + 1) == number + (1 / size if size > 1 else 1)
        assert epochs.is_end(start) == (number > 0)
        assert epochs.is_end(start + 1) == (size == 1)
    assert epochs.rows_at_once == 1
    # with more rows at once than the first epoch has
    assert make({"row_length": 64, "shares": [Share("a", 0.3, 11)]}, 8, 1).rows_at_once == 8


def test_the_last_micro_batch_of_an_epoch_may_have_any_size_where_epochs_differ() -> None:
    epochs = make({"row_length": 64, "shares": [Share("a", 0.6, 11)]}, 4, 1)
    steps = range(epochs.steps_in(20))
    sizes = {len(rows) for step in steps for rows in epochs.micro_batches(step)}
    assert sizes == {1, 2, 3, 4}
    assert epochs.most_batch_sizes == 4


def test_twice_is_twice_as_many_rows_and_tokens() -> None:
    once, twice = make({}), make({"shares": [Share("a", 2.0, 11)]})
    assert twice.num_rows == 2 * once.num_rows
    assert twice.num_tokens == 2 * once.num_tokens
    assert twice.steps_in(1.5) == math.ceil(1.5 * twice.num_steps)
    assert sorted(rows_of(twice, 0)) == sorted([[i] for i in range(11)] * 2)
