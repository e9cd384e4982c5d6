"""Measure the expansion of NF4 weights: ours, bitsandbytes, plain torch and a copy's bandwidth.

    python -m benchmarks nf4_dequantize --json benchmarks/results/nf4_dequantize.h100.json

Bandwidth is the limit: the NF4 bytes are read and the expanded ones written, once each. The
reference copies its tables from the host, so Python issues its calls; the others are captured.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bitsandbytes_peer import Bitsandbytes
from benchmarks.command import Candidate, Machine, Result, Work, limit_row, main, measured_rows
from benchmarks.layers import BLOCK_SIZE, GROUPS, LAYERS, WEIGHT_STD, nf4_bytes
from benchmarks.measure import Operation, num_input_sets
from benchmarks.tables import Row, aligned, bandwidth_table
from kernels.nf4_dequantize import nf4_dequantize, nf4_dequantize_reference
from nf4.weight import NF4Weight, empty_weight, quantize_member


@dataclass(frozen=True)
class Shape:
    """A weight that is expanded: rows of its members, columns, and the dtype it expands to."""

    layer: str
    rows: tuple[int, ...]
    in_features: int
    dtype: torch.dtype


def shapes() -> list[Shape]:
    """List what is measured: every layer and group in bf16, one layer in the other dtypes too."""
    layers = [Shape(name, (n,), k, torch.bfloat16) for name, (n, k) in LAYERS.items()]
    name = "llama-3-8b.gate_proj"
    n, k = LAYERS[name]
    dtypes = [Shape(name, (n,), k, dtype) for dtype in (torch.float16, torch.float32)]
    groups = [Shape(name, rows, k, torch.bfloat16) for name, (rows, k) in GROUPS.items()]
    return layers + dtypes + groups


def dequantize_bytes(n: int, k: int, itemsize: int) -> float:
    """Count the bytes of an expansion: N K (1/2 + 1/B + 4 / (256 B)) read, N K itemsize written."""
    return nf4_bytes(n, k) + n * k * itemsize


def weight_and_theirs(
    shape: Shape, device: torch.device, peer: Bitsandbytes | None
) -> tuple[NF4Weight, list[tuple[Tensor, Any]]]:
    """Quantize random members as one weight, and each as bitsandbytes does."""
    weight = empty_weight(shape.rows, shape.in_features, BLOCK_SIZE, True, device)
    theirs = []
    for index, num_rows in enumerate(shape.rows):
        matrix = torch.randn(num_rows, shape.in_features, device=device) * WEIGHT_STD
        matrix = matrix.to(shape.dtype)
        quantize_member(weight, index, matrix, shape.layer)
        if peer:
            theirs.append(peer.quantize(matrix))
    return weight, theirs


def dequantize_members(peer: Bitsandbytes, members: list[tuple[Tensor, Any]]) -> list[Tensor]:
    # bitsandbytes has no groups: a call a member
    return [peer.dequantize(packed, state) for packed, state in members]


def rows_of(shape: Shape, machine: Machine) -> list[Row]:
    """Measure every provider on one weight."""
    n, k, dtype = sum(shape.rows), shape.in_features, shape.dtype
    num_bytes = dequantize_bytes(n, k, dtype.itemsize)
    work = Work("forward", shape.layer, None, n, k, dtype, num_bytes, 0)
    # with bitsandbytes' copy of the weight
    num_sets = num_input_sets(num_bytes, num_bytes + nf4_bytes(n, k), machine.device)
    made = [weight_and_theirs(shape, machine.device, machine.peer) for _ in range(num_sets)]
    ours = [partial(nf4_dequantize, weight, dtype) for weight, _ in made]
    reference = [partial(nf4_dequantize_reference, weight, dtype) for weight, _ in made]
    candidates = [
        Candidate(work, "ours", Operation(ours)),
        Candidate(work, "torch", Operation(reference, captured=False)),
    ]
    if machine.peer:
        theirs = [partial(dequantize_members, machine.peer, members) for _, members in made]
        candidates.insert(1, Candidate(work, "bitsandbytes", Operation(theirs)))
    return [limit_row(work, machine), *measured_rows(candidates, machine)]


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for shape in shapes():
        rows += rows_of(shape, machine)
        print(f"measured {shape.layer} {shape.dtype}", flush=True)
    return Result(rows, {}, aligned(*bandwidth_table(rows)))


if __name__ == "__main__":
    sys.exit(main("nf4_dequantize", run))
