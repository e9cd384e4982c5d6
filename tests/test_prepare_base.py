"""prepare/base.py: the workload of a run is that of its largest micro-batch, with its padding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.micro_steps import LORA, fitting
from support.tiny_llama import write_variant
from test_data_epochs import LENGTHS, samples

from checkpoint.opening import open_checkpoint
from data.epochs import Epochs
from data.shares import Share
from kernels.device import H200
from prepare.base import evaluated_at_once, workload
from run.config import TrainConfig
from step.captured_shapes import MAX_GRAPHS
from step.workload import Workload


def planned(tmp_path: Path, device: str, num_ranks: int = 1, **kind: Any) -> Workload:
    checkpoint = open_checkpoint(write_variant(tmp_path, "grouped-query"))
    config = TrainConfig(device=device, dtype="bfloat16", neftune_noise_alpha=5.0)
    return workload(config, LORA, checkpoint, Epochs(samples(), 0, True, 4, 1, **kind), num_ranks)


def test_a_gpus_rows_are_planned_with_their_padding(tmp_path: Path) -> None:
    # 70 tokens are computed as 128
    assert planned(tmp_path, "cuda", row_length=70).tokens == 128
    assert planned(tmp_path, "cpu", row_length=70).tokens == 70
    assert planned(tmp_path, "cuda").tokens == 64
    assert planned(tmp_path, "cpu").tokens == max(LENGTHS)


def test_a_batch_has_no_more_rows_than_there_are(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_variant(tmp_path, "grouped-query"))
    config = TrainConfig(device="cuda", dtype="bfloat16", batch_size=100)
    epochs = Epochs(samples(), 0, True, 100, 1)
    assert workload(config, LORA, checkpoint, epochs, 1).batch == len(LENGTHS)


def test_what_a_run_is_beside_its_rows_is_planned_for(tmp_path: Path) -> None:
    work = planned(tmp_path, "cuda", num_ranks=2, row_length=70)
    assert (work.batch, work.num_ranks, work.has_noise) == (4, 2, True)
    assert work.sample_tokens == pytest.approx(sum(n * n for n in LENGTHS) / sum(LENGTHS))
    assert work.dtype == work.model.head.dtype == torch.bfloat16
    assert planned(tmp_path, "cuda").sample_tokens is None


def test_an_auxiliary_loss_is_planned_for(tmp_path: Path) -> None:
    checkpoint, epochs = (
        open_checkpoint(write_variant(tmp_path, "olmoe")),
        Epochs(samples(), 0, True, 4, 1),
    )
    for coef in (0.0, 0.1):
        config = TrainConfig(device="cuda", dtype="bfloat16", router_aux_loss_coef=coef)
        lora = fitting(LORA, checkpoint.config)
        assert workload(config, lora, checkpoint, epochs, 1).has_aux_loss == (coef > 0)


def test_every_length_of_a_batch_may_be_captured(tmp_path: Path) -> None:
    # all samples are padded to 64 tokens; the last batch of an epoch has fewer rows
    assert planned(tmp_path, "cuda").num_shapes == 2
    assert planned(tmp_path, "cuda", row_length=70).num_shapes == 2
    # or any number up to the batch's four, where epochs have parts of the samples
    parts = [Share("a", 0.6, len(LENGTHS))]
    assert planned(tmp_path, "cuda", row_length=70, shares=parts).num_shapes == 4
    assert planned(tmp_path, "cpu").num_shapes == min(2 * len(set(LENGTHS)), MAX_GRAPHS)


def test_a_cpu_evaluates_whole_batches(tmp_path: Path) -> None:
    work, evaluation = planned(tmp_path, "cpu"), Epochs(samples(), 0, False, 8, 1)
    assert evaluated_at_once(work, evaluation, 8) == 8
    assert evaluated_at_once(work, evaluation, 800) == len(LENGTHS)


def test_a_gpu_evaluates_no_more_rows_than_training_has_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step.workload.properties", lambda device: H200)
    work, evaluation = planned(tmp_path, "cuda"), Epochs(samples(), 0, False, 8, 1)
    assert evaluated_at_once(work, evaluation, 8) == 8
    # tiny models are planned in steps of the allocator: rows that are long enough to take several
    longer = replace(work, tokens=64, batch=1)
    long = Epochs(samples(), 0, False, 8, 1)
    monkeypatch.setattr(Epochs, "row_length", 1 << 18)
    assert 1 <= evaluated_at_once(longer, long, 8) < 8
