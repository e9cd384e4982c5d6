"""Multiply by an NF4 weight: y = x W^T and its mirror for the backward pass, grad_x = grad_y W.

    x (M, K)  ---- tile (BLOCK_M, BLOCK_K) ----+
                                               tl.dot -> y (M, N), float32, rounded once
    W packed  -- decode (BLOCK_N, BLOCK_K) ----+
               in registers: the 16-bit weight never reaches memory

Reads 2 M K bytes of x and N K (1/2 + 1/B + 4 / (256 B)) of W, with B the block size: 0.516 bytes a
weight at 64, where a bf16 product reads 2. Writes 2 M N; 2 M N K FLOP. So the fused kernel wins
while the weight's bytes are the cost: few rows. It decodes the weight once per BLOCK_M rows; with
many rows that arithmetic is the cost, and expanding the weight once (N K * 2.516 bytes) for a dense
product is faster. `matmul_path` decides.

Weights are decoded exactly as `nf4_dequantize` does and rounded to x's dtype, so both paths
multiply by the same numbers and differ in the order of summation only. The product is that of QLoRA
section 3, "QLoRA", without the adapter's term.
"""

# triton's annotations know neither launch options nor static_range
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.nf4_decode import device_constant, load_weight_tile, member_table, scale_tensors
from kernels.nf4_dequantize import nf4_dequantize
from nf4.weight import NF4Weight, dequantize


def nf4_matmul_reference(x: Tensor, weight: NF4Weight) -> Tensor:
    """Multiply by the transpose of the expanded weight, accumulating in float32."""
    return (x.float() @ dequantize(weight, x.dtype).float().T).to(x.dtype)


def nf4_matmul_transposed_reference(grad_y: Tensor, weight: NF4Weight) -> Tensor:
    """Multiply by the expanded weight, accumulating in float32."""
    return (grad_y.float() @ dequantize(weight, grad_y.dtype).float()).to(grad_y.dtype)


# the most rows of x for which decoding inside the product beats expanding the weight first
FUSED_MAX_ROWS = 16

# the widest tile whose per-element addresses fit the registers on every target; one stage, for the
# same reason
BLOCK_M, BLOCK_KEPT, BLOCK_REDUCED = 16, 32, 64
NUM_WARPS = 8
NUM_STAGES = 1


@triton.jit
def _nf4_matmul_kernel(
    x_ptr,  # (M, REDUCED), row stride stride_xm
    y_ptr,  # (M, KEPT), contiguous
    packed_ptr,
    absmax_ptr,
    group_absmax_ptr,
    absmax_mean_ptr,
    levels_ptr,
    dynamic_map_ptr,
    member_table_ptr,
    M,
    N,
    K,
    stride_xm,
    NUM_MEMBERS: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # False: y = x W^T, reduced over K; True: y = x W, reduced over N
    BLOCK_M: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_REDUCED: tl.constexpr,
):
    # one program computes the (BLOCK_M, BLOCK_KEPT) tile of y at (pid_m, pid_kept)
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_kept = tl.program_id(0).to(tl.int64) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    mask_m = offs_m < M
    kept, reduced = (K, N) if TRANSPOSED else (N, K)
    acc = tl.zeros((BLOCK_M, BLOCK_KEPT), tl.float32)
    for start in range(0, reduced, BLOCK_REDUCED):
        offs_reduced = start + tl.arange(0, BLOCK_REDUCED).to(tl.int64)
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_reduced[None, :],
            mask=mask_m[:, None] & (offs_reduced < reduced)[None, :],
            other=0.0,
        )
        offs_n, offs_k = (offs_reduced, offs_kept) if TRANSPOSED else (offs_kept, offs_reduced)
        w = load_weight_tile(
            packed_ptr,
            absmax_ptr,
            group_absmax_ptr,
            absmax_mean_ptr,
            levels_ptr,
            dynamic_map_ptr,
            member_table_ptr,
            offs_n,
            offs_k,
            N,
            K,
            NUM_MEMBERS,
            QUANT_BLOCK,
            DOUBLE_QUANT,
        ).to(x.dtype)
        # ieee: a float32 product must not be rounded to tf32
        acc = tl.dot(x, w if TRANSPOSED else tl.trans(w), acc, input_precision="ieee")
    tl.store(
        y_ptr + offs_m[:, None] * kept + offs_kept[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_kept < kept)[None, :],
    )


def _launch_nf4_matmul(x: Tensor, weight: NF4Weight, transposed: bool) -> Tensor:
    N, K = weight.shape
    M = x.shape[0]
    kept = K if transposed else N
    y = torch.empty((M, kept), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(kept, BLOCK_KEPT), triton.cdiv(M, BLOCK_M))
    # triton launches on the current device, which need not be the weight's
    with torch.cuda.device_of(x):
        _nf4_matmul_kernel[grid](
            x,
            y,
            weight.packed,
            *scale_tensors(weight),
            device_constant("levels", weight.device),
            device_constant("dynamic_map", weight.device),
            member_table(weight.rows, weight.in_features, weight.block_size, weight.device),
            M,
            N,
            K,
            x.stride(0),
            NUM_MEMBERS=len(weight.rows),
            QUANT_BLOCK=weight.block_size,
            DOUBLE_QUANT=weight.is_double_quantized,
            TRANSPOSED=transposed,
            BLOCK_M=BLOCK_M,
            BLOCK_KEPT=BLOCK_KEPT,
            BLOCK_REDUCED=BLOCK_REDUCED,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            enable_fp_fusion=False,
        )
    return y


def matmul_path(num_rows: int) -> str:
    """Choose how a CUDA tensor is multiplied: "fused", or "expand" (dequantize, then cuBLAS)."""
    return "fused" if num_rows <= FUSED_MAX_ROWS else "expand"


def _check(x: Tensor, weight: NF4Weight, num_columns: int, what: str) -> None:
    if x.dim() != 2 or x.shape[1] != num_columns or x.stride(1) != 1:
        raise ValueError(
            f"{what} must be a matrix with {num_columns} columns, each row contiguous: "
            f"got shape {tuple(x.shape)} with strides {x.stride()}"
        )
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{what} must be bfloat16, float16 or float32: got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(
            f"{what} and the weight must be on one device: got {x.device} and {weight.device}"
        )


def nf4_matmul(
    x: Tensor,  # (M, K)
    weight: NF4Weight,  # (N, K)
) -> Tensor:  # (M, N), x's dtype
    """Multiply by the transpose of an NF4 weight.

        y = x W^T

    No gradient: `lora.linear_group` writes out the backward pass.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(x, weight, weight.shape[1], "x")
    if x.device.type == "cpu":
        return nf4_matmul_reference(x, weight)
    if matmul_path(x.shape[0]) == "fused":
        return _launch_nf4_matmul(x, weight, transposed=False)
    return x @ nf4_dequantize(weight, x.dtype).T


def nf4_matmul_transposed(
    grad_y: Tensor,  # (M, N)
    weight: NF4Weight,  # (N, K)
) -> Tensor:  # (M, K), grad_y's dtype
    """Multiply by an NF4 weight: the gradient of `nf4_matmul` with respect to x.

        grad_x = grad_y W

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(grad_y, weight, weight.shape[0], "grad_y")
    if grad_y.device.type == "cpu":
        return nf4_matmul_transposed_reference(grad_y, weight)
    if matmul_path(grad_y.shape[0]) == "fused":
        return _launch_nf4_matmul(grad_y, weight, transposed=True)
    return grad_y @ nf4_dequantize(weight, grad_y.dtype)
