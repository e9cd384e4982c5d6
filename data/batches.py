"""Samples as tensors, and which samples make up which optimizer step.

Where torch.utils.data.DataLoader keeps an iterator whose state a resumed run must restore, the
order of an epoch is a pure function of (num_samples, epoch, seed): resuming needs two integers,
epoch and step.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch

from data.samples import NO_LOSS, Sample
from rows.batch import Batch

T = TypeVar("T")
# of a stretch within which samples are sorted by length
GROUPED_MICRO_BATCHES = 50


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad samples on the right to the longest of them.

    The padding has id 0 and label -100. Attention is causal and the padding comes last, so no real
    token ever sees it and it has no loss: no id means padding, and no attention mask is needed. An
    EOS that is also the checkpoint's pad token keeps its label.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("a batch must have at least one sample: got none")
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.zeros(len(samples), length, dtype=torch.int64)
    labels = torch.full((len(samples), length), NO_LOSS, dtype=torch.int64)
    lengths = torch.zeros(len(samples), length, dtype=torch.int64)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
        lengths[row, : len(sample.input_ids)] = len(sample.input_ids)
    return Batch(input_ids, labels, lengths=lengths)


def epoch_order(num_samples: int, epoch: int, seed: int, shuffle: bool) -> list[int]:
    """Indices of the samples in the order of an epoch: a permutation, fixed by the arguments."""
    if not shuffle:
        return list(range(num_samples))
    # hashed, so that neighbouring seeds and epochs share nothing; seed + epoch would repeat orders
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(num_samples, generator=generator).tolist()


def group_by_length(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, epoch: int, seed: int
) -> list[int]:
    """Reorder an epoch so that a micro-batch has samples of like lengths and little padding.

    Stretches of the order are sorted by length and cut into micro-batches, whose order is then left
    to chance: unlike transformers' LengthGroupedSampler, no stretch runs from long to short. The
    last micro-batch stays the short one.
    """
    stretch = GROUPED_MICRO_BATCHES * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), stretch):
        # stable, so what is equally long stays in the epoch's order
        some = sorted(order[start : start + stretch], key=lambda index: -lengths[index])
        batches += [some[i : i + batch_size] for i in range(0, len(some), batch_size)]
    last = batches.pop() if batches and len(batches[-1]) < batch_size else []
    places = epoch_order(len(batches), epoch, seed, shuffle=True)
    return [index for place in places for index in batches[place]] + last


def epoch_steps(num_samples: int, batch_size: int, gradient_accumulation_steps: int) -> int:
    """Optimizer steps of an epoch; the last may have fewer samples than the others.

        ceil(num_samples / (batch_size * gradient_accumulation_steps))

    Raises:
        ValueError: a size is not positive.
    """
    return -(-num_samples // _window(batch_size, gradient_accumulation_steps))


def step_micro_batches(
    order: Sequence[T],
    step_in_epoch: int,
    batch_size: int,
    gradient_accumulation_steps: int,
) -> list[list[T]]:
    """What each micro-batch of an optimizer step has of an epoch's order, counted from 0 in it.

    Args:
        order: indices of samples, or rows of several.

    Raises:
        ValueError: a size is not positive, or the epoch has no such step.
    """
    window = _window(batch_size, gradient_accumulation_steps)
    num_steps = epoch_steps(len(order), batch_size, gradient_accumulation_steps)
    if not 0 <= step_in_epoch < num_steps:
        raise ValueError(f"step_in_epoch must be in [0, {num_steps}): got {step_in_epoch}")
    some = list(order[step_in_epoch * window : (step_in_epoch + 1) * window])
    return [some[i : i + batch_size] for i in range(0, len(some), batch_size)]


def _window(batch_size: int, gradient_accumulation_steps: int) -> int:
    if batch_size < 1 or gradient_accumulation_steps < 1:
        raise ValueError(
            "--batch-size and --gradient-accumulation-steps must be at least 1: got "
            f"{batch_size} and {gradient_accumulation_steps}"
        )
    return batch_size * gradient_accumulation_steps
