"""Compute the gradient of `kernels/rms_norm.py`'s result, on the GPU.

    grad = rstd * (g - r * rstd^2 * mean(g r)) + grad_r          g = w * grad_y

    r, rstd, w         as the forward pass has them; where rows are centred, r - mean(r) takes r's
                       place, and g - mean(g) that of the first g
    grad_r             the gradient that reaches r along the residual stream, if any

One program holds a row of grad_y, r and grad_r in registers. With D values in S bytes each, a row
moves 3 D S + 4 bytes, with grad_r 4 D S + 4, with y again D S more, and costs about 8 D FLOPs:
memory bandwidth is the limit. The weights are frozen: no gradient of theirs, and no pass to add it
up over the rows.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

import torch
from torch import Tensor

from kernels.checks import check_is, check_is_contiguous, check_one_device
from kernels.language import tl, triton
from kernels.launch import launch
from kernels.rms_norm_long import _rms_norm_backward_long_kernel
from kernels.rms_norm_row import (
    centred,
    centred_reference,
    check_rows,
    factor_of,
    gradient_of,
    load_row,
    mean_of,
    shape_of,
    slope_of,
)


def rms_norm_backward_reference(
    grad_y: Tensor,  # (M, D)
    grad_r: Tensor | None,  # (M, D)
    r: Tensor,  # (M, D)
    rstd: Tensor,  # (M,) float32
    weight: Tensor,  # (D,)
    offset: float = 0.0,
    is_centred: bool = False,
) -> Tensor:  # (M, D), r's dtype
    """Compute the gradient of r in float32, rounded once.

    g    = (weight + offset) * grad_y
    grad = rstd * (g - n * mean(g n)) + grad_r          n = r * rstd

    Where rows are centred, r and the first g of the second line are.
    """
    normalized = centred_reference(r, is_centred) * rstd[:, None]
    g = grad_y.float() * (weight.float() + offset)
    slope = (g * normalized).mean(dim=1, keepdim=True)
    grad = rstd[:, None] * (centred_reference(g, is_centred) - normalized * slope)
    return (grad if grad_r is None else grad + grad_r.float()).to(r.dtype)


@triton.jit
def _rms_norm_backward_kernel(
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
    CHUNKS: tl.constexpr,
):
    # one program computes the gradient of one row. It may write over grad_y or grad_r: a thread
    # reads all of its values before it writes any
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
    grads_y = load_row(grad_y_ptr, D, CHUNK, CHUNKS)
    rows = load_row(r_ptr, D, CHUNK, CHUNKS)
    if HAS_GRAD_R:
        grads_r = load_row(grad_r_ptr, D, CHUNK, CHUNKS)
    weights = load_row(weight_ptr, D, CHUNK, CHUNKS)
    if IS_CENTRED:
        for chunk in tl.static_range(CHUNKS):
            total += rows[chunk].to(tl.float32)
    mean = mean_of(total, D, IS_CENTRED)
    for chunk in tl.static_range(CHUNKS):
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        g = grads_y[chunk].to(tl.float32) * factor_of(weights[chunk], OFFSET)
        r = centred(rows[chunk], mean, offs < D, IS_CENTRED)
        products += g * r
        if IS_CENTRED:
            total_g += g
        if WRITES_Y:
            # after the sum more would be held at once, and sm_80 spills
            y = r * rstd * factor_of(weights[chunk], OFFSET)
            tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < D)
    slope = slope_of(products, rstd, D)
    mean_g = mean_of(total_g, D, IS_CENTRED)
    for chunk in tl.static_range(CHUNKS):
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        g = grads_y[chunk].to(tl.float32) * factor_of(weights[chunk], OFFSET)
        r = centred(rows[chunk], mean, offs < D, IS_CENTRED)
        grad = gradient_of(centred(g, mean_g, offs < D, IS_CENTRED), r, rstd, slope)
        if HAS_GRAD_R:
            grad += grads_r[chunk].to(tl.float32)
        tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=offs < D)


def _launch_rms_norm_backward(
    grad_y: Tensor,  # (M, D)
    grad_r: Tensor | None,  # (M, D)
    r: Tensor,  # (M, D)
    rstd: Tensor,  # (M,) float32
    weight: Tensor,  # (D,)
    out: Tensor | None = None,  # (M, D), may be grad_y or grad_r
    y: Tensor | None = None,  # (M, D), written; may be grad_y
    offset: float = 0.0,
    is_centred: bool = False,
) -> Tensor:  # (M, D)
    M, D = r.shape
    grad = torch.empty((M, D), dtype=r.dtype, device=r.device) if out is None else out
    # stand-ins for matrices that were not given: the kernel neither reads nor writes them
    addend = grad_y if grad_r is None else grad_r
    again = grad if y is None else y
    shape = shape_of(r, is_centred)
    if M > 0:
        launch(
            _rms_norm_backward_kernel if "CHUNKS" in shape else _rms_norm_backward_long_kernel,
            (M,),
            grad_ptr=grad,
            y_ptr=again,
            grad_y_ptr=grad_y,
            grad_r_ptr=addend,
            r_ptr=r,
            rstd_ptr=rstd,
            weight_ptr=weight,
            D=D,
            stride_grad_m=grad.stride(0),
            stride_ym=again.stride(0),
            stride_grad_ym=grad_y.stride(0),
            stride_grad_rm=addend.stride(0),
            stride_rm=r.stride(0),
            OFFSET=offset,
            IS_CENTRED=is_centred,
            HAS_GRAD_R=grad_r is not None,
            WRITES_Y=y is not None,
            enable_fp_fusion=True,
            **shape,
        )
    return grad


def rms_norm_backward(
    grad_y: Tensor,  # (M, D)
    grad_r: Tensor | None,  # (M, D)
    r: Tensor,  # (M, D)
    rstd: Tensor,  # (M,) float32
    weight: Tensor,  # (D,), frozen
    out: Tensor | None = None,  # (M, D)
    y: Tensor | None = None,  # (M, D)
    offset: float = 0.0,
    is_centred: bool = False,
) -> Tensor:  # (M, D), r's dtype
    """Compute the gradient of `rms_norm`'s r, which is that of x and of the residual.

        g    = (weight + offset) * grad_y
        grad = rstd * (g - r * rstd^2 * mean(g r)) + grad_r

    Args:
        grad_r: the gradient that reaches r along the residual stream; None: zero.
        out: the matrix that is written and returned. It may be grad_y or grad_r, which is then
            overwritten, and shares no other memory with the inputs. A new tensor if None.
        y: takes the norm's result again, bit for bit, for a caller that did not keep it: the
            gradient of a low-rank update needs it. It may be grad_y, unless out is grad_y.
        offset, is_centred: those of the forward pass.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a row is not contiguous, or something
            requires a gradient.
    """
    check_rows(weight, r=r, grad_y=grad_y, grad_r=grad_r, out=out, y=y)
    check_is("rstd", rstd, torch.float32, (r.shape[0],))
    check_is_contiguous("rstd", rstd)
    check_one_device({"rstd": rstd, "r": r})
    if r.device.type == "cpu":
        grad = rms_norm_backward_reference(grad_y, grad_r, r, rstd, weight, offset, is_centred)
        if y is not None:
            r = centred_reference(r, is_centred)
            y.copy_(r * rstd[:, None] * (weight.float() + offset))
        return grad if out is None else out.copy_(grad)
    return _launch_rms_norm_backward(grad_y, grad_r, r, rstd, weight, out, y, offset, is_centred)
