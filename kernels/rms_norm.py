"""Normalize rows by their root mean square, with the residual addition before it, on the GPU.

    r    = x + residual                              or x, where there is nothing to add
    y    = w * r * rstd                              rstd = 1 / sqrt(mean(r^2) + eps)

    grad = rstd * (g - r * rstd^2 * mean(g r)) + grad_r          g = w * grad_y

    w    = weight + offset                           offset is 1 where a model stores weights less 1

Where rows are centred, r - mean(r) takes r's place in y, rstd and grad, whose own mean goes too:

    grad = rstd * (g - mean(g) - ...) + grad_r       layer normalization without a bias

    row of D | chunk 0   | chunk 1   | ...       16 bytes a thread and chunk: 8 values in 16 bit
                 sum of squares                  over the chunks in registers, then once across
                                                 the program's threads

One program holds a row in registers, so each tensor is moved once; a row too long for that is read
twice, the second time from L2. With D values in S bytes each, a row moves

    forward     2 D S + 4      with a residual 4 D S + 4: two read, two written
    backward    3 D S + 4      with the gradient of r 4 D S + 4, with y again D S more

and costs about 4 D FLOPs forward, 8 D backward: memory bandwidth is the limit. The weights are
frozen: no gradient of theirs, and no pass to add it up over the rows. They come from L2, and so do
not count. The backward pass needs r, which is the residual stream and is kept anyway, and rstd, but
not y.

Autograd records neither function: the layer writes its backward pass out, and says where results
go. A matrix may be the first columns of wider rows; accesses stay 16 bytes wide where its row
stride is a multiple of 16 values.

The arithmetic is float32, rounded once, where transformers rounds r * rstd before the weight is
applied. r is rounded to x's dtype before it is normalized, as by a separate addition.

Root mean square layer normalization: Zhang and Sennrich 2019, equation 4. Layer normalization: Ba
et al. 2016, equation 4.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

import torch
from torch import Tensor

from kernels.language import tl, triton
from kernels.launch import launch
from kernels.rms_norm_long import _rms_norm_long_kernel
from kernels.rms_norm_row import (
    centred,
    centred_reference,
    check_rows,
    factor_of,
    load_row,
    mean_of,
    quantizes,
    rstd_of,
    shape_of,
    sum_with_residual,
)
from kernels.rotation import EightBitRows
from kernels.rows_8bit import (
    check_8bit_rows,
    magnitude_bits,
    no_magnitudes,
    quantize_rows,
    scale_of_bits,
    store_quantized,
)


def rms_norm_reference(
    x: Tensor,  # (M, D)
    weight: Tensor,  # (D,)
    eps: float,
    residual: Tensor | None = None,  # (M, D)
    offset: float = 0.0,
    is_centred: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # y, r (M, D), x's dtype; rstd (M,) float32
    """Add the residual, if any, and normalize in float32.

    r    = x + residual                              centred behind this line, where rows are
    rstd = 1 / sqrt(mean(r^2) + eps)
    y    = (weight + offset) * r * rstd
    """
    r = x if residual is None else x + residual
    wide = centred_reference(r, is_centred)
    rstd = torch.rsqrt(wide.square().mean(dim=1) + eps)
    return (wide * rstd[:, None] * (weight.float() + offset)).to(x.dtype), r, rstd


@triton.jit
def _rms_norm_kernel(
    y_ptr,  # (M, D)
    r_ptr,  # (M, D), contiguous, written where there is a residual
    rstd_ptr,  # (M,)
    x_ptr,  # (M, D)
    residual_ptr,  # (M, D)
    weight_ptr,  # (D,)
    values_ptr,  # (M, D) E4M3 or INT8, of y, written if IN_8_BITS; so the scales
    scales_ptr,  # (M,)
    D,
    eps,
    stride_ym,
    stride_xm,
    stride_residual_m,
    stride_vm,
    OFFSET: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IN_8_BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program normalizes one row, which it holds in registers
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    residual_ptr += row * stride_residual_m
    y_ptr += row * stride_ym
    r_ptr += row * D
    squares = tl.zeros((CHUNK,), tl.float32)
    total = tl.zeros((CHUNK,), tl.float32)
    # all loads are under way before the first is worked on
    tiles = load_row(x_ptr, D, CHUNK, CHUNKS)
    if HAS_RESIDUAL:
        addends = load_row(residual_ptr, D, CHUNK, CHUNKS)
    weights = load_row(weight_ptr, D, CHUNK, CHUNKS)
    rows = ()
    for chunk in tl.static_range(CHUNKS):
        r = tiles[chunk]
        if HAS_RESIDUAL:
            r = sum_with_residual(r, addends[chunk], r_ptr.dtype.element_ty)
            offs = chunk * CHUNK + tl.arange(0, CHUNK)
            tl.store(r_ptr + offs, r, mask=offs < D)
        rows = rows + (r,)  # noqa: RUF005, triton knows no star
        if IS_CENTRED:
            total += r.to(tl.float32)
    mean = mean_of(total, D, IS_CENTRED)
    for chunk in tl.static_range(CHUNKS):
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        r = centred(rows[chunk], mean, offs < D, IS_CENTRED)
        squares += r * r
    rstd = rstd_of(squares, D, eps)
    tl.store(rstd_ptr + row, rstd)
    FORMAT: tl.constexpr = values_ptr.dtype.element_ty
    bits = no_magnitudes(CHUNK, FORMAT)
    ys = ()
    for chunk in tl.static_range(CHUNKS):
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        r = centred(rows[chunk], mean, offs < D, IS_CENTRED)
        y = (r * rstd * factor_of(weights[chunk], OFFSET)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs, y, mask=offs < D)
        if IN_8_BITS:
            bits = tl.maximum(bits, magnitude_bits(y, FORMAT))
            ys = ys + (y,)  # noqa: RUF005
    if IN_8_BITS:
        scale = scale_of_bits(bits, y_ptr.dtype.element_ty, FORMAT)
        tl.store(scales_ptr + row, scale)
        store_quantized(values_ptr + row * stride_vm, ys, scale, D, CHUNK, CHUNKS)


def _launch_rms_norm(
    x: Tensor,  # (M, D)
    weight: Tensor,  # (D,)
    eps: float,
    residual: Tensor | None = None,  # (M, D)
    out: Tensor | None = None,  # (M, D)
    offset: float = 0.0,
    is_centred: bool = False,
    in_8_bits: EightBitRows | None = None,  # (M, D)
) -> tuple[Tensor, Tensor, Tensor]:  # y, r (M, D); rstd (M,) float32
    M, D = x.shape
    y = torch.empty((M, D), dtype=x.dtype, device=x.device) if out is None else out
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    has_residual = residual is not None
    r = torch.empty((M, D), dtype=x.dtype, device=x.device) if has_residual else x
    addend = residual if has_residual else x
    shape = shape_of(x, is_centred)
    is_long = "CHUNKS" not in shape
    is_quantized = in_8_bits is not None and quantizes(shape)
    # stand-ins for what is not written
    values, scales = (y, rstd) if in_8_bits is None else in_8_bits
    arguments = (
        {}
        if is_long
        else {
            "values_ptr": values,
            "scales_ptr": scales,
            "stride_vm": values.stride(0),
            "IN_8_BITS": is_quantized,
        }
    )
    if M > 0:
        launch(
            _rms_norm_long_kernel if is_long else _rms_norm_kernel,
            (M,),
            y_ptr=y,
            r_ptr=r,
            rstd_ptr=rstd,
            x_ptr=x,
            residual_ptr=addend,
            weight_ptr=weight,
            D=D,
            eps=eps,
            stride_ym=y.stride(0),
            stride_xm=x.stride(0),
            stride_residual_m=addend.stride(0),
            OFFSET=offset,
            IS_CENTRED=is_centred,
            HAS_RESIDUAL=has_residual,
            # multiply-adds round less
            enable_fp_fusion=True,
            **arguments,
            **shape,
        )
    if in_8_bits is not None and not is_quantized:
        quantize_rows(y, in_8_bits)
    return y, r, rstd


def rms_norm(
    x: Tensor,  # (M, D)
    weight: Tensor,  # (D,), frozen
    eps: float,
    residual: Tensor | None = None,  # (M, D)
    out: Tensor | None = None,  # (M, D)
    offset: float = 0.0,
    is_centred: bool = False,
    in_8_bits: EightBitRows | None = None,  # (M, D)
) -> tuple[Tensor, Tensor, Tensor]:  # y, r (M, D), x's dtype; rstd (M,) float32
    """Add a residual and normalize the sum by its root mean square.

        r    = x + residual
        rstd = 1 / sqrt(mean(r^2) + eps)
        y    = (weight + offset) * r * rstd

    Args:
        out: the matrix that takes y, for instance the first D columns of a wider one, whose other
            columns stay as they are; shares no memory with x or residual. A new tensor if None.
        offset: added to the weights, in float32.
        is_centred: r - mean(r) takes r's place in rstd and y.
        in_8_bits: takes y in 8 bits, as `quantize_rows` makes it, in the same pass.

    Returns:
        y: out, if that is given.
        r: x itself without a residual, a new tensor with one. `rms_norm_backward` needs it.
        rstd: what `rms_norm_backward` needs beside r.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a row is not contiguous, or something
            requires a gradient.
    """
    check_rows(weight, x=x, residual=residual, out=out)
    if in_8_bits is not None:
        check_8bit_rows(x, in_8_bits)
    if x.device.type == "cpu":
        y, r, rstd = rms_norm_reference(x, weight, eps, residual, offset, is_centred)
        y = y if out is None else out.copy_(y)
        if in_8_bits is not None:
            quantize_rows(y, in_8_bits)
        return y, r, rstd
    return _launch_rms_norm(x, weight, eps, residual, out, offset, is_centred, in_8_bits)
