"""Multiply rows by a frozen weight, both in 8 bits, and add the low-rank update in 16 bits.

    y = scales[:, None] * w_scales * (x W^T) + h B^T + bias

    x   | BLOCK_M rows | . . . .      W   | BLOCK_N rows | . . . .     in E4M3 or INT8
    h   | BLOCK_M rows | T |          B   | BLOCK_N rows | T |         in 16 bits, at the end

The frozen base takes half of the time that it takes in 16 bits; the update, of which the gradients
are, is not rounded to 8. Its product goes into the same float32 sums after they are scaled, so y is
written once and never read, and no scale of the base touches the update. The same kernel computes
grad_x = scales * scale * (grad_y W) + grad_h A, from W's transpose as E4M3 rows and A's transpose,
which may be a view.

2 M N (K + T) FLOPs, of which the tensor cores do the first part twice as fast as in 16 bits, and
M K + N K + 2 M N + 2 T (M + N) bytes. On Hopper the sums of E4M3 products keep about 14 bits within
a tensor core; next to the 3.7 % that rounding the operands costs, that is nothing. Those of INT8
are exact in 32 bits, up to 133,144 columns.

Tiles come and go by TMA, which reads zeros beyond a matrix and writes nothing there, in tensors
that begin and step by multiples of 16 bytes. There are as many programs as multiprocessors, for
INT8 twice as many; each computes tile after tile, so a tile's second half is still written while
the next one is multiplied. Other GPUs, with the products of a warp, load tiles by pointers:
`matmul_8bit_pointers.py`.
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false

import torch
from torch import Tensor

from kernels.checks import (
    check_is,
    check_one_device,
    check_rows_are_apart,
    check_rows_are_contiguous,
)
from kernels.device import properties
from kernels.fp8 import (
    ALIGNMENT,
    E4M3,
    Fp8Rows,
    LowRankTail,
    fp8_obstacle,
    shape_obstacle,
)
from kernels.language import TensorDescriptor, tl, triton
from kernels.launch import cdiv, launch
from kernels.matmul_8bit_pointers import launch_matmul_8bit_pointers
from kernels.matmul_8bit_tiles import GROUP_M, load_bias, scaled, scales_of, tile_of, zero_sums
from kernels.rotation import INT8, EightBitRows, EightBitWeight

# of y and of the low-rank update
DTYPES = (torch.bfloat16, torch.float16)
# compute capabilities whose products take whole tiles from shared memory
TILES_FROM, TILES_BEFORE = (9, 0), (12, 0)
BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_T = 128, 256, 128, 64
# Triton awaits each product of INT8 before the next one: two programs fill each other's gaps
INT8_BLOCK_N, INT8_PROGRAMS = 128, 2
NUM_WARPS = 8
# tiles of x and W under way: 144 KB of the 227 KB of shared memory
NUM_STAGES = 3


def matmul_8bit_reference(
    x: EightBitRows,
    w: EightBitWeight,
    out: Tensor,
    tail: LowRankTail | None,
    bias: Tensor | None,
) -> None:
    """Add up in float32, rounded once; sums of INT8 beyond 2^24 are not exact here."""
    y = x.values.float() @ w.values.float().T * x.scales[:, None] * scales_of(w)
    if tail is not None:
        y += tail.h.float() @ tail.B.float().T
    if bias is not None:
        y += bias.float()
    out.copy_(y)


# any number of rows, one compilation
@triton.jit(do_not_specialize=["M"])
def _matmul_8bit_kernel(
    y_tiles,  # of (M, N)
    x_tiles,  # of (M, K) E4M3 or INT8
    w_tiles,  # of (N, K), in x's dtype
    scales_ptr,  # (M,) float32
    w_scales_ptr,  # () float32, or (N,)
    h_tiles,  # of (M, T)
    B_tiles,  # of (N, T), or of (T, N)
    bias_ptr,  # (N,)
    M,
    N,
    K,
    IS_INT8: tl.constexpr,
    NUM_TAILS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_B_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # one program computes every so many-th (BLOCK_M, BLOCK_N) tile of y
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        first_m, first_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        acc = zero_sums(BLOCK_M, BLOCK_N, IS_INT8)
        for k in range(0, K, BLOCK_K):
            x = x_tiles.load([first_m, k])
            w = w_tiles.load([first_n, k])
            acc = tl.dot(x, w.T, acc, out_dtype=acc.dtype)
        acc = scaled(acc, scales_ptr, w_scales_ptr, offs_m, offs_n, M, N, IS_INT8)
        for tail in tl.static_range(NUM_TAILS):
            h = h_tiles.load([first_m, tail * BLOCK_T])
            if IS_B_TRANSPOSED:
                B = B_tiles.load([tail * BLOCK_T, first_n])
            else:
                B = B_tiles.load([first_n, tail * BLOCK_T]).T
            acc = tl.dot(h, B, acc)
        if HAS_BIAS:
            acc += load_bias(bias_ptr, offs_n, N)
        # half by half, in half of the shared memory
        halves = tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)).permute(0, 2, 1)
        left, right = tl.split(halves)
        y_tiles.store([first_m, first_n], left.to(y_tiles.dtype))
        y_tiles.store([first_m, first_n + BLOCK_N // 2], right.to(y_tiles.dtype))


def _launch_matmul_8bit(
    x: EightBitRows,
    w: EightBitWeight,
    out: Tensor,
    tail: LowRankTail | None,
    bias: Tensor | None,
    num_programs: int,
) -> None:
    (M, K), N = x.values.shape, w.values.shape[0]
    is_int8, w_scales = x.values.dtype == INT8, scales_of(w)
    block_n = INT8_BLOCK_N if is_int8 else BLOCK_N
    if is_int8:
        num_programs *= INT8_PROGRAMS
    x_tiles = TensorDescriptor.from_tensor(x.values, [BLOCK_M, BLOCK_K])
    # any tiles stand for those that are not read
    h_tiles = B_tiles = x_tiles
    is_B_transposed = tail is not None and not _has_rows(tail.B)
    if tail is not None:
        h_tiles = TensorDescriptor.from_tensor(tail.h, [BLOCK_M, BLOCK_T])
        if is_B_transposed:
            B_tiles = TensorDescriptor.from_tensor(tail.B.T, [BLOCK_T, block_n])
        else:
            B_tiles = TensorDescriptor.from_tensor(tail.B, [block_n, BLOCK_T])
    num_tiles = cdiv(M, BLOCK_M) * cdiv(N, block_n)
    launch(
        _matmul_8bit_kernel,
        (min(num_tiles, num_programs),),
        y_tiles=TensorDescriptor.from_tensor(out, [BLOCK_M, block_n // 2]),
        x_tiles=x_tiles,
        w_tiles=TensorDescriptor.from_tensor(w.values, [block_n, BLOCK_K]),
        scales_ptr=x.scales,
        w_scales_ptr=w_scales,
        h_tiles=h_tiles,
        B_tiles=B_tiles,
        bias_ptr=w_scales if bias is None else bias,
        M=M,
        N=N,
        K=K,
        IS_INT8=is_int8,
        NUM_TAILS=cdiv(tail.h.shape[1], BLOCK_T) if tail else 0,
        HAS_BIAS=bias is not None,
        IS_B_TRANSPOSED=is_B_transposed,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        BLOCK_T=BLOCK_T,
        GROUP_M=GROUP_M,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        # multiply-adds round less
        enable_fp_fusion=True,
    )


def _has_rows(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1


def _check_aligned(name: str, matrix: Tensor) -> None:
    step = matrix.stride(0) * matrix.element_size()
    if step % ALIGNMENT or matrix.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"{name} must have rows that begin at multiples of {ALIGNMENT} bytes: got a step of "
            f"{step} bytes from address {matrix.data_ptr():#x}"
        )


def _check(
    x: EightBitRows,
    w: EightBitWeight,
    out: Tensor,
    tail: LowRankTail | None,
    bias: Tensor | None,
) -> None:
    (M, K), (N, K_of_w) = x.values.shape, w.values.shape
    if K_of_w != K or out.shape != (M, N) or out.dtype not in DTYPES:
        raise ValueError(
            f"for x of (M, K), {(M, K)}, W must be (N, K) and out (M, N) in bfloat16 or float16: "
            f"got {tuple(w.values.shape)} and {tuple(out.shape)} in {out.dtype}"
        )
    if obstacle := shape_obstacle(N, K):
        raise ValueError(obstacle)
    dtype = E4M3 if isinstance(x, Fp8Rows) else INT8
    check_is("x", x.values, dtype, (M, K))
    check_is("W", w.values, dtype, (N, K))
    check_is("the scales of x", x.scales, torch.float32, (M,))
    check_is("the scales of W", scales_of(w), torch.float32, () if dtype == E4M3 else (N,))
    matrices = {"x": x.values, "W": w.values, "out": out}
    others = {"the scales of x": x.scales, "the scales of W": scales_of(w)}
    if tail is not None:
        T = tail.h.shape[1]
        if not T or T % ALIGNMENT:
            raise ValueError(f"h must have columns, a multiple of {ALIGNMENT}: got {T}")
        check_is("h", tail.h, out.dtype, (M, T))
        check_is("B", tail.B, out.dtype, (N, T))
        matrices |= {"h": tail.h, "B": tail.B if _has_rows(tail.B) else tail.B.T}
    if bias is not None:
        check_is("the bias", bias, out.dtype, (N,))
        others["the bias"] = bias
    for name, tensor in others.items():
        check_rows_are_contiguous(name, tensor.view(-1))
    for name, matrix in matrices.items():
        check_rows_are_contiguous(name, matrix)
        _check_aligned(name, matrix)
    check_rows_are_apart("out", out)
    check_one_device(matrices | others)


def matmul_8bit(
    x: EightBitRows,  # (M, K)
    w: EightBitWeight,  # (N, K)
    out: Tensor,  # (M, N) bfloat16 or float16, written
    tail: LowRankTail | None = None,  # in out's dtype
    bias: Tensor | None = None,  # (N,), in out's dtype
) -> None:
    """Multiply rows by a weight, both in E4M3 or in INT8, and add a low-rank update in 16 bits.

        out = x.scales[:, None] * w_scales * (x.values w.values^T) + tail.h tail.B^T + bias

    Args:
        out: may be the first columns of wider rows, as may the values and the tail's h and B.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; N, K or the tail's columns are no
            multiples of 16; or a matrix's rows are not contiguous or do not begin at multiples of
            16 bytes.
        RuntimeError: the operands are in E4M3, and the GPU has no FP8 products.
    """
    _check(x, w, out, tail, bias)
    if out.device.type == "cpu":
        matmul_8bit_reference(x, w, out, tail, bias)
        return
    gpu = properties(out.device)
    if isinstance(x, Fp8Rows) and (obstacle := fp8_obstacle(gpu.capability)):
        raise RuntimeError(obstacle)
    if not out.shape[0]:
        return
    if TILES_FROM <= gpu.capability < TILES_BEFORE:
        _launch_matmul_8bit(x, w, out, tail, bias, gpu.num_multiprocessors)
    else:
        launch_matmul_8bit_pointers(x, w, out, tail, bias)
