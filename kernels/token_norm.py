"""Normalize a few rows and project them down to the ranks of their updates, in one launch.

    r = x + delta                        y = w r rstd            rstd = 1 / sqrt(mean(r^2) + eps)
    h = y A^T                            w = weight + offset; r centred in y and rstd where rows are

    program (row, p) | r, rstd, y of the whole row | h[row, p] = y . A[p]
                       program (row, 0) writes r and y

`rms_norm.py` normalizes many rows. A pass for one token has a row for each sequence, and the
projection that follows needs h before it begins: so here each of P programs a row normalizes the
row again, which costs it 6 D bytes from L2, and multiplies it by one row of A. A launch moves
2 (P + 4) D bytes in 16 bits where there is one row. y is rounded before it is multiplied by A, as
in training.

Root mean square layer normalization: Zhang and Sennrich 2019, equation 4. LoRA: Hu et al. 2021.
"""

# triton's annotations know no tuples of tensors
# pyright: reportAttributeAccessIssue=false

import torch
from torch import Tensor

from kernels.checks import check_is_contiguous, check_like, check_one_device
from kernels.language import tl, triton
from kernels.launch import launch, next_power_of_2
from kernels.rms_norm import rms_norm_reference
from kernels.rms_norm_row import (
    centred,
    check_rows,
    factor_of,
    mean_of,
    rstd_of,
    sum_with_residual,
)

# values of a thread, where a row has enough for all threads
VALUES = 16
MAX_WARPS = 16


def token_norm_reference(
    x: Tensor,  # (M, D)
    delta: Tensor | None,  # (M, D)
    weight: Tensor,  # (D,)
    eps: float,
    offset: float,
    A: Tensor,  # (P, D)
    is_centred: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # y (M, D), h (M, P), r (M, D)
    """Normalize as `rms_norm_reference` does, and multiply in float32."""
    y, r, _ = rms_norm_reference(x, weight, eps, delta, offset, is_centred)
    return y, (y.float() @ A.float().T).to(x.dtype), r


@triton.jit
def _token_norm_kernel(
    y_ptr,  # (M, D), contiguous like all matrices here
    h_ptr,  # (M, P)
    r_ptr,  # (M, D), written where there is a delta
    x_ptr,  # (M, D)
    delta_ptr,  # (M, D)
    weight_ptr,  # (D,)
    A_ptr,  # (P, D)
    D,
    eps,
    OFFSET: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    WIDTH: tl.constexpr,  # D, to a power of two
):
    # one program computes h of one row and one rank; the first of a row writes y
    row = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1)
    offs = tl.arange(0, WIDTH)
    mask = offs < D
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    a = tl.load(A_ptr + rank.to(tl.int64) * D + offs, mask=mask, other=0.0)
    r = tl.load(x_ptr + row * D + offs, mask=mask, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * D + offs, mask=mask, other=0.0)
        r = sum_with_residual(r, delta, r_ptr.dtype.element_ty)
    wide = r.to(tl.float32)
    wide = centred(wide, mean_of(wide, D, IS_CENTRED), mask, IS_CENTRED)
    y = wide * rstd_of(wide * wide, D, eps) * factor_of(weight, OFFSET)
    y = y.to(y_ptr.dtype.element_ty)
    if rank == 0:
        tl.store(y_ptr + row * D + offs, y, mask=mask)
        if HAS_DELTA:
            tl.store(r_ptr + row * D + offs, r, mask=mask)
    h = tl.sum(y.to(tl.float32) * a.to(tl.float32), 0)
    tl.store(h_ptr + row * tl.num_programs(1) + rank, h.to(h_ptr.dtype.element_ty))


def _launch_token_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    A: Tensor,
    is_centred: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    M, D = x.shape
    width = next_power_of_2(D)
    y, h = torch.empty_like(x), x.new_empty(M, A.shape[0])
    r = x if delta is None else torch.empty_like(x)
    launch(
        _token_norm_kernel,
        (M, A.shape[0]),
        y_ptr=y,
        h_ptr=h,
        r_ptr=r,
        x_ptr=x,
        delta_ptr=x if delta is None else delta,
        weight_ptr=weight,
        A_ptr=A,
        D=D,
        eps=eps,
        OFFSET=offset,
        IS_CENTRED=is_centred,
        HAS_DELTA=delta is not None,
        WIDTH=width,
        num_warps=min(max(width // (32 * VALUES), 1), MAX_WARPS),
    )
    return y, h, r


def token_norm(
    x: Tensor,  # (M, D)
    delta: Tensor | None,  # (M, D)
    weight: Tensor,  # (D,), frozen
    eps: float,
    offset: float,
    A: Tensor,  # (P, D)
    is_centred: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # y (M, D), h (M, P), r (M, D)
    """Add, normalize the sum, and multiply it by A.

        r = x + delta        y = (weight + offset) r / sqrt(mean(r^2) + eps)        h = y A^T

    Args:
        is_centred: r - mean(r) takes r's place in y.

    Returns:
        r is x itself without a delta.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a matrix is not contiguous.
    """
    check_rows(weight, x=x, delta=delta)
    check_like("a row of A", A[0], "a row of x", x[0])
    for name, matrix in (("x", x), ("delta", delta), ("A", A)):
        if matrix is not None:
            check_is_contiguous(name, matrix)
    check_one_device({"x": x, "A": A})
    if x.device.type == "cpu":
        return token_norm_reference(x, delta, weight, eps, offset, A, is_centred)
    return _launch_token_norm(x, delta, weight, eps, offset, A, is_centred)
