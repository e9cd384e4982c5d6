"""Measure the normalization of rows: ours, torch, torch.compile, a copy's bandwidth.

    python -m benchmarks rms_norm --json benchmarks/results/rms_norm.h100.json

Bandwidth is the limit. Ours is the kernel alone; torch is the reference, backward through autograd.
`post_attention_layernorm` adds the residual, forward; backward, both add the gradient of the
residual stream. As a layer does, ours writes y again in the same pass (`backward-y`), over grad_y,
and the gradient over that of the residual stream; the others run forward too, on r, and write new
tensors, which moves as many bytes.
"""

import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.command import Machine, Result, Work, main
from benchmarks.layer_operations import (
    HIDDEN_SIZE,
    NUM_ROWS,
    Provided,
    backward_calls,
    both_calls,
    forward_calls,
    rows_of,
)
from benchmarks.measure import num_input_sets
from benchmarks.tables import Row, aligned, operation_table
from kernels.rms_norm import _launch_rms_norm, rms_norm_reference
from kernels.rms_norm_backward import _launch_rms_norm_backward

EPS = 1e-5
INPUT, POST_ATTENTION = "llama-3-8b.input_layernorm", "llama-3-8b.post_attention_layernorm"


def shapes() -> list[tuple[str, int, torch.dtype]]:
    """List what is measured: the norm, rows and dtype."""
    return [(layer, m, torch.bfloat16) for layer in (INPUT, POST_ATTENTION) for m in NUM_ROWS]


def forward_bytes(m: int, width: int, itemsize: int, has_residual: bool) -> float:
    """Count the bytes of a normalization: 2 M D S + 4 M; with a residual 4 M D S + 4 M."""
    return (4 if has_residual else 2) * m * width * itemsize + 4 * m


def backward_bytes(m: int, width: int, itemsize: int) -> float:
    """Count the bytes of its gradient, with the residual stream's and y again: 5 M D S + 4 M."""
    return 5 * m * width * itemsize + 4 * m


def measure_norm(
    layer: str, m: int, dtype: torch.dtype, machine: Machine, width: int = HIDDEN_SIZE
) -> list[Row]:
    """Measure one norm, forward and back."""
    has_residual = layer == POST_ATTENTION
    forward = forward_bytes(m, width, dtype.itemsize, has_residual)
    backward = backward_bytes(m, width, dtype.itemsize)
    # the reference's graph keeps float32 copies
    num_sets = num_input_sets(min(forward, backward), 12 * backward, machine.device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=machine.device).to(dtype)

    weight = draw(width)
    sets = [
        (draw(m, width), weight, EPS, draw(m, width) if has_residual else None)
        for _ in range(num_sets)
    ]
    grads = [(draw(m, width), draw(m, width)) for _ in range(num_sets)]
    compiled = torch.compile(rms_norm_reference, dynamic=False)
    work = Work("forward", layer, m, width, width, dtype, forward, 0)
    ours = [partial(_launch_rms_norm, *arguments) for arguments in sets]
    provided = Provided(
        ours, forward_calls(rms_norm_reference, sets), forward_calls(compiled, sets)
    )
    rows = rows_of(work, provided, machine)
    work = Work("backward-y", layer, m, width, width, dtype, backward, 0)
    saved = [_launch_rms_norm(*arguments)[1:] for arguments in sets]
    # their own, because they are written over: r's gradient grows from call to call, by no more
    # than the norm's of y itself
    ours = [
        partial(_launch_rms_norm_backward, grad_y, grad_r, r, rstd, weight, grad_r, grad_y)
        for (grad_y, grad_r), (r, rstd) in zip(
            [(grad_y.clone(), grad_r.clone()) for grad_y, grad_r in grads], saved, strict=True
        )
    ]
    again = [(r.detach(), weight, EPS, None) for r, _ in saved]
    for x, _, _, residual in sets:
        x.requires_grad_()
        if residual is not None:
            residual.requires_grad_()
    provided = Provided(
        ours,
        both_calls(
            backward_calls(rms_norm_reference, sets, grads),
            forward_calls(rms_norm_reference, again),
        ),
        both_calls(backward_calls(compiled, sets, grads), forward_calls(compiled, again)),
    )
    return rows + rows_of(work, provided, machine)


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for layer, m, dtype in shapes():
        rows += measure_norm(layer, m, dtype, machine)
        print(f"measured {layer} of {m} rows", flush=True)
    return Result(rows, {}, aligned(*operation_table(rows)))


if __name__ == "__main__":
    sys.exit(main("rms_norm", run))
