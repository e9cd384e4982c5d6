"""Normalize rows by their root mean square, with the residual addition before it, on the GPU.

    r    = x + residual                              or x, where there is nothing to add
    y    = w * r * rstd                              rstd = 1 / sqrt(mean(r^2) + eps)

    grad = rstd * (g - r * rstd^2 * mean(g r)) + grad_r          g = w * grad_y

    w    = weight + offset                           where weights are stored less 1, offset is 1

    row of D | chunk 0   | chunk 1   | ...       16 bytes a thread and chunk: 8 values in 16 bit
                 sum of squares                  over the chunks in registers, then once across
                                                 the program's threads

One program holds a row in registers, so each tensor is moved once; a row too long for that is read
twice, the second time from L2. With D values in S bytes each, a row moves

    forward     2 D S + 4      with a residual 4 D S + 4: two read, two written
    backward    3 D S + 4      with the gradient of r 4 D S + 4, with y again D S more

and costs about 4 D FLOPs forward, 8 D backward: memory bandwidth is the limit. The weights are
frozen: no gradient of theirs, and no pass to add it up over the rows. They come from L2, and so do
not count. The backward pass asks for r, which is the residual stream and lives anyway, and rstd;
not for y.

Two functions and no autograd between them: who calls them has a backward pass of its own, and says
where results go. A matrix may be the first columns of wider rows; accesses stay 16 bytes wide where
its row stride is a multiple of 16 values.

The arithmetic is float32, rounded once, where transformers rounds r * rstd before the weight is
applied. r is rounded to x's dtype before it is normalized, as an addition of its own would be.

Root mean square layer normalization: Zhang and Sennrich 2019, equation 4.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch

# the widest access of a thread
VECTOR_BYTES = 16
# vectors that a thread should have of a row, if it may choose the number of warps
VECTORS = 4
MAX_WARPS = 8
# chunks of a row in registers; of rows with more, every chunk is read twice
MAX_CHUNKS = 8


def rms_norm_reference(
    x: Tensor,  # (M, D)
    weight: Tensor,  # (D,)
    eps: float,
    residual: Tensor | None = None,  # (M, D)
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # y, r (M, D), x's dtype; rstd (M,) float32
    """Add the residual, if any, and normalize in float32.

    r    = x + residual
    rstd = 1 / sqrt(mean(r^2) + eps)
    y    = (weight + offset) * r * rstd
    """
    r = x if residual is None else x + residual
    wide = r.float()
    rstd = torch.rsqrt(wide.square().mean(dim=1) + eps)
    return (wide * rstd[:, None] * (weight.float() + offset)).to(x.dtype), r, rstd


def rms_norm_backward_reference(
    grad_y: Tensor,  # (M, D)
    grad_r: Tensor | None,  # (M, D)
    r: Tensor,  # (M, D)
    rstd: Tensor,  # (M,) float32
    weight: Tensor,  # (D,)
    offset: float = 0.0,
) -> Tensor:  # (M, D), r's dtype
    """Compute the gradient of r in float32, rounded once.

    g    = (weight + offset) * grad_y
    grad = rstd * (g - n * mean(g n)) + grad_r          n = r * rstd
    """
    normalized = r.float() * rstd[:, None]
    g = grad_y.float() * (weight.float() + offset)
    slope = (g * normalized).mean(dim=1, keepdim=True)
    grad = rstd[:, None] * (g - normalized * slope)
    return (grad if grad_r is None else grad + grad_r.float()).to(r.dtype)


@triton.jit
def _load_row(row_ptr, D, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        tiles = tiles + (tl.load(row_ptr + offs, mask=offs < D, other=0.0),)  # noqa: RUF005, triton knows no star
    return tiles


@triton.jit
def _factor(weight, OFFSET: tl.constexpr):
    w = weight.to(tl.float32)
    if OFFSET != 0:
        w += OFFSET
    return w


@triton.jit
def _rms_norm_kernel(
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
    HAS_RESIDUAL: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # 0: the row does not fit the registers
):
    # one program normalizes one row
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    residual_ptr += row * stride_residual_m
    y_ptr += row * stride_ym
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
            y = rows[chunk].to(tl.float32) * rstd * _factor(weights[chunk], OFFSET)
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
            w = _factor(tl.load(weight_ptr + offs, mask=offs < D, other=0.0), OFFSET)
            y = r * rstd * w
            tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < D)


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
    HAS_GRAD_R: tl.constexpr,
    WRITES_Y: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # 0: the row does not fit the registers
):
    # one program computes the gradient of one row. It may write over grad_y or grad_r: of a row in
    # registers, a thread reads all of its values before it writes any; of one that is read twice,
    # the sum between ends the first reading for all threads, and each chunk is read again before it
    # is written
    row = tl.program_id(0).to(tl.int64)
    grad_y_ptr += row * stride_grad_ym
    grad_r_ptr += row * stride_grad_rm
    r_ptr += row * stride_rm
    grad_ptr += row * stride_grad_m
    y_ptr += row * stride_ym
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros((CHUNK,), tl.float32)
    if CHUNKS > 0:
        grads_y = _load_row(grad_y_ptr, D, CHUNK, CHUNKS)
        rows = _load_row(r_ptr, D, CHUNK, CHUNKS)
        if HAS_GRAD_R:
            grads_r = _load_row(grad_r_ptr, D, CHUNK, CHUNKS)
        weights = _load_row(weight_ptr, D, CHUNK, CHUNKS)
        for chunk in tl.static_range(CHUNKS):
            g = grads_y[chunk].to(tl.float32) * _factor(weights[chunk], OFFSET)
            products += g * rows[chunk].to(tl.float32)
            if WRITES_Y:
                # after the sum more would be held at once, and sm_80 spills
                offs = chunk * CHUNK + tl.arange(0, CHUNK)
                y = rows[chunk].to(tl.float32) * rstd * _factor(weights[chunk], OFFSET)
                tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < D)
    else:
        for start in range(0, D, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            grad_y = tl.load(grad_y_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            w = _factor(tl.load(weight_ptr + offs, mask=offs < D, other=0.0), OFFSET)
            r = tl.load(r_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            products += grad_y * w * r
    # the mean of g r rstd; r rstd is of order one where rstd^3 may overflow
    slope = tl.div_rn(tl.sum(products, 0) * rstd, D * 1.0)
    if CHUNKS > 0:
        for chunk in tl.static_range(CHUNKS):
            offs = chunk * CHUNK + tl.arange(0, CHUNK)
            g = grads_y[chunk].to(tl.float32) * _factor(weights[chunk], OFFSET)
            grad = rstd * (g - rows[chunk].to(tl.float32) * rstd * slope)
            if HAS_GRAD_R:
                grad += grads_r[chunk].to(tl.float32)
            tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=offs < D)
    else:
        for start in range(0, D, CHUNK):
            offs = start + tl.arange(0, CHUNK)
            grad_y = tl.load(grad_y_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            w = _factor(tl.load(weight_ptr + offs, mask=offs < D, other=0.0), OFFSET)
            r = tl.load(r_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            grad = rstd * (grad_y * w - r * rstd * slope)
            if HAS_GRAD_R:
                grad += tl.load(grad_r_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
            tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=offs < D)
            if WRITES_Y:
                y = r * rstd * w
                tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < D)


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


def _launch_rms_norm(
    x: Tensor,  # (M, D)
    weight: Tensor,  # (D,)
    eps: float,
    residual: Tensor | None = None,  # (M, D)
    out: Tensor | None = None,  # (M, D)
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # y, r (M, D); rstd (M,) float32
    M, D = x.shape
    y = torch.empty((M, D), dtype=x.dtype, device=x.device) if out is None else out
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    has_residual = residual is not None
    r = torch.empty((M, D), dtype=x.dtype, device=x.device) if has_residual else x
    addend = residual if has_residual else x
    if M > 0:
        launch(
            _rms_norm_kernel,
            (M,),
            y,
            r,
            rstd,
            x,
            addend,
            weight,
            D,
            eps,
            y.stride(0),
            x.stride(0),
            addend.stride(0),
            OFFSET=offset,
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
    out: Tensor | None = None,  # (M, D), may be grad_y or grad_r
    y: Tensor | None = None,  # (M, D), written; may be grad_y
    offset: float = 0.0,
) -> Tensor:  # (M, D)
    M, D = r.shape
    grad = torch.empty((M, D), dtype=r.dtype, device=r.device) if out is None else out
    has_grad_r = grad_r is not None
    addend = grad_r if has_grad_r else grad_y
    if M > 0:
        launch(
            _rms_norm_backward_kernel,
            (M,),
            grad,
            grad if y is None else y,
            grad_y,
            addend,
            r,
            rstd,
            weight,
            D,
            grad.stride(0),
            grad.stride(0) if y is None else y.stride(0),
            grad_y.stride(0),
            addend.stride(0),
            r.stride(0),
            OFFSET=offset,
            HAS_GRAD_R=has_grad_r,
            WRITES_Y=y is not None,
            enable_fp_fusion=True,
            **_shape(r),
        )
    return grad


def _check(weight: Tensor, **matrices: Tensor | None) -> None:
    """Refuse matrices, by name, that are not like the first, and a weight that does not fit it."""
    given = {name: matrix for name, matrix in matrices.items() if matrix is not None}
    first, x = next(iter(given.items()))
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{first} must be bfloat16, float16 or float32: got {x.dtype}")
    if x.dim() != 2 or x.shape[1] == 0 or weight.shape != x.shape[1:]:
        raise ValueError(
            f"{first} must be a matrix of rows as long as the weight: "
            f"got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    for name, matrix in given.items():
        if (matrix.shape, matrix.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"{name} must have {first}'s shape and dtype, {tuple(x.shape)} and {x.dtype}: "
                f"got {tuple(matrix.shape)} and {matrix.dtype}"
            )
        if matrix.stride(1) != 1 and matrix.shape[1] > 1:
            raise ValueError(f"{name} must have contiguous rows: got strides {matrix.stride()}")
    for name in given.keys() & {"out", "y"}:
        written = given[name]
        if written.shape[0] > 1 and written.stride(0) < written.shape[1]:
            raise ValueError(
                f"{name} must have rows that do not overlap: got strides {written.stride()}"
            )
    if not weight.is_contiguous():
        raise ValueError(f"the weight must be contiguous: got stride {weight.stride(0)}")
    devices = {tensor.device for tensor in (weight, *given.values())}
    if len(devices) > 1:
        names = ", ".join(("weight", *given))
        raise ValueError(f"{names} must be on one device: got {x.device} and others")
    if weight.requires_grad:
        raise ValueError("the weight must be frozen: got one that requires a gradient")
    if torch.is_grad_enabled() and any(matrix.requires_grad for matrix in given.values()):
        raise ValueError(
            "nothing is recorded for autograd: got a matrix that requires a gradient; "
            "call under torch.no_grad(), and rms_norm_backward for the gradient"
        )


def rms_norm(
    x: Tensor,  # (M, D)
    weight: Tensor,  # (D,), frozen
    eps: float,
    residual: Tensor | None = None,  # (M, D)
    out: Tensor | None = None,  # (M, D)
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # y, r (M, D), x's dtype; rstd (M,) float32
    """Add a residual and normalize the sum by its root mean square.

        r    = x + residual
        rstd = 1 / sqrt(mean(r^2) + eps)
        y    = (weight + offset) * r * rstd

    Args:
        out: what to write y into, for instance the first D columns of a wider matrix, whose other
            columns stay as they are; shares no memory with x or residual. A new tensor if None.
        offset: what the weights are stored less, added in float32.

    Returns:
        y: out, if that is given.
        r: x itself without a residual, a new tensor with one. `rms_norm_backward` needs it.
        rstd: what `rms_norm_backward` needs beside r.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a row is not contiguous, or something
            requires a gradient.
    """
    _check(weight, x=x, residual=residual, out=out)
    if x.device.type == "cpu":
        y, r, rstd = rms_norm_reference(x, weight, eps, residual, offset)
        return y if out is None else out.copy_(y), r, rstd
    return _launch_rms_norm(x, weight, eps, residual, out, offset)


def rms_norm_backward(
    grad_y: Tensor,  # (M, D)
    grad_r: Tensor | None,  # (M, D)
    r: Tensor,  # (M, D)
    rstd: Tensor,  # (M,) float32
    weight: Tensor,  # (D,), frozen
    out: Tensor | None = None,  # (M, D)
    y: Tensor | None = None,  # (M, D)
    offset: float = 0.0,
) -> Tensor:  # (M, D), r's dtype
    """Compute the gradient of `rms_norm`'s r, which is that of x and of the residual.

        g    = (weight + offset) * grad_y
        grad = rstd * (g - r * rstd^2 * mean(g r)) + grad_r

    Args:
        grad_r: what reaches r past the norm, along the residual stream; nothing if None.
        out: what to write into and return. May be grad_y or grad_r, which is then overwritten;
            shares no other memory with what is read. A new tensor if None.
        y: what to write the norm's result into again, bit for bit, for whoever did not keep it: the
            gradient of a low-rank update needs it. May be grad_y, if out is not.
        offset: that of the forward pass.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a row is not contiguous, or something
            requires a gradient.
    """
    _check(weight, r=r, grad_y=grad_y, grad_r=grad_r, out=out, y=y)
    if (rstd.shape, rstd.dtype) != (r.shape[:1], torch.float32) or not rstd.is_contiguous():
        raise ValueError(
            f"rstd must be contiguous float32 of shape ({r.shape[0]},): "
            f"got {rstd.dtype} of shape {tuple(rstd.shape)} and strides {rstd.stride()}"
        )
    if rstd.device != r.device:
        raise ValueError(f"rstd and r must be on one device: got {rstd.device} and {r.device}")
    if r.device.type == "cpu":
        grad = rms_norm_backward_reference(grad_y, grad_r, r, rstd, weight, offset)
        if y is not None:
            y.copy_(r.float() * rstd[:, None] * (weight.float() + offset))
        return grad if out is None else out.copy_(grad)
    return _launch_rms_norm_backward(grad_y, grad_r, r, rstd, weight, out, y, offset)
