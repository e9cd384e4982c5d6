"""Divide the rows of experts into the tiles of a grouped product, on the device.

    expert 0     expert 1           rows of y, sorted by expert; an expert's first tile begins with
    | 0 1 | 2 |  | 3 4 | 5 |  ...   its first row, its last one may end beyond its last row
                                    ends = 3, 6, ...

How many rows an expert has is known to the device alone, so every program counts the tiles of all
experts itself: some hundred additions. The grid is sized by the most tiles that there can be.

Tiles are numbered expert after expert, so that the programs that run at a time share few experts'
weights, and within an expert in groups of GROUP_M tiles of rows, over all columns: neighbours read
the same rows and the same columns from the L2 cache.
"""

# triton's annotations do not know that tensors have numbers' operators and methods
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from typing import NamedTuple

from torch import Tensor

from kernels.language import tl, triton
from kernels.launch import cdiv

GROUP_M = tl.constexpr(8)
# triton moves 16 bytes at a time where addresses in bytes, and sizes and strides, are multiples
ALIGNMENT = 16


class Tile(NamedTuple):
    """The part of y that a program computes at a time, and how it is computed."""

    BLOCK_M: int
    BLOCK_N: int
    # of the columns that are summed over, at a time
    BLOCK_K: int
    num_warps: int
    num_stages: int


@triton.jit
def count_row_tiles(offsets_ptr, num_experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    # (BLOCK_E,), how many tiles of rows an expert and all before it have
    experts = tl.arange(0, BLOCK_E)
    mask = experts < num_experts
    starts = tl.load(offsets_ptr + experts, mask, 0)
    stops = tl.load(offsets_ptr + experts + 1, mask, 0)
    return tl.cumsum((stops - starts + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit
def find_tile(tile, ends, offsets_ptr, num_column_tiles, BLOCK_M: tl.constexpr):
    # the expert, the first row, the end of the expert's rows, and the place among the columns
    row_tile = tile // num_column_tiles
    expert = tl.sum((ends <= row_tile).to(tl.int32), 0)
    tile -= tl.max(tl.where(ends <= row_tile, ends, 0), 0) * num_column_tiles
    start = tl.load(offsets_ptr + expert)
    stop = tl.load(offsets_ptr + expert + 1)
    first = tile // (GROUP_M * num_column_tiles) * GROUP_M
    size = tl.minimum((stop - start + BLOCK_M - 1) // BLOCK_M - first, GROUP_M)
    tile = tile % (GROUP_M * num_column_tiles)
    return expert, start + (first + tile % size) * BLOCK_M, stop, tile // size


@triton.jit
def load_bias(bias_ptr, expert, offs_n, N):
    # (BLOCK_N,), of one expert, whose bias has N numbers
    bias = tl.load(bias_ptr + expert.to(tl.int64) * N + offs_n, offs_n < N, 0.0)
    return bias.to(tl.float32)


def is_aligned(*matrices: Tensor) -> bool:
    """Tell whether matrices can be moved 16 bytes at a time, to their last column."""
    return all(
        n % ALIGNMENT == 0
        for matrix in matrices
        for n in (matrix.data_ptr(), matrix.shape[-1], *matrix.stride()[:-1])
    )


def most_tiles(num_rows: int, num_experts: int, num_columns: int, tile: Tile) -> int:
    """Count the tiles that there are at most, whatever rows the experts have.

    Every expert with rows may have a tile that is not full.
    """
    row_tiles = num_rows // tile.BLOCK_M + min(num_experts, num_rows)
    return row_tiles * cdiv(num_columns, tile.BLOCK_N)
