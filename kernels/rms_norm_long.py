"""Normalize rows that are too long for a program's registers, and compute the gradient, on the GPU.

The equations, arguments and results are those of `rms_norm.py` and `rms_norm_backward.py`, which
launch these kernels for rows of more than `rms_norm_row.MAX_CHUNKS` chunks, from 18,432 values on
in 16 bit, or MAX_CENTRED_CHUNKS where rows are centred. A program reads its row chunk by chunk for
the sum over the row, and once more for the result; the second time from L2, so memory moves as many
bytes as for a row in registers. A row that is centred is read once more, for its mean.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from kernels.language import tl, triton
from kernels.rms_norm_row import (
    centred,
    factor_of,
    gradient_of,
    mean_of,
    rstd_of,
    slope_of,
    sum_with_residual,
)


@triton.jit
def _rms_norm_long_kernel(
    y_ptr,  # (M, D)
    r_ptr,  # (M, D), contiguous, written where there is a residual
    rstd_ptr,  # (M,)
    x_ptr,  # (M, D)
    residual_ptr,  # (M, D)
    weight_ptr,  # (D,)
    D,
    eps,
    stride_ym,
    stride_xm,
    stride_residual_m,
    OFFSET: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # one program normalizes one row
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    residual_ptr += row * stride_residual_m
    y_ptr += row * stride_ym
    r_ptr += row * D
    squares = tl.zeros((CHUNK,), tl.float32)
    total = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, D, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        r = tl.load(x_ptr + offs, mask=offs < D, other=0.0)
        if HAS_RESIDUAL:
            addend = tl.load(residual_ptr + offs, mask=offs < D, other=0.0)
            r = sum_with_residual(r, addend, r_ptr.dtype.element_ty)
            tl.store(r_ptr + offs, r, mask=offs < D)
        if IS_CENTRED:
            total += r.to(tl.float32)
        else:
            squares += r.to(tl.float32) * r.to(tl.float32)
    if HAS_RESIDUAL:
        # the next loop reads values of r that other threads have stored
        tl.debug_barrier()
        again_ptr = r_ptr
    else:
        again_ptr = x_ptr
    mean = mean_of(total, D, IS_CENTRED)
    if IS_CENTRED:
        for start in range(0, D, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            r = tl.load(again_ptr + offs, mask=offs < D, other=0.0)
            r = centred(r, mean, offs < D, IS_CENTRED)
            squares += r * r
    rstd = rstd_of(squares, D, eps)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, D, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        r = tl.load(again_ptr + offs, mask=offs < D, other=0.0)
        r = centred(r, mean, offs < D, IS_CENTRED)
        w = factor_of(tl.load(weight_ptr + offs, mask=offs < D, other=0.0), OFFSET)
        y = r * rstd * w
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < D)


@triton.jit
def _rms_norm_backward_long_kernel(
    grad_ptr,  # (M, D), may be grad_y or grad_r
    y_ptr,  # (M, D), written if WRITES_Y; may be grad_y
    grad_y_ptr,  # (M, D)
    grad_r_ptr,  # (M, D), read where there is one
    r_ptr,  # (M, D)
    rstd_ptr,  # (M,)
    weight_ptr,  # (D,)
    D,
    stride_grad_m,
    stride_ym,
    stride_grad_ym,
    stride_grad_rm,
    stride_rm,
    OFFSET: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    HAS_GRAD_R: tl.constexpr,
    WRITES_Y: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # one program computes the gradient of one row. It may write over grad_y or grad_r: the sum over
    # the row ends the first reading for all threads, and each chunk is read again before it is
    # written
    row = tl.program_id(0).to(tl.int64)
    grad_y_ptr += row * stride_grad_ym
    grad_r_ptr += row * stride_grad_rm
    r_ptr += row * stride_rm
    grad_ptr += row * stride_grad_m
    y_ptr += row * stride_ym
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros((CHUNK,), tl.float32)
    total = tl.zeros((CHUNK,), tl.float32)
    total_g = tl.zeros((CHUNK,), tl.float32)
    if IS_CENTRED:
        for start in range(0, D, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            total += tl.load(r_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
    mean = mean_of(total, D, IS_CENTRED)
    for start in range(0, D, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        grad_y = tl.load(grad_y_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
        w = factor_of(tl.load(weight_ptr + offs, mask=offs < D, other=0.0), OFFSET)
        r = tl.load(r_ptr + offs, mask=offs < D, other=0.0)
        products += grad_y * w * centred(r, mean, offs < D, IS_CENTRED)
        if IS_CENTRED:
            total_g += grad_y * w
    slope = slope_of(products, rstd, D)
    mean_g = mean_of(total_g, D, IS_CENTRED)
    for start in range(0, D, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        grad_y = tl.load(grad_y_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
        w = factor_of(tl.load(weight_ptr + offs, mask=offs < D, other=0.0), OFFSET)
        r = tl.load(r_ptr + offs, mask=offs < D, other=0.0)
        r = centred(r, mean, offs < D, IS_CENTRED)
        g = centred(grad_y * w, mean_g, offs < D, IS_CENTRED)
        grad = gradient_of(g, r, rstd, slope)
        if HAS_GRAD_R:
            grad += tl.load(grad_r_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
        tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=offs < D)
        if WRITES_Y:
            y = r * rstd * w
            tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < D)
