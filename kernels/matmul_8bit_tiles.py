"""What the 8-bit products share on every GPU: where a tile of y lies, its scales and its bias.

tiles of y    0  2  4 | 8 10 12       GROUP_M rows of tiles go column by column: those under way
              1  3  5 | 9 11 13       at the same time read few rows of x and of W, and find
                                      most of them in the L2 cache
"""

from torch import Tensor

from kernels.fp8 import Fp8Weight
from kernels.language import tl, triton
from kernels.rotation import EightBitWeight

GROUP_M = 16


def scales_of(w: EightBitWeight) -> Tensor:  # () or (N,) float32
    """Find a weight's one scale, or those of its rows."""
    return w.scale if isinstance(w, Fp8Weight) else w.scales


@triton.jit
def tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    # the first row and the first column of a tile
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    place = tile % (GROUP_M * tiles_n)
    return (first_m + place % group_m) * BLOCK_M, place // group_m * BLOCK_N


@triton.jit
def zero_sums(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_INT8: tl.constexpr):
    # of INT8 exact ones
    if IS_INT8:
        return tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    else:
        return tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def scaled(acc, scales_ptr, w_scales_ptr, offs_m, offs_n, M, N, IS_INT8: tl.constexpr):
    scales = tl.load(scales_ptr + offs_m, mask=offs_m < M, other=0.0)
    if IS_INT8:
        w_scales = tl.load(w_scales_ptr + offs_n, mask=offs_n < N, other=0.0)
        return acc.to(tl.float32) * scales[:, None] * w_scales[None, :]
    else:
        return acc.to(tl.float32) * (scales * tl.load(w_scales_ptr))[:, None]


@triton.jit
def load_bias(bias_ptr, offs_n, N):  # (1, BLOCK_N)
    return tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
