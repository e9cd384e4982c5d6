"""benchmarks/expert_rows.py: what is counted, and a run over few tokens, on a CPU."""

import pytest
import torch
from support.stand_in_gpu import install

from benchmarks import expert_rows
from benchmarks.command import Machine
from benchmarks.tables import operation_table

MACHINE = Machine(torch.device("cpu"), copy_gbps=3000, matmul_tflops=800, peer=None)


def test_a_run_measures_every_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch)
    clock.tick_ms = 8.0
    monkeypatch.setattr(expert_rows, "HIDDEN_SIZE", 32)
    monkeypatch.setattr(expert_rows, "INTERMEDIATE_SIZE", 16)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    rows = []
    for operation in expert_rows.operations_over(3, 2, MACHINE.device):
        matrices = [tensor for tensor in operation.draw() if tensor.dtype == torch.bfloat16]
        num_rows = sum(len(matrix) for matrix in matrices)
        # and the result: a row for each pair, or for each token
        num_rows += 3 if operation.mode == "combine" else 6
        assert operation.num_rows == num_rows
        assert {matrix.shape[1] for matrix in matrices} == {operation.width}
        rows += expert_rows.measure_expert_rows(operation, 3, 2, MACHINE)
    assert [row["provider"] for row in rows] == ["limit", "ours", "torch", "torch.compile"] * 3
    _, lines = operation_table(rows)
    assert [line[1] for line in lines] == ["gather", "combine", "weigh-backward"]
