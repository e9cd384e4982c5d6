"""Measure the gating of inner activations: ours, torch, torch.compile, a copy's bandwidth.

    python -m benchmarks glu --json benchmarks/results/glu.h100.json

Bandwidth is the limit. Ours is the kernel alone; torch is the reference, backward through autograd.
Backward, ours computes h again in the same pass (`backward-h`), for which the others run forward
too. It writes into new buffers here, so that every call finds the same numbers; in place it moves
as many bytes.
"""

import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.command import Machine, Result, Work, main
from benchmarks.layer_operations import (
    INTERMEDIATE_SIZE,
    NUM_ROWS,
    Provided,
    backward_calls,
    both_calls,
    forward_calls,
    rows_of,
)
from benchmarks.measure import num_input_sets
from benchmarks.tables import Row, aligned, operation_table
from kernels.glu import _launch_glu, _launch_glu_backward, glu_reference

# the other one's is as fast: the bytes are the same
ACTIVATION = "silu"
LAYER = "llama-3-8b.gate_up_proj"
# tensors of M F values that a pass reads and writes
TENSORS = {"forward": 3, "backward-h": 6}


def shapes() -> list[tuple[int, torch.dtype]]:
    """List what is measured: rows and dtype."""
    return [(m, torch.bfloat16) for m in NUM_ROWS]


def glu_bytes(mode: str, m: int, width: int, itemsize: int) -> float:
    """Count the bytes of a pass: 3 M F S forward, 6 M F S back, h included."""
    return TENSORS[mode] * m * width * itemsize


def gradient(grad_h: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Run the backward kernel into new buffers."""
    grad_gate_up, h = torch.empty_like(gate_up), torch.empty_like(grad_h)
    _launch_glu_backward(grad_h, gate_up, ACTIVATION, grad_gate_up, h)
    return grad_gate_up, h


def measure_glu(
    m: int, dtype: torch.dtype, machine: Machine, width: int = INTERMEDIATE_SIZE
) -> list[Row]:
    """Measure one gating, forward and back."""

    def work(mode: str) -> Work:
        num_bytes = glu_bytes(mode, m, width, dtype.itemsize)
        return Work(mode, LAYER, m, width, 2 * width, dtype, num_bytes, 0)

    num_bytes = work("forward").num_bytes
    num_sets = num_input_sets(num_bytes, 8 * num_bytes, machine.device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=machine.device).to(dtype)

    sets = [(draw(m, 2 * width),) for _ in range(num_sets)]
    grads = [(draw(m, width),) for _ in range(num_sets)]
    reference = partial(glu_reference, activation=ACTIVATION)
    compiled = torch.compile(reference, dynamic=False)
    forward = Provided(
        forward_calls(partial(_launch_glu, activation=ACTIVATION), sets),
        forward_calls(reference, sets),
        forward_calls(compiled, sets),
    )
    rows = rows_of(work("forward"), forward, machine)
    pairs = [(grad_h, gate_up.detach()) for (gate_up,), (grad_h,) in zip(sets, grads, strict=True)]
    for (gate_up,) in sets:
        gate_up.requires_grad_()
    # without gradients, so that no graph is made
    detached = [(gate_up,) for _, gate_up in pairs]
    backward = Provided(
        [partial(gradient, *pair) for pair in pairs],
        both_calls(
            backward_calls(reference, sets, grads),
            forward_calls(reference, detached),
        ),
        both_calls(backward_calls(compiled, sets, grads), forward_calls(compiled, detached)),
    )
    return rows + rows_of(work("backward-h"), backward, machine)


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for m, dtype in shapes():
        rows += measure_glu(m, dtype, machine)
        print(f"measured {m} rows", flush=True)
    return Result(rows, {}, aligned(*operation_table(rows)))


if __name__ == "__main__":
    sys.exit(main("glu", run))
