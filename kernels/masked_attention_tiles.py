"""The tiles of attention's kernels: how large they are for a GPU, how they are read and written.

A tile holds BLOCK_M queries or BLOCK_N keys of one head, whose width is filled up to HEAD, a power
of two. CONFIGS says which sizes are taken; kernels/README.md has the measurements behind them.
"""

# triton's annotations do not know that tensors have numbers' operators and methods
# pyright: reportAttributeAccessIssue=false

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.device import Properties
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
MIN_HEAD = 64
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


def padded_width(head_dim: int) -> int:
    """Round a head's width up to that of a tile."""
    return max(next_power_of_2(head_dim), MIN_HEAD)


def tiles_of(head_dim: int, dtype: torch.dtype, gpu: Properties) -> Tiles | None:
    """Find the tiles for heads so wide; None: this GPU has no room for any."""
    kind = (padded_width(head_dim), dtype.itemsize)
    fitting = (configs for least, configs in CONFIGS.items() if gpu.shared_bytes >= least)
    return next((configs[kind] for configs in fitting if kind in configs), None)


def check_head_dim(head_dim: int, dtype: torch.dtype, gpu: Properties) -> None:
    """Refuse heads that a GPU has no tiles for.

    Raises:
        ValueError: they are too wide for this dtype on this GPU.
    """
    if tiles_of(head_dim, dtype, gpu):
        return
    kinds = [
        kind for least, kinds in CONFIGS.items() if gpu.shared_bytes >= least for kind in kinds
    ]
    widest = max((width for width, size in kinds if size == dtype.itemsize), default=0)
    in_16_bits = tiles_of(head_dim, torch.float16, gpu)
    name = str(dtype).removeprefix("torch.")
    raise ValueError(
        f"the heads of attention must be at most {widest} numbers wide in {name} on this GPU: got "
        f"{head_dim:,}; choose {'--dtype float16 or bfloat16' if in_16_bits else '--device cpu'}"
    )


def empty_heads(like: Tensor) -> Tensor:
    """Make a (B, H, T, E) tensor in which the heads of a token lie side by side."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )
