"""Measure what brings operands to 8 bits: ours, torch, a copy's bandwidth.

    python -m benchmarks rows_8bit --json benchmarks/results/rows_8bit.h200.json

In E4M3, and rotated in INT8: rows by themselves, a norm's and a gated layer's on the way, and the
weight of gate and up from NF4. Bandwidth is the limit. torch is the reference; the weight's looks
codes up on the host and is left out.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.command import Candidate, Machine, Result, Work, limit_row, main, measured_rows
from benchmarks.layer_operations import HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_ROWS
from benchmarks.layers import BLOCK_SIZE, WEIGHT_STD, nf4_bytes
from benchmarks.measure import Call, Operation, num_input_sets
from benchmarks.tables import Row, aligned, operation_table
from kernels.fp8 import E4M3
from kernels.glu import glu_reference
from kernels.glu_8bit import glu_8bit
from kernels.nf4_to_fp8 import fp8_scale, nf4_to_fp8
from kernels.nf4_to_int8 import int8_scales, nf4_to_int8
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.rotation import INT8
from kernels.rows_8bit import empty_8bit_rows, quantize_rows, quantize_rows_reference
from nf4.weight import empty_weight, quantize_member

DTYPE = torch.bfloat16
FORMATS = {"E4M3": E4M3, "INT8": INT8}
LAYER = "llama-3-8b.layer"


class Measured(NamedTuple):
    """One operation on one set of inputs: what it moves, ours, and torch's if there is one."""

    work: Work
    make: Callable[[], tuple[Call, Call | None]]


def work_of(mode: str, m: int | None, n: int, k: int, num_bytes: float) -> Work:
    return Work(mode, LAYER, m, n, k, DTYPE, num_bytes, 0)


def row_operations(name: str, m: int, D: int, F: int, device: torch.device) -> list[Measured]:
    """List what writes m rows in a format: M D values are read in 16 bits and written in 8."""
    format = FORMATS[name]

    def draw(width: int) -> Tensor:
        return torch.randn(m, width, device=device).to(DTYPE)

    def quantize(width: int) -> tuple[Call, Call]:
        x, out = draw(width), empty_8bit_rows((m, width), format, device)
        return lambda: quantize_rows(x, out), lambda: quantize_rows_reference(x, out)

    def normalize() -> tuple[Call, Call]:
        x, residual, weight, y = draw(D), draw(D), draw(D)[0], draw(D)
        out = empty_8bit_rows((m, D), format, device)

        def torchs() -> None:
            quantize_rows_reference(rms_norm_reference(x, weight, 1e-5, residual)[0], out)

        return lambda: rms_norm(x, weight, 1e-5, residual, y, in_8_bits=out), torchs

    def gate() -> tuple[Call, Call]:
        gate_up, h, out = draw(2 * F), draw(F), empty_8bit_rows((m, F), format, device)

        def torchs() -> None:
            quantize_rows_reference(glu_reference(gate_up, "silu"), out)

        return lambda: glu_8bit(gate_up, "silu", h, out), torchs

    # with the scales of rows, in 32 bits
    return [
        *(
            Measured(work_of(f"rows, {name}", m, w, w, 3 * m * w + 4 * m), lambda w=w: quantize(w))
            for w in (D, F)
        ),
        # x and the residual, and both sums: y, r
        Measured(work_of(f"norm, {name}", m, D, D, 9 * m * D + 8 * m), normalize),
        Measured(work_of(f"glu, {name}", m, F, 2 * F, 7 * m * F + 4 * m), gate),
    ]


def weight_operations(name: str, D: int, F: int, device: torch.device) -> list[Measured]:
    """List what expands the weight of gate and up to a format."""

    def expand(is_transposed: bool) -> tuple[Call, None]:
        weight = empty_weight((F, F), D, BLOCK_SIZE, True, device)
        for index in range(2):
            matrix = torch.randn(F, D, device=device) * WEIGHT_STD
            quantize_member(weight, index, matrix, LAYER)
        if FORMATS[name] == INT8:
            out, scales = torch.empty(2 * F, D, dtype=INT8, device=device), int8_scales(weight)
            return lambda: nf4_to_int8(weight, scales, out), None
        shape = (D, 2 * F) if is_transposed else (2 * F, D)
        values, scale = torch.empty(shape, dtype=E4M3, device=device), fp8_scale(weight)
        return lambda: nf4_to_fp8(weight, scale, is_transposed, values), None

    num_bytes = nf4_bytes(2 * F, D) + 2 * F * D
    work = work_of(f"weight, {name}", None, 2 * F, D, num_bytes)
    found = [Measured(work, lambda: expand(False))]
    if FORMATS[name] == E4M3:
        of_transpose = replace(work, mode=f"weight transposed, {name}")
        found.append(Measured(of_transpose, lambda: expand(True)))
    return found


def measure(measured: Measured, machine: Machine) -> list[Row]:
    """Measure one operation by every provider, each on inputs of its own set in turn."""
    work = measured.work
    num_sets = num_input_sets(work.num_bytes, work.num_bytes, machine.device)
    made = [measured.make() for _ in range(num_sets)]
    calls: dict[str, list[Call]] = {"ours": [], "torch": []}
    for ours, torchs in made:
        calls["ours"].append(ours)
        if torchs is not None:
            calls["torch"].append(torchs)
    candidates = [Candidate(work, name, Operation(own)) for name, own in calls.items() if own]
    return [limit_row(work, machine), *measured_rows(candidates, machine)]


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for name in FORMATS:
        operations = weight_operations(name, HIDDEN_SIZE, INTERMEDIATE_SIZE, machine.device)
        for m in NUM_ROWS:
            sizes = (m, HIDDEN_SIZE, INTERMEDIATE_SIZE)
            operations += row_operations(name, *sizes, machine.device)
        for operation in operations:
            rows += measure(operation, machine)
        print(f"measured {name}", flush=True)
    return Result(rows, {}, aligned(*operation_table(rows)))


if __name__ == "__main__":
    sys.exit(main("rows_8bit", run))
