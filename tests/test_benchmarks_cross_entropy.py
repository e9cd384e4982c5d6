"""benchmarks/cross_entropy.py: its byte model, and a run over few rows."""

import pytest
import torch
from support.stand_in_gpu import install
from torch import Tensor

from benchmarks import cross_entropy
from benchmarks.command import Machine
from benchmarks.tables import operation_table
from llama.loss import chunk_rows

MACHINE = Machine(torch.device("cpu"), copy_gbps=3000, matmul_tflops=800, peer=None)
PROVIDERS = ["limit", "ours", "torch", "torch.compile"]


def test_bytes_are_those_of_the_tensors() -> None:
    logits, targets, losses = torch.empty(7, 64).half(), torch.empty(7).long(), torch.empty(7)
    rest = targets.nbytes + losses.nbytes
    assert cross_entropy.cross_entropy_bytes("loss", 7, 64, 2) == logits.nbytes + rest
    assert cross_entropy.cross_entropy_bytes("gradient", 7, 64, 2) == 2 * logits.nbytes + rest


def test_a_chunk_of_training_is_measured() -> None:
    for m, dtype in cross_entropy.shapes():
        assert m == chunk_rows(cross_entropy.VOCAB_SIZE, dtype, 8192)


def test_a_run_measures_every_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch)
    launched = []

    def launch(logits: Tensor, targets: Tensor, writes: bool) -> Tensor:
        launched.append(writes)
        return torch.zeros(logits.shape[0])

    monkeypatch.setattr(cross_entropy, "_launch_cross_entropy", launch)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    clock.tick_ms = 8.0
    rows = cross_entropy.measure_cross_entropy(3, torch.float16, MACHINE, 97)
    assert [(row["mode"], row["provider"]) for row in rows] == [
        (mode, provider) for mode in ("loss", "gradient") for provider in PROVIDERS
    ]
    assert set(launched) == {False, True}
    assert all(row["percent_of_copy"] == 100 for row in rows if row["provider"] == "limit")
    header, lines = operation_table(rows)
    assert header[4:] == PROVIDERS
    assert len(lines) == 2
