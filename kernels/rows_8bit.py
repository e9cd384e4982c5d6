"""Quantize the rows of a matrix to 8 bits with a scale each, on the GPU.

    E4M3    scales[m] = max |x[m]| / 448        values[m] = E4M3(x[m] / scales[m])
    INT8    scales[m] = max |x'[m]| / 127       values[m] = round(x'[m] / scales[m])

    row of D | chunk 0 | chunk 1 | ...       16 bytes a thread and chunk, in registers

x' is x with every 16 columns mixed by a Hadamard rotation (`rotation.py`). What is written says
which of the two it is.

One program reads a row once, finds its largest magnitude and writes 8 bits a value: 3 M D + 4 M
bytes for M rows of D values, and memory bandwidth is the limit. A row of more than MAX_CHUNKS
chunks does not fit the registers, and is read once more, from L2; so is a rotated one, which takes
32 bits a value, of more than a fourth of those. Equals the reference bit for bit.

A row that holds a NaN or an infinity gets a NaN as its scale, so that a product has NaN in it, and
a step with such a gradient is skipped. A row of zeros has zeros, and a small scale.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kernels.checks import (
    check_is,
    check_one_device,
    check_rows_are_apart,
    check_rows_are_contiguous,
)
from kernels.device import properties
from kernels.fp8 import (
    E4M3,
    LEAST_LARGEST,
    SCALE_OF_LARGEST,
    empty_fp8_rows,
    fp8_obstacle,
    scale_of,
)
from kernels.language import tl, triton
from kernels.launch import cdiv, launch
from kernels.rms_norm_row import VECTOR_BYTES, VECTORS, load_row
from kernels.rotation import (
    INT8,
    INT8_SCALE_OF_LARGEST,
    WIDTH,
    EightBitRows,
    RotatedRows,
    empty_rotated_rows,
    in_int8,
    int8_scale_of,
    rotate,
    rotated,
    round_to_int8,
)

Written = TypeVar("Written", bound=EightBitRows)

DTYPES = (torch.bfloat16, torch.float16)
MAX_WARPS = 16
# 128 values a thread, two of them a register; rotated ones take one each
MAX_CHUNKS = {E4M3: 16, INT8: 4}
LEAST = tl.constexpr(LEAST_LARGEST)
STEP = tl.constexpr(SCALE_OF_LARGEST)
INT8_STEP = tl.constexpr(INT8_SCALE_OF_LARGEST)


def empty_8bit_rows(
    shape: Sequence[int],  # (M, D)
    format: torch.dtype,  # E4M3 or INT8
    device: torch.device,
) -> EightBitRows:
    """Allocate a matrix with a scale a row."""
    return empty_rotated_rows(shape, device) if format == INT8 else empty_fp8_rows(shape, device)


def quantize_rows_reference(
    x: Tensor,  # (M, D)
    out: EightBitRows,  # written
) -> None:
    """Scale in float32, rounded once to 8 bits."""
    if isinstance(out, RotatedRows):
        mixed = rotated(x)
        out.scales.copy_(int8_scale_of(mixed.abs().amax(dim=1)))
        out.values.copy_(in_int8(mixed * out.scales.reciprocal()[:, None]))
    else:
        out.scales.copy_(scale_of(x.abs().amax(dim=1).float()))
        out.values.copy_((x.float() * out.scales.reciprocal()[:, None]).to(E4M3))


# of the functions below FORMAT is what is written: tl.int8, or the dtype that is E4M3


@triton.jit
def no_magnitudes(CHUNK: tl.constexpr, FORMAT: tl.constexpr):
    return tl.zeros((CHUNK,), tl.int32 if tl.int8 == FORMAT else tl.int16)


@triton.jit
def magnitude_bits(x, FORMAT: tl.constexpr):  # (CHUNK,) in 16 bits
    # without their sign numbers are in the order of their bits, and a NaN is above all
    if tl.int8 == FORMAT:
        return rotate(x.to(tl.float32)).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        return x.to(tl.int16, bitcast=True) & 0x7FFF


@triton.jit
def scale_of_bits(bits, DTYPE: tl.constexpr, FORMAT: tl.constexpr):  # (), of a row's magnitudes
    if tl.int8 == FORMAT:
        largest = tl.max(bits, 0).to(tl.float32, bitcast=True)
        scale = tl.maximum(largest, LEAST) * INT8_STEP
    else:
        largest = tl.max(bits, 0).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        scale = tl.maximum(largest, LEAST) * STEP
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit
def in_8_bits(x, inverse, FORMAT: tl.constexpr):  # (CHUNK,) in 16 bits
    if tl.int8 == FORMAT:
        return round_to_int8(rotate(x.to(tl.float32)) * inverse)
    else:
        return (x.to(tl.float32) * inverse).to(FORMAT)


@triton.jit
def store_quantized(values_ptr, tiles, scale, D, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    inverse = tl.div_rn(1.0, scale)
    for chunk in tl.static_range(CHUNKS):
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        values = in_8_bits(tiles[chunk], inverse, values_ptr.dtype.element_ty)
        tl.store(values_ptr + offs, values, mask=offs < D)


@triton.jit
def _quantize_rows_kernel(
    values_ptr,  # (M, D)
    scales_ptr,  # (M,)
    x_ptr,  # (M, D)
    D,
    stride_vm,
    stride_xm,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program quantizes one row
    row = tl.program_id(0).to(tl.int64)
    tiles = load_row(x_ptr + row * stride_xm, D, CHUNK, CHUNKS)
    FORMAT: tl.constexpr = values_ptr.dtype.element_ty
    bits = no_magnitudes(CHUNK, FORMAT)
    for chunk in tl.static_range(CHUNKS):
        bits = tl.maximum(bits, magnitude_bits(tiles[chunk], FORMAT))
    scale = scale_of_bits(bits, x_ptr.dtype.element_ty, FORMAT)
    tl.store(scales_ptr + row, scale)
    store_quantized(values_ptr + row * stride_vm, tiles, scale, D, CHUNK, CHUNKS)


@triton.jit
def _quantize_long_rows_kernel(
    values_ptr,  # (M, D)
    scales_ptr,  # (M,)
    x_ptr,  # (M, D)
    D,
    stride_vm,
    stride_xm,
    CHUNK: tl.constexpr,
):
    # one program quantizes one row, which it reads twice, the second time from L2
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    values_ptr += row * stride_vm
    FORMAT: tl.constexpr = values_ptr.dtype.element_ty
    bits = no_magnitudes(CHUNK, FORMAT)
    for first in range(0, D, CHUNK):
        offs = first + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + offs, mask=offs < D, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x, FORMAT))
    scale = scale_of_bits(bits, x_ptr.dtype.element_ty, FORMAT)
    tl.store(scales_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    for first in range(0, D, CHUNK):
        offs = first + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + offs, mask=offs < D, other=0.0)
        tl.store(values_ptr + offs, in_8_bits(x, inverse, FORMAT), mask=offs < D)


def _shape_of(x: Tensor, format: torch.dtype) -> tuple[int, int]:
    """Choose the warps and the chunks of a row: rotated ones have at most VECTORS chunks, if there
    are warps for that, others at least as many."""
    warp_width = 32 * VECTOR_BYTES // x.element_size()
    wanted = x.shape[1] / (VECTORS * warp_width)
    exponent = math.log2(max(wanted, 1))
    num_warps = min(1 << (math.ceil(exponent) if format == INT8 else int(exponent)), MAX_WARPS)
    return num_warps, cdiv(x.shape[1], num_warps * warp_width)


def _launch_quantize_rows(x: Tensor, out: EightBitRows) -> None:
    M, D = x.shape
    num_warps, num_chunks = _shape_of(x, out.values.dtype)
    if M == 0:
        return
    is_long = num_chunks > MAX_CHUNKS[out.values.dtype]
    launch(
        _quantize_long_rows_kernel if is_long else _quantize_rows_kernel,
        (M,),
        values_ptr=out.values,
        scales_ptr=out.scales,
        x_ptr=x,
        D=D,
        stride_vm=out.values.stride(0),
        stride_xm=x.stride(0),
        CHUNK=num_warps * 32 * VECTOR_BYTES // x.element_size(),
        **({} if is_long else {"CHUNKS": num_chunks}),
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


def check_8bit_rows(x: Tensor, out: EightBitRows) -> None:
    """Refuse rows to be written that do not fit a matrix, and E4M3 on a GPU without it."""
    if x.dim() != 2 or not x.shape[1] or x.dtype not in DTYPES:
        raise ValueError(
            "x must be a matrix with columns in bfloat16 or float16: got shape "
            f"{tuple(x.shape)} in {x.dtype}"
        )
    check_rows_are_contiguous("x", x)
    if isinstance(out, RotatedRows) and x.shape[1] % WIDTH:
        raise ValueError(
            f"rows to be rotated must have a multiple of {WIDTH} columns: got {x.shape[1]}"
        )
    format = INT8 if isinstance(out, RotatedRows) else E4M3
    check_is("the values", out.values, format, tuple(x.shape))
    check_is("the scales", out.scales, torch.float32, (x.shape[0],))
    check_rows_are_contiguous("the values", out.values)
    check_rows_are_apart("the values", out.values)
    check_rows_are_contiguous("the scales", out.scales)
    check_one_device({"x": x, "the values": out.values, "the scales": out.scales})
    if x.device.type == "cpu" or format == INT8:
        return
    if obstacle := fp8_obstacle(properties(x.device).capability):
        raise RuntimeError(obstacle)


def quantize_rows(
    x: Tensor,  # (M, D), rows of any stride
    out: Written,  # (M, D), the values of any row stride
) -> Written:
    """Quantize the rows of a matrix to 8 bits with a scale each.

        E4M3    scales[m] = max |x[m]| / 448        values[m] = E4M3(x[m] / scales[m])
        INT8    scales[m] = max |x'[m]| / 127       values[m] = round(x'[m] / scales[m])

    x' is x with every 16 columns mixed by H (`rotation.py`).

    Args:
        out: what to write into and return, and so which of the two it is.

    Raises:
        ValueError: x is not a matrix with columns in bfloat16 or float16, or has scattered rows, or
            `out` does not fit it, or the columns of rows to be rotated are no multiple of 16.
        RuntimeError: E4M3 is asked of a GPU without FP8 products.
    """
    check_8bit_rows(x, out)
    if x.device.type == "cpu":
        quantize_rows_reference(x, out)
    else:
        _launch_quantize_rows(x, out)
    return out
