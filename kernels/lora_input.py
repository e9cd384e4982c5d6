"""Copy an input to where a linear group reads it and compute h = x A^T on the way, on the GPU.

    out   | x 0 .. K-1 | h 0 .. R-1 | 0 .. |      (M, K + T)

    a program's   = = = = | . . . . | . . . .     tile by tile of BLOCK_K columns: stored, and
    BLOCK_M rows  = = = = | . . . . | . . . .     multiplied with A's columns    (R, BLOCK_M)
                                                  registers

A copy and a product would read x twice and write it once, 6 bytes a value in 16 bit; one pass moves
4. What the FLOPs, 2 M K R, take is a tenth of the bytes' time. The ranks are the rows of the tensor
cores' tiles, so that 16 of them fill one, and x lies where its tile was copied to.

Sums are float32 in the order of the columns, rounded once. A copy and a dense product serve GPUs
below compute capability 8.0, for which Triton knows no tensor cores, float32, and more ranks.

LoRA: Hu et al. 2021, section 4.1.
"""

import torch
from torch import Tensor

from kernels.checks import check_one_device, check_rows_are_apart, check_rows_are_contiguous
from kernels.device import TENSOR_CORES_FROM, properties
from kernels.language import tl, triton
from kernels.launch import cdiv, launch, next_power_of_2

# the most ranks, and the fewest rows of a product of tiles
MAX_RANKS = 64
LEAST_RANKS = 16
BLOCK_M = 32
BLOCK_K = 128
NUM_WARPS = 4
NUM_STAGES = 4


def extend_input_reference(
    x: Tensor,  # (M, K)
    A: Tensor,  # (R, K)
    out: Tensor,  # (M, K + T), written
) -> None:
    """Copy x, and multiply the copy."""
    K, R = x.shape[1], A.shape[0]
    out[:, :K] = x
    torch.mm(out[:, :K], A.T, out=out[:, K : K + R])
    out[:, K + R :] = 0


@triton.jit
def _extend_input_kernel(
    out_ptr,  # (M, K + T)
    x_ptr,  # (M, K)
    A_ptr,  # (R, K)
    M,
    K,
    R,
    T,
    stride_om,
    stride_xm,
    stride_ar,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # at least R
    BLOCK_T: tl.constexpr,  # at least T
):
    # one program copies BLOCK_M rows
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_M = (offs_m < M)[:, None]
    x_ptr += offs_m.to(tl.int64)[:, None] * stride_xm
    out_ptr += offs_m.to(tl.int64)[:, None] * stride_om
    offs_r = tl.arange(0, BLOCK_R)
    A_ptr += offs_r.to(tl.int64)[:, None] * stride_ar
    h = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)[None, :]
        in_K = offs_k < K
        x = tl.load(x_ptr + offs_k, in_M & in_K, 0.0)
        A = tl.load(A_ptr + offs_k, (offs_r < R)[:, None] & in_K, 0.0)
        tl.store(out_ptr + offs_k, x, in_M & in_K)
        h = tl.dot(A, tl.trans(x), h)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + K + offs_r[None, :], tl.trans(h).to(dtype), in_M & (offs_r < R)[None, :])
    offs_t = tl.arange(0, BLOCK_T)[None, :]
    rest = in_M & (offs_t >= R) & (offs_t < T)
    tl.store(out_ptr + K + offs_t, tl.zeros((BLOCK_M, BLOCK_T), dtype), rest)


def _launch_extend_input(x: Tensor, A: Tensor, out: Tensor) -> None:
    M, K = x.shape
    R, T = A.shape[0], out.shape[1] - K
    if M == 0:
        return
    launch(
        _extend_input_kernel,
        (cdiv(M, BLOCK_M),),
        out_ptr=out,
        x_ptr=x,
        A_ptr=A,
        M=M,
        K=K,
        R=R,
        T=T,
        stride_om=out.stride(0),
        stride_xm=x.stride(0),
        stride_ar=A.stride(0),
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K,
        BLOCK_R=max(next_power_of_2(R), LEAST_RANKS),
        BLOCK_T=next_power_of_2(T),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        # multiply-adds round less
        enable_fp_fusion=True,
    )


def _goes_in_one_pass(x: Tensor, num_ranks: int) -> bool:
    has_tensor_cores = properties(x.device).capability >= TENSOR_CORES_FROM
    return has_tensor_cores and x.dtype != torch.float32 and num_ranks <= MAX_RANKS


def _check(x: Tensor, A: Tensor, out: Tensor) -> None:
    M, K = x.shape
    if A.shape[1] != K or out.shape[0] != M or not 0 < A.shape[0] <= out.shape[1] - K:
        raise ValueError(
            f"for an input of (M, K), {(M, K)}, A must be (R, K) and out (M, K + T) with R in 1 .. "
            f"T: got {tuple(A.shape)} and {tuple(out.shape)}"
        )
    if not x.dtype == A.dtype == out.dtype:
        raise ValueError(
            f"the input, A and out must share a dtype: got {x.dtype}, {A.dtype} and {out.dtype}"
        )
    matrices = {"the input": x, "A": A, "out": out}
    for name, matrix in matrices.items():
        check_rows_are_contiguous(name, matrix)
    check_rows_are_apart("out", out)
    check_one_device(matrices)


def extend_input(
    x: Tensor,  # (M, K)
    A: Tensor,  # (R, K)
    out: Tensor,  # (M, K + T), written
) -> None:
    """Copy an input into the first columns of wider rows, and write its low-rank part behind it.

        out = [x | x A^T | 0]

    Args:
        x: may be the first columns of wider rows, as may A and out; shares no memory with out.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a row is not contiguous.
    """
    _check(x, A, out)
    if x.device.type == "cpu" or not _goes_in_one_pass(x, A.shape[0]):
        extend_input_reference(x, A, out)
    else:
        _launch_extend_input(x, A, out)
