"""Measure the gradients of h and B from that of y: ours, two products by torch, a copy's bandwidth.

    python -m benchmarks lora_gradient --json benchmarks/results/lora_gradient.h100.json

Bandwidth is the limit: grad_y is read once. torch is the reference, a product by cuBLAS for h's
gradient and one a member for B's.
"""

import sys

import torch

from benchmarks.command import Candidate, Machine, Result, Work, limit_row, main, measured_rows
from benchmarks.layer_operations import NUM_ROWS, forward_calls
from benchmarks.layers import GROUPS, LAYERS, WEIGHT_STD
from benchmarks.measure import Operation, num_input_sets
from benchmarks.tables import Row, aligned, operation_table
from kernels.lora_extension import Update
from kernels.lora_gradient import lora_gradient, lora_gradient_reference

RANK = 16
TAIL = 64
SCALING = 2.0
# rows of the members
MEASURED = {
    "llama-3-8b.qkv_proj": GROUPS["llama-3-8b.qkv_proj"][0],
    "llama-3-8b.o_proj": LAYERS["llama-3-8b.q_proj"][:1],
    "llama-3-8b.gate_up_proj": GROUPS["llama-3-8b.gate_up_proj"][0],
}


def lora_gradient_bytes(m: int, n: int, tail: int, rank: int, itemsize: int) -> float:
    """Count the bytes of a pass: y's gradient, h and its gradient, s B, and B's gradient twice."""
    return itemsize * (m * n + 2 * m * tail + n * tail) + 8 * n * rank


def updates_of(rows: tuple[int, ...], rank: int) -> tuple[Update, ...]:
    """Give every member of a group an update."""
    starts = [sum(rows[:index]) for index in range(len(rows))]
    return tuple(
        Update(y, slice(index * rank, (index + 1) * rank), y, SCALING)
        for index, y in enumerate(
            slice(start, start + count) for start, count in zip(starts, rows, strict=True)
        )
    )


def measure_lora_gradient(
    layer: str, rows: tuple[int, ...], m: int, dtype: torch.dtype, machine: Machine
) -> list[Row]:
    """Measure one group at one number of tokens."""
    n, updates = sum(rows), updates_of(rows, RANK)
    num_bytes = lora_gradient_bytes(m, n, TAIL, RANK, dtype.itemsize)
    work = Work("backward", layer, m, n, RANK, dtype, num_bytes, 0)

    def draw(num_rows: int, num_columns: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(num_rows, num_columns, device=machine.device) * std).to(dtype)

    sets = []
    for _ in range(num_input_sets(num_bytes, 2 * num_bytes, machine.device)):
        # as the layers have it: the gradient of h behind that of y
        grad_ext, sB = draw(m, n + TAIL), torch.zeros(n, TAIL, device=machine.device, dtype=dtype)
        for update in updates:
            sB[update.y, update.A] = draw(update.y.stop - update.y.start, RANK, WEIGHT_STD)
        grad_B = torch.zeros(n, RANK, device=machine.device)
        given = (grad_ext[:, :n], draw(m, TAIL), sB, grad_ext[:, n:], grad_B)
        sets.append((*given, updates))
    candidates = [
        Candidate(work, "ours", Operation(forward_calls(lora_gradient, sets))),
        Candidate(work, "torch", Operation(forward_calls(lora_gradient_reference, sets))),
    ]
    return [limit_row(work, machine), *measured_rows(candidates, machine)]


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for layer, members in MEASURED.items():
        for m in NUM_ROWS:
            rows += measure_lora_gradient(layer, members, m, torch.bfloat16, machine)
        print(f"measured {layer}", flush=True)
    return Result(rows, {}, aligned(*operation_table(rows)))


if __name__ == "__main__":
    sys.exit(main("lora_gradient", run))
