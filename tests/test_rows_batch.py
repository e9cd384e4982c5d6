"""rows/batch.py: padding is on the right, and nothing is learned from it."""

import torch

from rows.batch import NO_LOSS, Batch


def test_padding_has_no_label_no_length_and_is_no_part_of_a_sample() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])
    positions, lengths = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]]), torch.full((2, 4), 4)
    batch = Batch(ids, ids.clone(), positions, lengths).padded(3)
    assert batch.positions is not None
    assert batch.lengths is not None
    for padded, given, value in (
        (batch.input_ids, ids, 0),
        (batch.labels, ids, NO_LOSS),
        (batch.positions, positions, 0),
        (batch.lengths, lengths, 0),
    ):
        assert padded.shape == (2, 7)
        assert torch.equal(padded[:, :4], given)
        assert torch.equal(padded[:, 4:], torch.full((2, 3), value))


def test_rows_of_one_sample_stay_rows_of_one_sample() -> None:
    ids = torch.tensor([[5, 6]])
    batch = Batch(ids, ids).padded(1)
    assert batch.positions is None
    assert batch.lengths is None
