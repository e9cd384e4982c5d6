"""data/batches.py: padding that nobody sees, and an order that two integers restore."""

import pytest
import torch

from data.batches import (
    collate,
    epoch_order,
    epoch_steps,
    group_by_length,
    step_micro_batches,
)
from data.samples import Sample


def test_samples_are_padded_on_the_right() -> None:
    batch = collate([Sample([5, 6, 7], [-100, 6, 7]), Sample([8], [8]), Sample([9, 0], [9, -100])])
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert torch.equal(batch.input_ids, torch.tensor([[5, 6, 7], [8, 0, 0], [9, 0, 0]]))
    expected = torch.tensor([[-100, 6, 7], [8, -100, -100], [9, -100, -100]])
    assert torch.equal(batch.labels, expected)
    assert batch.lengths is not None
    assert int((batch.lengths > 0).sum()) == 6
    # labels at position 0 are never predicted
    assert int((batch.labels[:, 1:] != -100).sum()) == 2


def test_a_token_has_the_length_of_its_sample_and_padding_none() -> None:
    batch = collate([Sample([5, 6, 7], [-100, 6, 7]), Sample([8], [8]), Sample([9, 0], [9, -100])])
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [[3, 3, 3], [1, 0, 0], [2, 2, 0]]


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample: got none"):
        collate([])


@pytest.mark.parametrize("num_samples", [0, 1, 7, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_is_a_permutation_fixed_by_its_arguments(num_samples: int, shuffle: bool) -> None:
    order = epoch_order(num_samples, 3, 42, shuffle)
    assert sorted(order) == list(range(num_samples))
    torch.manual_seed(0)
    assert epoch_order(num_samples, 3, 42, shuffle) == order
    assert shuffle or order == list(range(num_samples))


def test_epochs_and_seeds_differ_and_do_not_mirror_each_other() -> None:
    orders = {
        tuple(epoch_order(100, epoch, seed, True)) for epoch in range(5) for seed in range(-2, 3)
    }
    assert len(orders) == 25


def test_the_order_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    epoch_order(10, 0, 0, True)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "accumulation", "steps"),
    [(0, 2, 2, 0), (1, 2, 2, 1), (8, 2, 2, 2), (9, 2, 2, 3), (11, 2, 2, 3), (5, 1, 1, 5)],
)
def test_the_steps_of_an_epoch_cover_it_once_in_order(
    num_samples: int, batch_size: int, accumulation: int, steps: int
) -> None:
    assert epoch_steps(num_samples, batch_size, accumulation) == steps
    order = epoch_order(num_samples, 0, 1, True)
    windows = [step_micro_batches(order, i, batch_size, accumulation) for i in range(steps)]
    assert [i for window in windows for micro_batch in window for i in micro_batch] == order
    assert all(len(window) == accumulation for window in windows[:-1])
    full = [len(micro_batch) for window in windows for micro_batch in window[:-1]]
    assert all(size == batch_size for size in full)


def test_the_last_window_is_short() -> None:
    assert step_micro_batches(range(7), 1, 2, 2) == [[4, 5], [6]]


@pytest.mark.parametrize("step", [-1, 2])
def test_a_step_outside_of_the_epoch_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[0, 2\): got {step}"):
        step_micro_batches(range(7), step, 2, 2)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(0, 1), (1, 0), (-1, 1)])
def test_sizes_must_be_positive(batch_size: int, accumulation: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1: got {batch_size} and {accumulation}"):
        epoch_steps(7, batch_size, accumulation)


@pytest.mark.parametrize("num_samples", [0, 1, 7, 400, 1003])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_samples_of_like_lengths_share_a_micro_batch(num_samples: int, batch_size: int) -> None:
    lengths = [1 + (17 * i * i) % 301 for i in range(num_samples)]
    order = epoch_order(num_samples, 0, 1, True)
    grouped = group_by_length(order, lengths, batch_size, 0, 1)
    assert sorted(grouped) == list(range(num_samples))
    assert grouped == group_by_length(order, lengths, batch_size, 0, 1)
    other = group_by_length(epoch_order(num_samples, 1, 1, True), lengths, batch_size, 1, 1)
    assert num_samples < 400 or grouped != other

    def padded(order: list[int]) -> int:
        batches = [order[i : i + batch_size] for i in range(0, num_samples, batch_size)]
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    assert padded(grouped) <= padded(order)
    if num_samples >= 400 and batch_size > 1:
        # a stretch has 50 micro-batches: what is left of the padding is about a fiftieth
        assert padded(grouped) - sum(lengths) < (padded(order) - sum(lengths)) / 10


def test_micro_batches_of_like_lengths_do_not_come_by_length() -> None:
    lengths = list(range(1, 201))
    grouped = group_by_length(epoch_order(200, 0, 1, True), lengths, 4, 0, 1)
    longest = [max(lengths[i] for i in grouped[start : start + 4]) for start in range(0, 200, 4)]
    assert sorted(longest) == list(range(4, 201, 4))
    assert longest not in (sorted(longest), sorted(longest, reverse=True))
