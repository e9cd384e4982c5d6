"""The gradients of experts' low-rank updates: for each expert, a sum over its rows.

    grad[e] += a[r] b[r]^T, summed over offsets[e] <= r < offsets[e + 1]        (P, Q)

    rows of a, b | expert 0 | expert 1 |  | expert 3 | ...      sorted by expert; any number each
    offsets      0          300        417 417       ...

P is a rank, Q the width of an expert's input or output. With R rows, a launch takes 2 R P Q FLOPs
and reads b once for each BLOCK_P columns of a, and a once for each BLOCK_Q columns of b: with 16
columns of a that is S R (Q + P Q / BLOCK_Q) bytes of S a value. A sum is in float32, of the rows in
their order, by one program: equal runs give equal bits.

The numbers of rows are known to the device alone, as in `kernels/grouped_matmul.py`.
"""

# triton's annotations do not know that tensors have numbers' operators and methods
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false

from itertools import pairwise

import torch
from torch import Tensor

from kernels.checks import (
    check_dtype,
    check_is,
    check_is_contiguous,
    check_not_recorded,
    check_one_device,
    check_rows_are_contiguous,
)
from kernels.device import TENSOR_CORES_FROM, Properties, properties
from kernels.language import tl, triton
from kernels.launch import cdiv, launch, next_power_of_2

# the columns of a that a program has at most, those of b, and the rows at a time
BLOCK_P, BLOCK_Q, BLOCK_R = 64, 128, 32
# of float32, and of GPUs whose tensor cores Triton does not know: products are unrolled there
SMALL_BLOCK_P, SMALL_BLOCK_Q, SMALL_BLOCK_R = 16, 64, 16
# the fewest columns that a product takes
LEAST_COLUMNS = 16
NUM_WARPS = 4
# of float32: no tensor cores
PRECISION = tl.constexpr("ieee")


def expert_gradient_reference(
    a: Tensor,  # (R, P)
    b: Tensor,  # (R, Q)
    offsets: Tensor,  # (E + 1,)
    grad: Tensor,  # (E, P, Q) float32, added to
) -> None:
    """Multiply expert by expert, accumulating in float32."""
    for matrix, (start, stop) in zip(grad, pairwise(offsets.tolist()), strict=True):
        matrix += a[start:stop].float().T @ b[start:stop].float()


@triton.jit
def _expert_gradient_kernel(
    grad_ptr,  # (E, P, Q) float32
    a_ptr,  # (R, P)
    b_ptr,  # (R, Q)
    offsets_ptr,
    P,
    Q,
    stride_ge,
    stride_gp,
    stride_gq,
    stride_ar,
    stride_br,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # one program adds to a (BLOCK_P, BLOCK_Q) tile of one expert's gradient, which it computes
    # transposed: Hopper's products have at least 64 rows, and P may be 16
    expert = tl.program_id(0)
    offs_q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_r = tl.arange(0, BLOCK_R)
    start = tl.load(offsets_ptr + expert)
    stop = tl.load(offsets_ptr + expert + 1)
    if start < stop:
        acc = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
        for row in range(start, stop, BLOCK_R):
            rows = (row + offs_r).to(tl.int64)
            in_rows = rows < stop
            a_ptrs = a_ptr + rows[:, None] * stride_ar + offs_p[None, :]
            a = tl.load(a_ptrs, in_rows[:, None] & (offs_p < P)[None, :], 0.0)
            b_ptrs = b_ptr + rows[:, None] * stride_br + offs_q[None, :]
            b = tl.load(b_ptrs, in_rows[:, None] & (offs_q < Q)[None, :], 0.0)
            acc = tl.dot(b.T, a, acc, input_precision=PRECISION)
        grad_ptrs = grad_ptr + expert.to(tl.int64) * stride_ge
        grad_ptrs += offs_q.to(tl.int64)[:, None] * stride_gq
        grad_ptrs += offs_p.to(tl.int64)[None, :] * stride_gp
        mask = (offs_q < Q)[:, None] & (offs_p < P)[None, :]
        tl.store(grad_ptrs, tl.load(grad_ptrs, mask, 0.0) + acc, mask)


def _launch_expert_gradient(
    a: Tensor, b: Tensor, offsets: Tensor, grad: Tensor, gpu: Properties
) -> None:
    E, P, Q = grad.shape
    blocks = (BLOCK_P, BLOCK_Q, BLOCK_R)
    if a.dtype == torch.float32 or gpu.capability < TENSOR_CORES_FROM:
        blocks = (SMALL_BLOCK_P, SMALL_BLOCK_Q, SMALL_BLOCK_R)
    block_p, block_q, block_r = blocks
    block_p = min(block_p, max(LEAST_COLUMNS, next_power_of_2(P)))
    launch(
        _expert_gradient_kernel,
        (E, cdiv(Q, block_q), cdiv(P, block_p)),
        grad_ptr=grad,
        a_ptr=a,
        b_ptr=b,
        offsets_ptr=offsets,
        P=P,
        Q=Q,
        stride_ge=grad.stride(0),
        stride_gp=grad.stride(1),
        stride_gq=grad.stride(2),
        stride_ar=a.stride(0),
        stride_br=b.stride(0),
        BLOCK_P=block_p,
        BLOCK_Q=block_q,
        BLOCK_R=block_r,
        num_warps=NUM_WARPS,
        # multiply-adds round less
        enable_fp_fusion=True,
    )


def expert_gradient(
    a: Tensor,  # (R, P), sorted by expert
    b: Tensor,  # (R, Q), sorted by expert
    offsets: Tensor,  # (E + 1,) int32: where each expert's rows begin; at last R
    grad: Tensor,  # (E, P, Q) float32, of any strides; added to
) -> None:
    """Add the products of each expert's rows to its gradient.

        grad[e] += a[rows]^T b[rows]        rows: offsets[e] to offsets[e + 1]

    Args:
        offsets: not decreasing, from 0 to R; their values are not looked at, which would wait for
            the device.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, rows are scattered, or something requires
            a gradient.
    """
    check_dtype("a", a.dtype)
    if a.dim() != 2 or b.dim() != 2 or offsets.dim() != 1 or len(a) != len(b):
        raise ValueError(
            "a and b must be matrices of as many rows, and offsets one row: "
            f"got {tuple(a.shape)}, {tuple(b.shape)} and {tuple(offsets.shape)}"
        )
    check_is("b", b, a.dtype, tuple(b.shape))
    check_is("offsets", offsets, torch.int32, tuple(offsets.shape))
    check_is("grad", grad, torch.float32, (len(offsets) - 1, a.shape[1], b.shape[1]))
    check_is_contiguous("offsets", offsets)
    check_rows_are_contiguous("a", a)
    check_rows_are_contiguous("b", b)
    check_one_device({"a": a, "b": b, "offsets": offsets, "grad": grad})
    check_not_recorded({"a": a, "b": b}, "no function")
    if a.device.type == "cpu":
        expert_gradient_reference(a, b, offsets, grad)
    elif grad.numel() > 0:
        _launch_expert_gradient(a, b, offsets, grad, properties(a.device))
