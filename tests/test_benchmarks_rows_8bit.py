"""benchmarks/rows_8bit.py: what is counted, and a run over few rows, on a CPU."""

import pytest
import torch
from support.stand_in_gpu import install

from benchmarks import rows_8bit
from benchmarks.command import Machine
from benchmarks.tables import operation_table
from kernels.rotation import INT8
from kernels.rows_8bit import empty_8bit_rows

CPU = torch.device("cpu")
MACHINE = Machine(CPU, copy_gbps=3000, matmul_tflops=800, peer=None)
M, D, F = 3, 32, 48


@pytest.mark.parametrize("name", rows_8bit.FORMATS)
def test_bytes_are_those_of_the_tensors(name: str) -> None:
    found = {each.work.mode: each.work.num_bytes for each in reversed(operations(name))}
    format = rows_8bit.FORMATS[name]
    narrow, wide = (
        sum(tensor.nbytes for tensor in empty_8bit_rows((M, width), format, CPU))
        for width in (D, F)
    )
    x = 2 * M * D
    # a norm's rstd too
    assert found[f"norm, {name}"] == 4 * x + narrow + 4 * M
    assert found[f"rows, {name}"] == x + narrow
    assert found[f"glu, {name}"] == 3 * 2 * M * F + wide


def operations(name: str) -> list[rows_8bit.Measured]:
    return [
        *rows_8bit.row_operations(name, M, D, F, CPU),
        *rows_8bit.weight_operations(name, D, F, CPU),
    ]


@pytest.mark.parametrize("name", rows_8bit.FORMATS)
def test_a_run_measures_every_provider(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    clock = install(monkeypatch)
    clock.tick_ms = 8.0
    rows = [row for each in operations(name) for row in rows_8bit.measure(each, MACHINE)]
    is_e4m3 = rows_8bit.FORMATS[name] != INT8
    by_rows, by_weight = ["limit", "ours", "torch"] * 4, ["limit", "ours"] * (1 + is_e4m3)
    assert [row["provider"] for row in rows] == by_rows + by_weight
    _, lines = operation_table(rows)
    modes = [f"{kind}, {name}" for kind in ("rows", "rows", "norm", "glu", "weight")]
    assert [line[1] for line in lines] == modes + [f"weight transposed, {name}"] * is_e4m3
