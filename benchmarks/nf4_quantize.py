"""Measure the quantization of weights to NF4: ours, bitsandbytes, plain torch, a copy's bandwidth.

    python -m benchmarks nf4_quantize --json benchmarks/results/nf4_quantize.h100.json

Bandwidth is the limit: the weights are read and the NF4 bytes written, once each. Ours is the
kernels' time; `ours-checked` is the public function, which then waits for the device to say whether
a weight was not finite. That, the reference and bitsandbytes copy from the host or wait for the
device, so Python issues their calls.
"""

import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.command import Candidate, Machine, Result, Work, limit_row, main, measured_rows
from benchmarks.layers import BLOCK_SIZE, LAYERS, WEIGHT_STD, nf4_bytes
from benchmarks.measure import Operation, num_input_sets
from benchmarks.tables import Row, aligned, bandwidth_table
from kernels.nf4_quantize import (
    _launch_nf4_quantize,
    nf4_quantize_member,
    nf4_quantize_member_reference,
)
from nf4.weight import NF4Weight, empty_weight


def shapes() -> list[tuple[str, torch.dtype]]:
    """List what is measured: every layer in bf16, one in the other dtypes too."""
    others = [("llama-3-8b.gate_proj", dtype) for dtype in (torch.float16, torch.float32)]
    return [(layer, torch.bfloat16) for layer in LAYERS] + others


def quantize_bytes(n: int, k: int, itemsize: int) -> float:
    """Count the bytes of a quantization.

    N K itemsize  read,  N K (1/2 + 1/B + 4 / (256 B))  written
    """
    return n * k * itemsize + nf4_bytes(n, k)


def _empty(matrix: Tensor) -> NF4Weight:
    n, k = matrix.shape
    return empty_weight((n,), k, BLOCK_SIZE, True, matrix.device)


def quantize_unchecked(matrix: Tensor) -> NF4Weight:
    """Run the kernels alone."""
    weight = _empty(matrix)
    _launch_nf4_quantize(weight, matrix)
    return weight


def quantize_checked(matrix: Tensor) -> NF4Weight:
    """Run the public function."""
    weight = _empty(matrix)
    nf4_quantize_member(weight, 0, matrix, "weight")
    return weight


def quantize_reference(matrix: Tensor) -> NF4Weight:
    """Run the reference."""
    weight = _empty(matrix)
    nf4_quantize_member_reference(weight, 0, matrix, "weight")
    return weight


def rows_of(layer: str, dtype: torch.dtype, machine: Machine) -> list[Row]:
    """Measure every provider on one layer."""
    n, k = LAYERS[layer]
    num_bytes = quantize_bytes(n, k, dtype.itemsize)
    work = Work("forward", layer, None, n, k, dtype, num_bytes, 0)
    num_sets = num_input_sets(num_bytes, num_bytes, machine.device)
    matrices = [
        (torch.randn(n, k, device=machine.device) * WEIGHT_STD).to(dtype) for _ in range(num_sets)
    ]
    unchecked = [partial(quantize_unchecked, matrix) for matrix in matrices]
    checked = [partial(quantize_checked, matrix) for matrix in matrices]
    reference = [partial(quantize_reference, matrix) for matrix in matrices]
    candidates = [
        Candidate(work, "ours", Operation(unchecked)),
        Candidate(work, "ours-checked", Operation(checked, captured=False)),
        Candidate(work, "torch", Operation(reference, captured=False)),
    ]
    if machine.peer:
        theirs = [partial(machine.peer.quantize, matrix) for matrix in matrices]
        candidates.insert(2, Candidate(work, "bitsandbytes", Operation(theirs, captured=False)))
    return [limit_row(work, machine), *measured_rows(candidates, machine)]


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for layer, dtype in shapes():
        rows += rows_of(layer, dtype, machine)
        print(f"measured {layer} {dtype}", flush=True)
    return Result(rows, {}, aligned(*bandwidth_table(rows)))


if __name__ == "__main__":
    sys.exit(main("nf4_quantize", run))
