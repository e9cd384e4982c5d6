"""Measure the products of a frozen base in E4M3: ours, torch's in E4M3 and in bf16.

    python -m benchmarks matmul_8bit --json benchmarks/results/matmul_8bit.h200.json

Forward is y = x W^T + h B^T for a group of Llama-3-8B, backward grad_x = grad_y W + grad_h A from
W's transpose. torch multiplies in E4M3 with one scale for each operand or one for each row, both
with fast sums and without the update, which would take another product; in bf16 the update is the
last columns of the one product. The limit is twice the rate of a large product in bf16, for the
base and the update in 16 bits.
"""

import sys
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.command import Candidate, Machine, Result, Work, limit_row, main, measured_rows
from benchmarks.layer_operations import NUM_ROWS
from benchmarks.layers import GROUPS, LAYERS, WEIGHT_STD
from benchmarks.measure import Operation, num_input_sets
from benchmarks.tables import Row, aligned, matmul_8bit_table
from kernels.fp8 import E4M3, Fp8Rows, Fp8Weight, LowRankTail, empty_fp8_rows
from kernels.matmul_8bit import matmul_8bit
from kernels.rotation import WIDTH, RotatedRows, empty_rotated_rows
from kernels.rows_8bit import quantize_rows

DTYPE = torch.bfloat16
TAIL = 64
# (out_features, in_features)
MEASURED = {
    "llama-3-8b.qkv_proj": (sum(GROUPS["llama-3-8b.qkv_proj"][0]), 4096),
    "llama-3-8b.o_proj": LAYERS["llama-3-8b.q_proj"],
    "llama-3-8b.gate_up_proj": (sum(GROUPS["llama-3-8b.gate_up_proj"][0]), 4096),
    "llama-3-8b.down_proj": LAYERS["llama-3-8b.down_proj"],
}
MODES = ("forward", "backward")


def product_bytes(m: int, n: int, k: int, tail: int) -> float:
    """Count the bytes of a product: x and W in 8 bits, y, h and B in 16, scales in 32."""
    return m * k + n * k + 2 * m * n + 2 * tail * (m + n) + 4 * m + 4


def work_of(layer: str, mode: str, m: int, n: int, k: int) -> Work:
    """Say what a product cannot do without; a column in 16 bits takes as long as two in 8."""
    num_bytes = product_bytes(m, n, k, TAIL)
    return Work(mode, layer, m, n, k, E4M3, num_bytes, 2 * m * n * (k + 2 * TAIL))


def torch_fp8(x: Fp8Rows, w: Fp8Weight, scales: tuple[Tensor, Tensor]) -> Tensor:
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x.values, w.values.T, *scales, out_dtype=DTYPE, use_fast_accum=True
    )


def int8_operands(x: Tensor, W: Tensor) -> tuple[RotatedRows, RotatedRows]:
    """Rotate and quantize both, rows of a weight as rows of activations."""
    rows, weight = (quantize_rows(t, empty_rotated_rows(t.shape, t.device)) for t in (x, W))
    return rows, weight._replace(scales=weight.scales / WIDTH)


def measure_product(layer: str, mode: str, m: int, n: int, k: int, machine: Machine) -> list[Row]:
    """Measure one product by every provider."""
    work = work_of(layer, mode, m, n, k)
    # the matrices in bf16 are with each set
    resident = 4 * (m * k + n * k + m * n)
    calls: dict[str, list[partial[object]]] = {}
    for _ in range(num_input_sets(work.num_bytes, resident, machine.device)):

        def draw(rows: int, columns: int, std: float = 1.0) -> Tensor:
            return (torch.randn(rows, columns, device=machine.device) * std).to(DTYPE)

        x_ext, W_ext = draw(m, k + TAIL), draw(n, k + TAIL, WEIGHT_STD)
        x = quantize_rows(x_ext[:, :k], empty_fp8_rows((m, k), machine.device))
        scale = torch.tensor(WEIGHT_STD / 60, device=machine.device)
        w = Fp8Weight((W_ext[:, :k].float() / scale).to(E4M3), scale)
        # the backward pass has A as rows along its output
        B = W_ext[:, k:] if mode == "forward" else W_ext[:, k:].T.contiguous().T
        tail = LowRankTail(x_ext[:, k:], B)
        out = torch.empty(m, n, dtype=DTYPE, device=machine.device)
        by_row = x.scales[:, None], scale.expand(1, n).contiguous()
        # in the backward pass nothing is in INT8
        in_int8 = {}
        if mode == "forward":
            of_int8 = int8_operands(x_ext[:, :k], W_ext[:, :k])
            in_int8["ours-int8"] = partial(matmul_8bit, *of_int8, out, tail)
        for provider, call in {
            "ours": partial(matmul_8bit, x, w, out, tail),
            "ours-base": partial(matmul_8bit, x, w, out),
            **in_int8,
            "torch-tensorwise": partial(torch_fp8, x, w, (scale, scale)),
            "torch-rowwise": partial(torch_fp8, x, w, by_row),
            "torch": partial(torch.mm, x_ext, W_ext.T, out=out),
        }.items():
            calls.setdefault(provider, []).append(call)
    candidates = [Candidate(work, provider, Operation(made)) for provider, made in calls.items()]
    of_fp8 = replace(machine, matmul_tflops=2 * machine.matmul_tflops)
    return [limit_row(work, of_fp8), *measured_rows(candidates, of_fp8)]


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for layer, (n, k) in MEASURED.items():
        for mode in MODES:
            for m in NUM_ROWS:
                shape = (n, k) if mode == "forward" else (k, n)
                rows += measure_product(layer, mode, m, *shape, machine)
        print(f"measured {layer}", flush=True)
    return Result(rows, {}, aligned(*matmul_8bit_table(rows)))


if __name__ == "__main__":
    sys.exit(main("matmul_8bit", run))
