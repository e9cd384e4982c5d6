"""Measure the ways of tokens to their experts and back: ours, torch, torch.compile, a copy.

    python -m benchmarks expert_rows --json benchmarks/results/expert_rows.h100.json

Bandwidth is the limit: a token's row is read or written once, each of its experts' rows once. For
the gradients of weighted rows, two rows of an expert are read and one is written.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.command import Machine, Result, Work, main
from benchmarks.layer_operations import NUM_ROWS, Provided, forward_calls, rows_of
from benchmarks.measure import num_input_sets
from benchmarks.tables import Row, aligned, operation_table
from kernels.expert_rows import (
    combine_expert_rows,
    combine_expert_rows_reference,
    gather_expert_rows,
    gather_expert_rows_reference,
    weigh_expert_rows_backward,
    weigh_expert_rows_backward_reference,
)

# of Qwen3-30B-A3B: the experts of a token, and the widths of their inputs and of what is gated
NUM_CHOSEN = 8
HIDDEN_SIZE, INTERMEDIATE_SIZE = 2048, 768
DTYPE = torch.bfloat16


class Measured(NamedTuple):
    """One of the operations."""

    mode: str
    width: int
    # that are read or written
    num_rows: int
    ours: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    draw: Callable[[], Sequence[Any]]


def operations_over(m: int, k: int, device: torch.device) -> list[Measured]:
    """List the operations over m tokens with k experts each."""
    places = torch.randperm(m * k, device=device).view(m, k)
    weights = torch.rand(m, k, device=device)

    def rows(count: int, width: int) -> Tensor:
        return torch.randn(count, width, dtype=DTYPE, device=device)

    D, F = HIDDEN_SIZE, INTERMEDIATE_SIZE
    return [
        Measured(
            "gather",
            D,
            m + m * k,
            gather_expert_rows,
            gather_expert_rows_reference,
            lambda: (rows(m, D), places),
        ),
        Measured(
            "combine",
            D,
            m + m * k,
            combine_expert_rows,
            combine_expert_rows_reference,
            lambda: (rows(m * k, D), places, weights),
        ),
        Measured(
            "weigh-backward",
            F,
            3 * m * k,
            weigh_expert_rows_backward,
            weigh_expert_rows_backward_reference,
            lambda: (rows(m * k, F), rows(m * k, F), places, weights),
        ),
    ]


def measure_expert_rows(operation: Measured, m: int, k: int, machine: Machine) -> list[Row]:
    """Measure one operation by every provider."""
    num_bytes = operation.num_rows * operation.width * DTYPE.itemsize
    work = Work(operation.mode, "qwen3-30b-a3b.experts", m, operation.width, k, DTYPE, num_bytes, 0)
    sets = [operation.draw() for _ in range(num_input_sets(num_bytes, num_bytes, machine.device))]
    compiled = torch.compile(operation.reference, dynamic=False)
    functions = (operation.ours, operation.reference, compiled)
    return rows_of(work, Provided(*(forward_calls(f, sets) for f in functions)), machine)


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for m in NUM_ROWS:
        for operation in operations_over(m, NUM_CHOSEN, machine.device):
            rows += measure_expert_rows(operation, m, NUM_CHOSEN, machine)
    return Result(rows, {}, aligned(*operation_table(rows)))


if __name__ == "__main__":
    sys.exit(main("expert_rows", run))
