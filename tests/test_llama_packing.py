"""Samples in one row learn as they do alone: every family, window and cap."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.equality import assert_equal
from support.micro_steps import KEEP, LORA, NF4, gradients_of, load_tiny, step_of, tokens
from support.tiny_llama import FIELDS, VARIANTS
from torch import Tensor

from data.batches import collate
from data.packing import collate_packed
from data.samples import NO_LOSS, Sample
from llama.model import Llama, samples_of
from lora.config import LoRAConfig
from rows.batch import Batch
from step.micro_step import MicroStep, Policy

CUDA = torch.device("cuda")
# of two rows: windows of 8 are shorter than some; a single token teaches nothing
ROWS = ((11, 1, 9, 14), (20, 3, 12))
ROW_LENGTH = 37


def rows_of_samples(rows: tuple[tuple[int, ...], ...]) -> list[list[Sample]]:
    found, seed = [], 0
    for row in rows:
        samples = []
        for length in row:
            ids = tokens(length, seed=seed).tolist()
            # a first label is there, and no loss sees it
            labels = [NO_LOSS if 2 <= i < 4 else token for i, token in enumerate(ids)]
            samples.append(Sample(ids, labels))
            seed += 1
        found.append(samples)
    return found


def gradients_of_batch(step: MicroStep, batch: Batch) -> dict[str, Tensor]:
    return gradients_of(step, batch.input_ids, batch.labels, positions=batch.positions)


def alone(step: MicroStep, rows: list[list[Sample]]) -> dict[str, Tensor]:
    """Add up what every sample gives in a row of its own, in float64."""
    total: dict[str, Tensor] = {}
    for sample in (sample for row in rows for sample in row):
        for name, tensor in gradients_of_batch(step, collate([sample])).items():
            total[name] = total.get(name, 0) + tensor.double()
    return total


def lora_for(variant: str) -> LoRAConfig:
    fused = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    return replace(LORA, target_modules=fused) if variant == "phi3" else LORA


def rows_for(variant: str) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Rows that a variant can hold, and their length: longrope's are short ones."""
    return (((5, 1, 6), (4, 9)), 14) if variant == "phi3" else (ROWS, ROW_LENGTH)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_samples_give_the_loss_and_the_gradients_that_they_give_alone(
    tmp_path: Path, variant: str
) -> None:
    lengths, row_length = rows_for(variant)
    rows = rows_of_samples(lengths)
    step = step_of(load_tiny(tmp_path, lora_for(variant), None, variant=variant), KEEP)
    packed = gradients_of_batch(step, collate_packed(rows, row_length))
    for name, expected in alone(step, rows).items():
        # a few hundred sums in another order, each rounded once
        tolerance = 50 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert (packed[name].double() - expected).abs().max() <= tolerance, name


@pytest.mark.parametrize("variant", ["grouped-query", "mistral", "gemma2"])
def test_no_sample_sees_another(tmp_path: Path, variant: str) -> None:
    step = step_of(load_tiny(tmp_path, variant=variant), KEEP)
    rows = rows_of_samples(ROWS)
    # of one sample of each row nothing else is learned
    for samples in rows:
        for index, sample in enumerate(samples):
            if index != 2:
                samples[index] = Sample(sample.input_ids, [NO_LOSS] * len(sample.labels))
    before = gradients_of_batch(step, collate_packed(rows, ROW_LENGTH))
    for samples in rows:
        for index, sample in enumerate(samples):
            if index != 2:
                other = [(token + 1) % FIELDS["vocab_size"] for token in sample.input_ids]
                samples[index] = Sample(other, sample.labels)
    after = gradients_of_batch(step, collate_packed(rows, ROW_LENGTH))
    for name, tensor in before.items():
        assert_equal(after[name], tensor, name)


def test_policies_give_the_same_bits(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, variant="gemma2")
    batch = collate_packed(rows_of_samples(ROWS), ROW_LENGTH)
    expected = gradients_of_batch(step_of(model, KEEP), batch)
    policies: tuple[Policy, ...] = ("recompute", "keep")
    found = gradients_of_batch(step_of(model, policies), batch)
    for name, tensor in expected.items():
        assert_equal(found[name], tensor, name)


def test_frequencies_that_depend_on_a_samples_length_are_refused(tmp_path: Path) -> None:
    step = step_of(load_tiny(tmp_path, lora_for("phi3"), variant="phi3"), KEEP)
    with pytest.raises(ValueError, match=r"are for, 16 tokens: got 37; lower --max-length"):
        gradients_of_batch(step, collate_packed(rows_of_samples(ROWS), ROW_LENGTH))


def test_what_remains_of_a_sample_is_counted() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4]])
    places = samples_of(positions)
    assert places.positions.tolist() == positions.tolist()
    assert places.remaining.tolist() == [[2, 1, 0, 0, 1, 0], [0, 4, 3, 2, 1, 0]]
    assert places.positions.dtype == places.remaining.dtype == torch.int32


def load_on_gpu(folder: Path, variant: str, dtype: torch.dtype) -> Llama:
    return load_tiny(folder, lora_for(variant), NF4, CUDA, dtype, variant)


# a GPU pads rows to 64 tokens, more than phi3's first frequencies are for here
@pytest.mark.gpu
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "phi3"])
def test_gpu_packed_samples_err_no_more_than_twice_as_much_as_alone(
    tmp_path: Path, variant: str
) -> None:
    lengths, row_length = rows_for(variant)
    rows = rows_of_samples(lengths)
    lora = lora_for(variant)
    truth = alone(step_of(load_tiny(tmp_path, lora, variant=variant), KEEP), rows)
    step = step_of(load_on_gpu(tmp_path, variant, torch.bfloat16), KEEP, captures=True)
    baseline = alone(step, rows)
    batch = collate_packed(rows, row_length)
    first = gradients_of_batch(step, batch)
    for name, expected in truth.items():
        error = (first[name].double() - expected).square().mean().sqrt()
        floor = (baseline[name] - expected).square().mean().sqrt()
        assert error <= 2 * floor, name
    # from the second time on it is captured; another filling takes the same graphs
    other = collate_packed([samples[::-1] for samples in rows], row_length)
    gradients_of_batch(step, other)
    again = gradients_of_batch(step, batch)
    for name, tensor in first.items():
        assert_equal(again[name], tensor, name)
    uncaptured = step_of(step.model, KEEP)
    gradients_of_batch(step, batch)
    for name, tensor in gradients_of_batch(uncaptured, other).items():
        assert_equal(gradients_of_batch(step, other)[name], tensor, name)
