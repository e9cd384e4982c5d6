"""data/packing.py: nothing is lost, cut or doubled, and hardly a row has room left."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import Packing, collate_packed, mean_sample_tokens, pack
from data.samples import NO_LOSS, Sample

ROW = 64
LENGTHS = st.lists(st.integers(1, ROW), min_size=1, max_size=200)


def filled(rows: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[index] for index in row) for row in rows]


@given(LENGTHS, st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_every_sample_is_in_one_row_that_holds_it(
    lengths: list[int], epoch: int, seed: int, shuffle: bool
) -> None:
    rows = pack(lengths, ROW, epoch, seed, shuffle)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert max(filled(rows, lengths)) <= ROW
    assert pack(lengths, ROW, epoch, seed, shuffle) == rows


@given(LENGTHS, st.integers(0, 5))
def test_epochs_have_as_many_rows_and_few(lengths: list[int], epoch: int) -> None:
    rows = pack(lengths, ROW, epoch, 0, True)
    assert len(rows) == len(pack(lengths, ROW, 0, 1, False))
    # no two rows would fit into one, so there are at most twice as many as there must be
    least = sorted(filled(rows, lengths))[:2]
    assert len(least) < 2 or sum(least) > ROW


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sample 1 has 65; raise --max-length$"):
        pack([3, ROW + 1], ROW, 0, 0, True)


def test_equally_long_samples_change_their_neighbours() -> None:
    lengths = [ROW // 2] * 40

    def pairs(epoch: int) -> set[frozenset[int]]:
        return {frozenset(row) for row in pack(lengths, ROW, epoch, 0, True)}

    assert pairs(0) != pairs(1)
    assert len(pairs(0)) == 20


def test_rows_come_in_the_order_of_their_epoch() -> None:
    # no two fit into one row
    lengths = list(range(ROW // 2 + 1, ROW + 1))
    longest_first = [[index] for index in reversed(range(len(lengths)))]
    assert pack(lengths, ROW, 0, 0, False) == longest_first
    first, second = (pack(lengths, ROW, epoch, 0, True) for epoch in range(2))
    assert first != second
    assert longest_first not in (first, second)


def sample_of(length: int, first: int) -> Sample:
    ids = list(range(first, first + length))
    return Sample(ids, [NO_LOSS if token % 3 == 0 else token for token in ids])


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4))
def test_a_batch_holds_the_samples_and_their_places(lengths: list[list[int]]) -> None:
    rows = [[sample_of(length, 10 * i + 1) for i, length in enumerate(row)] for row in lengths]
    batch = collate_packed(rows, 48)
    assert batch.positions is not None
    assert batch.lengths is not None
    assert batch.input_ids.shape == batch.labels.shape == batch.positions.shape == (len(rows), 48)
    for index, samples in enumerate(rows):
        start = 0
        for sample in samples:
            part = slice(start, start + len(sample.input_ids))
            assert batch.input_ids[index, part].tolist() == sample.input_ids
            assert batch.positions[index, part].tolist() == list(range(len(sample.input_ids)))
            assert (batch.lengths[index, part] == len(sample.input_ids)).all()
            assert batch.labels[index, start] == NO_LOSS
            assert batch.labels[index, part].tolist()[1:] == sample.labels[1:]
            start = part.stop
        assert not batch.positions[index, start:].any()
        assert not batch.lengths[index, start:].any()
        assert (batch.labels[index, start:] == NO_LOSS).all()
    assert int((batch.lengths > 0).sum()) == sum(sum(row) for row in lengths)
    num_target_tokens = sum(sample.num_target_tokens for row in rows for sample in row)
    assert num_target_tokens == int((batch.labels != NO_LOSS).sum())


def test_an_epoch_has_its_rows_whenever_it_is_asked_for() -> None:
    lengths = [ROW // 2] * 9
    packing = Packing(lengths, ROW, 3, True, lambda epoch: range(len(lengths)))
    assert packing.num_rows == 5
    for epoch in (0, 2, 1, 2):
        assert packing.rows(epoch) == pack(lengths, ROW, epoch, 3, True)
    assert mean_sample_tokens([1, 3]) == 2.5


def test_rows_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        collate_packed([], 8)
    with pytest.raises(ValueError, match=r"at most 8 tokens"):
        collate_packed([[sample_of(5, 1), sample_of(4, 1)]], 8)


def test_realistic_lengths_leave_next_to_no_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(5000, generator=generator) * 0.6 + 5.2).exp().long().clamp(8, 2048)
    lengths = drawn.tolist()
    rows = pack(lengths, 2048, 0, 0, True)
    assert sum(lengths) / (len(rows) * 2048) > 0.99
    assert max(Counter(index for row in rows for index in row).values()) == 1
