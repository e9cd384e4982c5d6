"""benchmarks/matmul_8bit.py: its byte model, and a run over few rows."""

from typing import Any

import pytest
import torch
from support.stand_in_gpu import install
from torch import Tensor

from benchmarks import matmul_8bit as benchmark
from benchmarks.command import Machine
from benchmarks.tables import matmul_8bit_table
from kernels.fp8 import E4M3, Fp8Rows, Fp8Weight
from kernels.matmul_8bit import matmul_8bit

MACHINE = Machine(torch.device("cpu"), copy_gbps=3000, matmul_tflops=800, peer=None)


def test_bytes_are_those_of_the_matrices() -> None:
    x, w = torch.empty(7, 32).to(E4M3), torch.empty(48, 32).to(E4M3)
    y, h, B = torch.empty(7, 48).half(), torch.empty(7, 64).half(), torch.empty(48, 64).half()
    scales, scale = torch.empty(7), torch.empty(())
    expected = sum(tensor.nbytes for tensor in (x, w, y, h, B, scales, scale))
    assert benchmark.product_bytes(7, 48, 32, 64) == expected


def test_the_limit_is_twice_the_rate_of_bf16() -> None:
    rows = 8192
    work = benchmark.work_of("a.layer", "forward", rows, 4096, 4096)
    assert work.num_flops == 2 * rows * 4096 * (4096 + 128)


@pytest.mark.parametrize("mode", benchmark.MODES)
def test_a_run_measures_every_provider(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    def torch_fp8(x: Fp8Rows, w: Fp8Weight, scales: tuple[Tensor, Tensor]) -> Any:
        assert scales[0].numel() in (1, x.values.shape[0])
        return x.values.float() @ w.values.float().T

    clock = install(monkeypatch)
    clock.tick_ms = 8.0
    monkeypatch.setattr(benchmark, "torch_fp8", torch_fp8)
    rows = benchmark.measure_product("a.layer", mode, 5, 48, 32, MACHINE)
    in_int8 = ["ours-int8"] * (mode == "forward")
    providers = ["ours", "ours-base", *in_int8, "torch-tensorwise", "torch-rowwise", "torch"]
    assert [row["provider"] for row in rows] == ["limit", *providers]
    header, lines = matmul_8bit_table(rows)
    assert header == [
        *("layer", "mode", "M", "limit", "ours", "without update", *["INT8"] * len(in_int8)),
        *("torch, a scale", "torch, a row", "bf16"),
    ]
    assert [len(line) for line in lines] == [len(header)]


def test_operands_in_int8_multiply_to_the_same_product() -> None:
    x, W = (torch.randn(rows, 64).half() for rows in (5, 48))
    out = torch.empty(5, 48).half()
    matmul_8bit(*benchmark.int8_operands(x, W), out)
    exact = x.double() @ W.double().T
    assert (out - exact).norm() < 0.02 * exact.norm()
