"""benchmarks/lora_gradient.py: its byte model, and a run over few rows."""

import pytest
import torch
from support.stand_in_gpu import install

from benchmarks import lora_gradient
from benchmarks.command import Machine
from benchmarks.tables import operation_table

MACHINE = Machine(torch.device("cpu"), copy_gbps=3000, matmul_tflops=800, peer=None)


def test_bytes_are_those_of_the_matrices() -> None:
    grad_y, h, sB = (torch.empty(*shape).half() for shape in ((7, 48), (7, 64), (48, 64)))
    grad_B = torch.empty(48, 16)
    # h's gradient is as large as h; B's is read and written
    expected = grad_y.nbytes + 2 * h.nbytes + sB.nbytes + 2 * grad_B.nbytes
    assert lora_gradient.lora_gradient_bytes(7, 48, 64, 16, 2) == expected


def test_every_member_has_rows_and_ranks_of_its_own() -> None:
    q, k = lora_gradient.updates_of((32, 8), 16)
    assert (q.y, q.A, q.B) == (slice(0, 32), slice(0, 16), slice(0, 32))
    assert (k.y, k.A, k.B) == (slice(32, 40), slice(16, 32), slice(32, 40))


def test_a_run_measures_every_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch)
    clock.tick_ms = 8.0
    rows = lora_gradient.measure_lora_gradient("a.layer", (32, 8), 5, torch.float16, MACHINE)
    assert [row["provider"] for row in rows] == ["limit", "ours", "torch"]
    assert rows[0]["percent_of_copy"] == 100
    header, lines = operation_table(rows)
    assert header[4:] == ["limit", "ours", "torch", "torch.compile"]
    assert len(lines) == 1
