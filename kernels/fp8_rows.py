"""Quantize the rows of a matrix to E4M3 with a scale each, on the GPU.

    scales[m] = max |x[m]| / 448
    values[m] = E4M3(x[m] / scales[m])

    row of D | chunk 0 | chunk 1 | ...       16 bytes a thread and chunk, in registers

One program reads a row once, finds its largest magnitude and writes 8 bits a value: 3 M D + 4 M
bytes for M rows of D values, and memory bandwidth is the limit. A row of more than MAX_CHUNKS
chunks does not fit the registers, and is read once more, from L2. Equals the reference bit for bit.

A row that holds a NaN or an infinity gets a NaN as its scale, so that a product has NaN in it, and
a step with such a gradient is skipped. A row of zeros has zeros, and a small scale.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

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
    Fp8Rows,
    empty_fp8_rows,
    fp8_obstacle,
    scale_of,
)
from kernels.language import tl, triton
from kernels.launch import cdiv, launch
from kernels.rms_norm_row import VECTOR_BYTES, VECTORS, load_row

DTYPES = (torch.bfloat16, torch.float16)
MAX_WARPS = 16
# 128 values a thread, two of them a register
MAX_CHUNKS = 16
LEAST = tl.constexpr(LEAST_LARGEST)
STEP = tl.constexpr(SCALE_OF_LARGEST)


def quantize_rows_reference(
    x: Tensor,  # (M, D)
    out: Fp8Rows,  # written
) -> None:
    """Scale in float32, rounded once to E4M3."""
    out.scales.copy_(scale_of(x.abs().amax(dim=1).float()))
    out.values.copy_((x.float() * out.scales.reciprocal()[:, None]).to(E4M3))


@triton.jit
def magnitude_bits(x):
    # of numbers in 16 bits: without their sign they are in the order of their bits, and a NaN is
    # above all
    return x.to(tl.int16, bitcast=True) & 0x7FFF


@triton.jit
def scale_of_bits(bits, DTYPE: tl.constexpr):  # (), of the magnitudes of a row
    largest = tl.max(bits, 0).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return tl.where(largest < float("inf"), tl.maximum(largest, LEAST) * STEP, float("nan"))


@triton.jit
def store_quantized(values_ptr, tiles, scale, D, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    inverse = tl.div_rn(1.0, scale)
    for chunk in tl.static_range(CHUNKS):
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        values = (tiles[chunk].to(tl.float32) * inverse).to(values_ptr.dtype.element_ty)
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
    bits = tl.zeros((CHUNK,), tl.int16)
    for chunk in tl.static_range(CHUNKS):
        bits = tl.maximum(bits, magnitude_bits(tiles[chunk]))
    scale = scale_of_bits(bits, x_ptr.dtype.element_ty)
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
    bits = tl.zeros((CHUNK,), tl.int16)
    for first in range(0, D, CHUNK):
        offs = first + tl.arange(0, CHUNK)
        bits = tl.maximum(bits, magnitude_bits(tl.load(x_ptr + offs, mask=offs < D, other=0.0)))
    scale = scale_of_bits(bits, x_ptr.dtype.element_ty)
    tl.store(scales_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    for first in range(0, D, CHUNK):
        offs = first + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + offs, mask=offs < D, other=0.0).to(tl.float32)
        values = (x * inverse).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + offs, values, mask=offs < D)


def _shape_of(x: Tensor) -> tuple[int, int]:
    """Choose the warps and the chunks of a row."""
    warp_width = 32 * VECTOR_BYTES // x.element_size()
    wanted = max(x.shape[1] // (VECTORS * warp_width), 1)
    num_warps = min(1 << (wanted.bit_length() - 1), MAX_WARPS)
    return num_warps, cdiv(x.shape[1], num_warps * warp_width)


def _launch_quantize_rows(x: Tensor, out: Fp8Rows) -> None:
    M, D = x.shape
    num_warps, num_chunks = _shape_of(x)
    if M == 0:
        return
    is_long = num_chunks > MAX_CHUNKS
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


def check_fp8_rows(x: Tensor, out: Fp8Rows) -> None:
    """Refuse rows to be written that do not fit a matrix, and GPUs without E4M3."""
    if x.dim() != 2 or not x.shape[1] or x.dtype not in DTYPES:
        raise ValueError(
            "x must be a matrix with columns in bfloat16 or float16: got shape "
            f"{tuple(x.shape)} in {x.dtype}"
        )
    check_rows_are_contiguous("x", x)
    check_is("the values", out.values, E4M3, tuple(x.shape))
    check_is("the scales", out.scales, torch.float32, (x.shape[0],))
    check_rows_are_contiguous("the values", out.values)
    check_rows_are_apart("the values", out.values)
    check_rows_are_contiguous("the scales", out.scales)
    check_one_device({"x": x, "the values": out.values, "the scales": out.scales})
    if x.device.type == "cpu":
        return
    if obstacle := fp8_obstacle(properties(x.device).capability):
        raise RuntimeError(obstacle)


def quantize_rows(
    x: Tensor,  # (M, D), rows of any stride
    out: Fp8Rows | None = None,  # the values of any row stride
) -> Fp8Rows:
    """Quantize the rows of a matrix to E4M3 with a scale each.

        scales[m] = max |x[m]| / 448
        values[m] = E4M3(x[m] / scales[m])

    Args:
        out: what to write into and return; new tensors if None.

    Raises:
        ValueError: x is not a matrix with columns in bfloat16 or float16, or has scattered rows, or
            `out` does not fit it.
        RuntimeError: the GPU has no FP8 products.
    """
    out = empty_fp8_rows(x.shape, x.device) if out is None else out
    check_fp8_rows(x, out)
    if x.device.type == "cpu":
        quantize_rows_reference(x, out)
    else:
        _launch_quantize_rows(x, out)
    return out
