"""Multiply rows by a weight in 8 bits on GPUs whose products are those of a warp (8.x, 12.x).

The equation, the arguments and the result are those of `matmul_8bit.py`. Tiles of x and W come by
pointers, copied asynchronously (`cp.async`), since 8.x knows no TMA and tiles by TMA take more
registers on 12.x than there are. Rows beyond a matrix repeat its last one, and are not stored.
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false

from torch import Tensor

from kernels.fp8 import LowRankTail
from kernels.language import tl, triton
from kernels.launch import cdiv, launch
from kernels.matmul_8bit_tiles import GROUP_M, load_bias, scaled, scales_of, tile_of, zero_sums
from kernels.rotation import INT8, EightBitRows, EightBitWeight

BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_T = 128, 128, 64, 64
NUM_WARPS = 8
# what fits the 99 KB of shared memory with room for a second program
NUM_STAGES = 3


# any number of rows, one compilation
@triton.jit(do_not_specialize=["M"])
def _matmul_8bit_pointers_kernel(
    y_ptr,  # (M, N)
    x_ptr,  # (M, K) E4M3 or INT8
    w_ptr,  # (N, K), in x's dtype
    scales_ptr,  # (M,) float32
    w_scales_ptr,  # () float32, or (N,)
    h_ptr,  # (M, T)
    B_ptr,  # (N, T)
    bias_ptr,  # (N,)
    M,
    N,
    K,
    T,
    stride_ym,
    stride_xm,
    stride_wn,
    stride_hm,
    stride_bn,
    stride_bt,
    IS_INT8: tl.constexpr,
    NUM_TAILS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # one program computes a (BLOCK_M, BLOCK_N) tile of y
    first_m, first_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)[:, None]
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    x_ptrs = x_ptr + rows_m * stride_xm + offs_k
    w_ptrs = w_ptr + rows_n[:, None] * stride_wn + offs_k
    acc = zero_sums(BLOCK_M, BLOCK_N, IS_INT8)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs + k, mask=offs_k < K - k, other=0.0)
        w = tl.load(w_ptrs + k, mask=offs_k < K - k, other=0.0)
        acc = tl.dot(x, w.T, acc, out_dtype=acc.dtype)
    acc = scaled(acc, scales_ptr, w_scales_ptr, offs_m, offs_n, M, N, IS_INT8)
    for tail in tl.static_range(NUM_TAILS):
        offs_t = tail * BLOCK_T + tl.arange(0, BLOCK_T)
        h = tl.load(h_ptr + rows_m * stride_hm + offs_t[None, :], (offs_t < T)[None, :], 0.0)
        B_ptrs = B_ptr + offs_t[:, None] * stride_bt + rows_n[None, :] * stride_bn
        B = tl.load(B_ptrs, (offs_t < T)[:, None], 0.0)
        acc = tl.dot(h, B, acc)
    if HAS_BIAS:
        acc += load_bias(bias_ptr, offs_n, N)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=inside)


def launch_matmul_8bit_pointers(
    x: EightBitRows,
    w: EightBitWeight,
    out: Tensor,
    tail: LowRankTail | None,
    bias: Tensor | None,
) -> None:
    """Launch the kernel on arguments that `matmul_8bit` has checked."""
    (M, K), N = x.values.shape, w.values.shape[0]
    w_scales = scales_of(w)
    # any tensor stands for one that is not read
    h, B = tail or LowRankTail(out, out)
    T = h.shape[1] if tail else 0
    launch(
        _matmul_8bit_pointers_kernel,
        (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),),
        y_ptr=out,
        x_ptr=x.values,
        w_ptr=w.values,
        scales_ptr=x.scales,
        w_scales_ptr=w_scales,
        h_ptr=h,
        B_ptr=B,
        bias_ptr=out if bias is None else bias,
        M=M,
        N=N,
        K=K,
        T=T,
        stride_ym=out.stride(0),
        stride_xm=x.values.stride(0),
        stride_wn=w.values.stride(0),
        stride_hm=h.stride(0),
        stride_bn=B.stride(0),
        stride_bt=B.stride(1),
        IS_INT8=x.values.dtype == INT8,
        NUM_TAILS=cdiv(T, BLOCK_T),
        HAS_BIAS=bias is not None,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        BLOCK_T=BLOCK_T,
        GROUP_M=GROUP_M,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        # multiply-adds round less
        enable_fp_fusion=True,
    )
