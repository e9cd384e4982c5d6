"""The tiles of attention's kernels: how large they are for a GPU, how they are read and written.

A tile holds BLOCK_M queries or BLOCK_N keys of one head, whose width is filled up to HEAD, a power
of two. CONFIGS says which sizes are taken; kernels/README.md has the measurements behind them.
"""

# triton's annotations do not know that tensors have numbers' operators and methods
# pyright: reportAttributeAccessIssue=false

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.device import properties
from kernels.language import tl, triton
from kernels.launch import next_power_of_2


class Tile(NamedTuple):
    """Queries and keys of a tile, and the warps of the program that works on it."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of the three kernels."""

    out: Tile
    grad_q: Tile
    grad_kv: Tile


# by the least bytes of shared memory that a program must have, the most first; then by the width of
# a head, to a power of two, and bytes of a value. Where not said they spill nothing, or 16 to 48
# bytes of a thread on sm_120 and under Triton 3.6; wider tiles are slower for heads of 128
CONFIGS = {
    227 << 10: {
        (256, 2): Tiles(Tile(64, 16, 4, 4), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    99 << 10: {
        (64, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
        (128, 2): Tiles(Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 3)),
        (256, 2): Tiles(Tile(64, 16, 4, 4), Tile(32, 64, 8, 1), Tile(32, 32, 8, 1)),
        # of Gemma-4; compiled, and not measured yet
        (512, 2): Tiles(Tile(32, 16, 8, 2), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
        (64, 4): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (128, 4): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
        # spills: its products are unrolled over the head
        (256, 4): Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    # of sm_75, for which Triton knows no tensor cores: its products are unrolled in any dtype
    64 << 10: {
        (64, 2): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (128, 2): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        # the gradients spill
        (256, 2): Tiles(Tile(32, 16, 16, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
        (512, 2): Tiles(Tile(16, 16, 8, 1), Tile(8, 16, 8, 1), Tile(16, 8, 8, 1)),
        (64, 4): Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        (128, 4): Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
        # the queries' gradient spills
        (256, 4): Tiles(Tile(16, 16, 8, 1), Tile(8, 16, 8, 1), Tile(16, 8, 8, 1)),
    },
}
MIN_HEAD, MAX_HEAD = 64, 512
# of float32, which is there for trials: no tensor cores
PRECISION = tl.constexpr("ieee")


@triton.jit
def load_tile(ptr, offs, num_rows, stride, HEAD_DIM: tl.constexpr, HEAD: tl.constexpr):
    column = tl.arange(0, HEAD)[None, :]
    mask = (offs[:, None] < num_rows) & (column < HEAD_DIM)
    return tl.load(ptr + offs[:, None].to(tl.int64) * stride + column, mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, tile, offs, num_rows, stride, HEAD_DIM: tl.constexpr, HEAD: tl.constexpr):
    column = tl.arange(0, HEAD)[None, :]
    mask = (offs[:, None] < num_rows) & (column < HEAD_DIM)
    place = ptr + offs[:, None].to(tl.int64) * stride + column
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=mask)


def tiles_of(heads: Tensor) -> tuple[int, Tiles]:
    """Find a head's width to a power of two, and the tiles for it.

    Raises:
        RuntimeError: there are none for heads so wide in this dtype on this GPU.
    """
    head = max(next_power_of_2(heads.shape[3]), MIN_HEAD)
    kind = (head, heads.element_size())
    shared_bytes = properties(heads.device).shared_bytes
    fitting = [
        configs[kind]
        for least, configs in CONFIGS.items()
        if shared_bytes >= least and kind in configs
    ]
    if not fitting:
        raise RuntimeError(
            f"heads of {heads.shape[3]} numbers in {heads.dtype} have no tiles for this GPU, whose "
            f"programs have {shared_bytes:,} bytes of shared memory; use --dtype bfloat16 or "
            "float16"
        )
    return head, fitting[0]


def empty_heads(like: Tensor) -> Tensor:
    """Make a (B, H, T, E) tensor in which the heads of a token lie side by side."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )
