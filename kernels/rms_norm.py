"""Normalize rows by their root mean square, with the residual addition before it, on the GPU.

    r    = x + residual                              or x, where there is nothing to add
    y    = weight * r * rstd                         rstd = 1 / sqrt(mean(r^2) + eps)

    grad = rstd * (g - r * rstd^2 * mean(g r)) + grad_r          g = weight * grad_y

    row of D | chunk 0   | chunk 1   | ...       16 bytes a thread and chunk: 8 values in 16 bit
                 sum of squares                  over the chunks in registers, then once across
                                                 the program's threads

One program holds a row in registers, so each tensor is moved once; a row too long for that is read
twice, the second time from L2. With D values in S bytes each, a row moves

    forward     2 D S + 4      with a residual 4 D S + 4: two read, two written
    backward    3 D S + 4      with the gradient of r 4 D S + 4

and costs about 4 D FLOPs forward, 8 D backward: memory bandwidth is the limit. The weights are
frozen: no gradient of theirs, and no pass to add it up over the rows. They come from L2, and so do
not count. Saved for the backward pass are r, which is the residual stream and lives anyway, and
rstd; y is not.

The arithmetic is float32, rounded once, where transformers rounds r * rstd before the weight is
applied. r is rounded to x's dtype before it is normalized, as an addition of its own would be.

Root mean square layer normalization: Zhang and Sennrich 2019, equation 4.
"""

# triton's annotations know neither launch options nor static_range, nor tuples of tensors
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# the widest access of a thread
VECTOR_BYTES = 16
# vectors that a thread should have of a row, if it may choose the number of warps
VECTORS = 4
MAX_WARPS = 8
# chunks of a row in registers; of rows with more, every chunk is read twice
MAX_CHUNKS = 8


def rms_norm_reference(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    residual: Tensor | None = None,  # (..., D)
) -> tuple[Tensor, Tensor]:  # y and r, (..., D) each, x's dtype
    """Add the residual, if any, and normalize in float32."""
    r = x if residual is None else x + residual
    wide = r.float()
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * rstd * weight.float()).to(x.dtype), r


@triton.jit
def _load_row(row_ptr, D, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        tiles = tiles + (tl.load(row_ptr + offs, mask=offs < D, other=0.0),)  # noqa: RUF005, triton knows no star
    return tiles


@triton.jit
def _rms_norm_kernel(
    y_ptr,  # (M, D)
    r_ptr,  # (M, D), written where there is a residual
    rstd_ptr,  # (M,)
    x_ptr,  # (M, D)
    residual_ptr,  # (M, D)
    weight_ptr,  # (D,)
    D,
    eps,
    stride_xm,
    stride_residual_m,
    HAS_RESIDUAL: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # 0: the row does not fit the registers
):
    # one program normalizes one row
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    residual_ptr += row * stride_residual_m
    y_ptr += row * D
    r_ptr += row * D
    squares = tl.zeros((CHUNK,), tl.float32)
    if CHUNKS > 0:
        # all loads are under way before the first is worked on
        tiles = _load_row(x_ptr, D, CHUNK, CHUNKS)
        if HAS_RESIDUAL:
            addends = _load_row(residual_ptr, D, CHUNK, CHUNKS)
        weights = _load_row(weight_ptr, D, CHUNK, CHUNKS)
        rows = ()
        for chunk in tl.static_range(CHUNKS):
            r = tiles[chunk]
            if HAS_RESIDUAL:
                r = (r.to(tl.float32) + addends[chunk].to(tl.float32)).to(r_ptr.dtype.element_ty)
                offs = chunk * CHUNK + tl.arange(0, CHUNK)
                tl.store(r_ptr + offs, r, mask=offs < D)
            rows = rows + (r,)  # noqa: RUF005
            squares += r.to(tl.float32) * r.to(tl.float32)
    else:
        for start in range(0, D, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            r = tl.load(x_ptr + offs, mask=offs < D, other=0.0)
            if HAS_RESIDUAL:
                addend = tl.load(residual_ptr + offs, mask=offs < D, other=0.0)
                r = (r.to(tl.float32) + addend.to(tl.float32)).to(r_ptr.dtype.element_ty)
                tl.store(r_ptr + offs, r, mask=offs < D)
            squares += r.to(tl.float32) * r.to(tl.float32)
    mean = tl.div_rn(tl.sum(squares, 0), D * 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd)
    if CHUNKS > 0:
        for chunk in tl.static_range(CHUNKS):
            offs = chunk * CHUNK + tl.arange(0, CHUNK)
            y = rows[chunk].to(tl.float32) * rstd * weights[chunk].to(tl.float32)
            tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < D)
    else:
        if HAS_RESIDUAL:
            # what the other threads have stored of r
            tl.debug_barrier()
            again_ptr = r_ptr
        else:
            again_ptr = x_ptr
        for start in range(0, D, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            r = tl.load(again_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            y = r * rstd * weight
            tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < D)


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr,  # (M, D)
    grad_y_ptr,  # (M, D)
    grad_r_ptr,  # (M, D), read where there is one
    r_ptr,  # (M, D)
    rstd_ptr,  # (M,)
    weight_ptr,  # (D,)
    D,
    stride_grad_ym,
    stride_grad_rm,
    stride_rm,
    HAS_GRAD_R: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # 0: the row does not fit the registers
):
    # one program computes the gradient of one row
    row = tl.program_id(0).to(tl.int64)
    grad_y_ptr += row * stride_grad_ym
    grad_r_ptr += row * stride_grad_rm
    r_ptr += row * stride_rm
    grad_ptr += row * D
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros((CHUNK,), tl.float32)
    if CHUNKS > 0:
        grads_y = _load_row(grad_y_ptr, D, CHUNK, CHUNKS)
        rows = _load_row(r_ptr, D, CHUNK, CHUNKS)
        if HAS_GRAD_R:
            grads_r = _load_row(grad_r_ptr, D, CHUNK, CHUNKS)
        weights = _load_row(weight_ptr, D, CHUNK, CHUNKS)
        for chunk in tl.static_range(CHUNKS):
            g = grads_y[chunk].to(tl.float32) * weights[chunk].to(tl.float32)
            products += g * rows[chunk].to(tl.float32)
    else:
        for start in range(0, D, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            grad_y = tl.load(grad_y_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            r = tl.load(r_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            products += grad_y * weight * r
    # the mean of g r rstd; r rstd is of order one where rstd^3 may overflow
    slope = tl.div_rn(tl.sum(products, 0) * rstd, D * 1.0)
    if CHUNKS > 0:
        for chunk in tl.static_range(CHUNKS):
            offs = chunk * CHUNK + tl.arange(0, CHUNK)
            g = grads_y[chunk].to(tl.float32) * weights[chunk].to(tl.float32)
            grad = rstd * (g - rows[chunk].to(tl.float32) * rstd * slope)
            if HAS_GRAD_R:
                grad += grads_r[chunk].to(tl.float32)
            tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=offs < D)
    else:
        for start in range(0, D, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            grad_y = tl.load(grad_y_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            r = tl.load(r_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            grad = rstd * (grad_y * weight - r * rstd * slope)
            if HAS_GRAD_R:
                grad += tl.load(grad_r_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=offs < D)


def _shape(x: Tensor) -> dict[str, int]:
    """Choose warps and chunks of a row, so that a thread has about VECTORS of its vectors."""
    D = x.shape[1]
    warp_width = 32 * VECTOR_BYTES // x.element_size()
    wanted = max(D // (VECTORS * warp_width), 1)
    # the power of two below: a row of 5 * 1024 takes five chunks, and no thread is idle
    num_warps = min(1 << (wanted.bit_length() - 1), MAX_WARPS)
    chunk = num_warps * warp_width
    num_chunks = triton.cdiv(D, chunk)
    return {
        "CHUNK": chunk,
        "CHUNKS": num_chunks if num_chunks <= MAX_CHUNKS else 0,
        "num_warps": num_warps,
    }


def _with_contiguous_rows(x: Tensor) -> Tensor:
    """Copy a matrix whose rows are scattered, such as the gradient of a sum."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _launch_rms_norm(
    x: Tensor,  # (M, D)
    weight: Tensor,  # (D,)
    eps: float,
    residual: Tensor | None,  # (M, D)
) -> tuple[Tensor, Tensor, Tensor]:  # y, r (M, D); rstd (M,) float32
    M, D = x.shape
    x = _with_contiguous_rows(x)
    y = torch.empty((M, D), dtype=x.dtype, device=x.device)
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    has_residual = residual is not None
    r = torch.empty_like(y) if has_residual else x
    addend = _with_contiguous_rows(residual) if has_residual else x
    if M > 0:
        # triton launches on the current device, which need not be x's
        with torch.cuda.device_of(x):
            _rms_norm_kernel[(M,)](
                y,
                r,
                rstd,
                x,
                addend,
                weight.contiguous(),
                D,
                eps,
                x.stride(0),
                addend.stride(0),
                HAS_RESIDUAL=has_residual,
                # multiply-adds round less
                enable_fp_fusion=True,
                **_shape(x),
            )
    return y, r, rstd


def _launch_rms_norm_backward(
    grad_y: Tensor,  # (M, D)
    grad_r: Tensor | None,  # (M, D)
    r: Tensor,  # (M, D)
    rstd: Tensor,  # (M,) float32
    weight: Tensor,  # (D,)
) -> Tensor:  # (M, D)
    M, D = grad_y.shape
    grad_y, r = _with_contiguous_rows(grad_y), _with_contiguous_rows(r)
    grad = torch.empty((M, D), dtype=r.dtype, device=r.device)
    has_grad_r = grad_r is not None
    addend = _with_contiguous_rows(grad_r) if has_grad_r else grad_y
    if M > 0:
        with torch.cuda.device_of(r):
            _rms_norm_backward_kernel[(M,)](
                grad,
                grad_y,
                addend,
                r,
                rstd,
                weight.contiguous(),
                D,
                grad_y.stride(0),
                addend.stride(0),
                r.stride(0),
                HAS_GRAD_R=has_grad_r,
                enable_fp_fusion=True,
                **_shape(r),
            )
    return grad


class _RMSNorm(torch.autograd.Function):
    """Addition and normalization; r goes on as the residual stream, so its gradient comes back.

    r         = x + residual                     x itself where there is no residual
    y         = weight * r * rstd                weight frozen: no grad_weight is formed

    g         = weight * grad_y
    grad_r   += rstd * (g - r * rstd^2 * mean(g r))
    grad_x    = grad_residual = grad_r
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, r, rstd = _launch_rms_norm(x, weight, eps, residual)
        # scattered rows were copied, but an input is returned as itself
        r = x if residual is None else r
        ctx.save_for_backward(r, rstd, weight)
        ctx.set_materialize_grads(False)
        return y, r

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_y, grad_r = grad_outputs
        r, rstd, weight = ctx.saved_tensors
        needs_x, needs_residual, _, _ = ctx.needs_input_grad
        # a result that nobody used has no gradient
        grad = (
            grad_r if grad_y is None else _launch_rms_norm_backward(grad_y, grad_r, r, rstd, weight)
        )
        return grad if needs_x else None, grad if needs_residual else None, None, None


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be bfloat16, float16 or float32: got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            "x must have rows as long as the weight: "
            f"got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"the residual must have x's shape and dtype, {tuple(x.shape)} and {x.dtype}: "
            f"got {tuple(residual.shape)} and {residual.dtype}"
        )
    devices = {t.device for t in (x, weight, residual) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"x, weight and residual must be on one device: got {x.device} and others")
    if weight.requires_grad:
        raise ValueError("the weight must be frozen: got one that requires a gradient")


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,), frozen
    eps: float,
    residual: Tensor | None = None,  # (..., D)
) -> tuple[Tensor, Tensor]:  # y and r, (..., D) each, x's dtype
    """Add a residual and normalize the sum by its root mean square.

        r = x + residual
        y = weight * r / sqrt(mean(r^2) + eps)

    Without a residual r is x: what goes on from there should take r instead, because then the
    backward pass adds its gradient in the same pass.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the weight requires a gradient.
    """
    _check(x, weight, residual)
    if x.device.type == "cpu":
        return rms_norm_reference(x, weight, eps, residual)
    D = x.shape[-1]
    rows = None if residual is None else residual.reshape(-1, D)
    y, r = _RMSNorm.apply(x.reshape(-1, D), rows, weight, eps)
    return y.view(x.shape), r.view(x.shape)
