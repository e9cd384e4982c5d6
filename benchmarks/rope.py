"""Measure the rotation of queries and keys: ours, torch, torch.compile, a copy's bandwidth.

    python -m benchmarks rope --json benchmarks/results/rope.h100.json

Bandwidth is the limit. Ours is the kernel alone, forward in place; backward it gathers the
gradients of queries, keys and values into one buffer. torch is the reference, which rotates into
new tensors, and back through autograd, which ends in the same buffer.
"""

import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.command import Machine, Result, Work, main
from benchmarks.layer_operations import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_ROWS,
    Provided,
    backward_calls,
    forward_calls,
    rows_of,
)
from benchmarks.measure import num_input_sets
from benchmarks.tables import Row, aligned, operation_table
from kernels.rope import _launch_rope, rope_reference
from kernels.rope_backward import _launch_rope_backward
from kernels.rope_tables import RopeTables

LAYER = "llama-3-8b.qkv_proj"
THETA = 500_000.0


def shapes() -> list[tuple[int, torch.dtype]]:
    """List what is measured: rows and dtype."""
    return [(m, torch.bfloat16) for m in NUM_ROWS]


def _table_bytes(m: int, head_dim: int) -> float:
    # cosine and sine in float32
    return 8 * m * (head_dim // 2)


def forward_bytes(m: int, heads: tuple[int, int, int], itemsize: int) -> float:
    """Count the bytes of a rotation in place: 2 M (H + H_kv) head_dim S + 4 M head_dim."""
    num_heads, num_kv_heads, head_dim = heads
    return 2 * m * (num_heads + num_kv_heads) * head_dim * itemsize + _table_bytes(m, head_dim)


def backward_bytes(m: int, heads: tuple[int, int, int], itemsize: int) -> float:
    """Count the bytes of its gradient: 2 M (H + 2 H_kv) head_dim S + 4 M head_dim."""
    num_heads, num_kv_heads, head_dim = heads
    moved = 2 * m * (num_heads + 2 * num_kv_heads) * head_dim * itemsize
    return moved + _table_bytes(m, head_dim)


def measure_rope(
    m: int,
    dtype: torch.dtype,
    machine: Machine,
    heads: tuple[int, int, int] = (NUM_HEADS, NUM_KV_HEADS, HEAD_DIM),
) -> list[Row]:
    """Measure the rotation of one sequence, forward and back."""
    num_heads, num_kv_heads, head_dim = heads
    width = (num_heads + 2 * num_kv_heads) * head_dim
    forward = forward_bytes(m, heads, dtype.itemsize)
    backward = backward_bytes(m, heads, dtype.itemsize)
    # the reference's graph keeps float32 products
    num_sets = num_input_sets(forward, 12 * backward, machine.device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=machine.device).to(dtype)

    positions = torch.arange(m, device=machine.device)
    exponents = torch.arange(0, head_dim, 2, device=machine.device) / head_dim
    angles = positions[:, None] * THETA**-exponents
    tables = (positions[None], RopeTables(angles.cos(), angles.sin()))
    # the reference's own, which ours does not overwrite
    sets = [(draw(1, m, width), *tables, num_heads, num_kv_heads) for _ in range(num_sets)]
    buffers = [draw(1, m, width) for _ in range(num_sets)]
    # of attention, whose gradients lie token by token
    grads = [
        tuple(
            draw(1, m, num, head_dim).transpose(1, 2)
            for num in (num_heads, num_kv_heads, num_kv_heads)
        )
        for _ in range(num_sets)
    ]
    compiled = torch.compile(rope_reference, dynamic=False)
    work = Work("forward", LAYER, m, width, head_dim, dtype, forward, 0)
    ours = [partial(_launch_rope, qkv, *tables, num_heads, num_kv_heads) for qkv in buffers]
    provided = Provided(ours, forward_calls(rope_reference, sets), forward_calls(compiled, sets))
    rows = rows_of(work, provided, machine)
    work = Work("backward", LAYER, m, width, head_dim, dtype, backward, 0)
    for arguments in sets:
        arguments[0].requires_grad_()
    provided = Provided(
        [partial(_launch_rope_backward, *grad, *tables) for grad in grads],
        backward_calls(rope_reference, sets, grads),
        backward_calls(compiled, sets, grads),
    )
    return rows + rows_of(work, provided, machine)


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for m, dtype in shapes():
        rows += measure_rope(m, dtype, machine)
        print(f"measured {m} rows", flush=True)
    return Result(rows, {}, aligned(*operation_table(rows)))


if __name__ == "__main__":
    sys.exit(main("rope", run))
