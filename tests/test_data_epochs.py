"""data/epochs.py: every epoch has each sample once, in rows that two integers restore."""

import pytest

from data.epochs import Epochs
from data.samples import Sample

LENGTHS = [5, 30, 7, 64, 12, 9, 33, 5, 20, 41, 18]
SAMPLES = [Sample([i] * n, [i] * n) for i, n in enumerate(LENGTHS)]
KINDS = pytest.mark.parametrize("kind", [{}, {"row_length": 64}, {"group": 2}], ids=str)


def rows_of(epochs: Epochs, epoch: int) -> list[list[int]]:
    """All rows of an epoch, which is one step long."""
    return [row for rows in epochs.micro_batches(epoch, 0, 2, epochs.num_rows) for row in rows]


@KINDS
def test_every_epoch_has_each_sample_once(kind: dict[str, int]) -> None:
    epochs = Epochs(SAMPLES, LENGTHS, 1, True, **kind)
    orders = []
    for epoch in range(3):
        rows = rows_of(epochs, epoch)
        assert len(rows) == epochs.num_rows
        orders.append([index for row in rows for index in row])
        assert sorted(orders[-1]) == list(range(len(SAMPLES)))
    assert orders[0] != orders[1] != orders[2]


@KINDS
def test_an_epoch_is_a_function_of_seed_and_number(kind: dict[str, int]) -> None:
    first, again = (Epochs(SAMPLES, LENGTHS, 1, True, **kind) for _ in range(2))
    assert rows_of(first, 3) == rows_of(again, 3)
    rows_of(again, 5)
    assert rows_of(first, 4) == rows_of(again, 4)
    assert rows_of(first, 3) == rows_of(again, 3)


@KINDS
def test_no_batch_is_larger_than_the_largest(kind: dict[str, int]) -> None:
    epochs = Epochs(SAMPLES, LENGTHS, 1, True, **kind)
    largest = epochs.largest_batch(2)
    assert largest.input_ids.shape == (2, 64)
    assert largest.input_ids.shape[1] == epochs.row_length
    micro_batches = epochs.micro_batches(0, 0, 2, epochs.num_rows)
    batches = [epochs.batch(rows) for rows in micro_batches]
    assert all(batch.input_ids.numel() <= largest.input_ids.numel() for batch in batches)
    assert sum(batch.num_tokens for batch in batches) == sum(LENGTHS) == epochs.num_tokens
    assert (largest.positions is not None) == ("row_length" in kind)
