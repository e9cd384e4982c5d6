"""What the FP8 products share on every GPU: which tile a program computes, and how it ends.

tiles of y    0  2  4 | 8 10 12       GROUP_M rows of tiles go column by column: programs that
              1  3  5 | 9 11 13       run at the same time read few rows of x and of W, and
                                      find most of them in the L2 cache
"""

from kernels.language import tl, triton

GROUP_M = 8


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    # the first row and the first column of the program's tile
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    place = program % (GROUP_M * tiles_n)
    return (first_m + place % group_m) * BLOCK_M, place // group_m * BLOCK_N


@triton.jit
def scaled(acc, scales_ptr, scale_ptr, offs_m, M):
    scales = tl.load(scales_ptr + offs_m, mask=offs_m < M, other=0.0) * tl.load(scale_ptr)
    return acc * scales[:, None]


@triton.jit
def store_tile(y_ptr, acc, bias_ptr, offs_m, offs_n, M, N, stride_ym, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=inside)
