"""Expand an NF4 weight to INT8 with rotated columns and a scale a row, in one launch, on the GPU.

    W'[n]      = LEVELS[code[n]] H * absmax           every 16 columns, which share an absmax
    scales[n]  = max |W'[n]| / (127 * 16)
    values[n]  = round(W'[n] / (16 scales[n]))

    packed   | b0 .. b7     | ...        as it is: a thread expands 8 bytes to 16 values, which it
                  v                      rotates in registers and stores at once
    values   | e0 .. e15    | ...

It reads N K (1/2 + 1/B + 4 / (256 B)) + 4 N bytes, B the block size, and writes N K, with four sums
and a product a weight: memory bandwidth is the limit. The 16 is what H H multiplies a product by
(`rotation.py`). A row's scale stands with the frozen weight and is computed once, in a pass of its
own. Equals the reference bit for bit.
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import check_is, check_is_contiguous, check_one_device
from kernels.language import tl, triton
from kernels.launch import cdiv, launch
from kernels.nf4_decode import device_constant, load_absmax, member_table, scale_tensors
from kernels.nf4_to_fp8 import (
    CHUNK_BYTES,
    CHUNKS,
    NUM_WARPS,
    THREAD_BYTES,
    absmax_of,
    member_of,
    members_obstacle,
)
from kernels.rotation import (
    INT8,
    WIDTH,
    RotatedRows,
    in_int8,
    int8_scale_of,
    rotate,
    rotated,
    round_to_int8,
)
from nf4.blockwise import dequantize_blockwise
from nf4.weight import NF4Weight, member, member_spans

_WIDTH = tl.constexpr(WIDTH)
# weights that are expanded at once to find their rows' scales
SLICE = 1 << 23


class _Part(NamedTuple):
    """Some rows of a weight: levels, every 16 of them rotated, and the absmax of each 16."""

    rows: slice
    levels: Tensor  # (rows, K / 16, 16) float32
    absmax: Tensor  # (rows, K / 16) float32


def _parts_of(weight: NF4Weight) -> Iterator[_Part]:
    K, block_size = weight.in_features, weight.block_size
    step = max(SLICE // K, 1)
    spans = member_spans(weight.rows, K, block_size)
    for index, (span, num_rows) in enumerate(zip(spans, weight.rows, strict=True)):
        part = member(weight, index)
        first = torch.arange(0, span.num_elements, WIDTH, device=weight.device)
        absmax = absmax_of(part)[first // block_size].view(num_rows, -1)
        for start in range(0, num_rows, step):
            end = min(start + step, num_rows)
            packed = part.packed[start * K // 2 : end * K // 2]
            num_elements = (end - start) * K
            ones = absmax.new_ones(-(-num_elements // block_size))
            levels = dequantize_blockwise(packed, ones, block_size, num_elements, torch.float32)
            yield _Part(
                slice(span.row + start, span.row + end),
                rotated(levels).view(end - start, -1, WIDTH),
                absmax[start:end],
            )


def nf4_to_int8_reference(weight: NF4Weight, scales: Tensor) -> Tensor:  # (N, K) INT8
    """Expand rotated levels times scaled scales in float32, rounded once to INT8."""
    values = torch.empty(weight.shape, dtype=INT8, device=weight.device)
    for rows, levels, absmax in _parts_of(weight):
        factors = absmax * (scales[rows] * WIDTH).reciprocal()[:, None]
        values[rows] = in_int8(levels * factors[..., None]).flatten(1)
    return values


def int8_scales(weight: NF4Weight) -> Tensor:  # (N,) float32
    """Compute the scales of a weight's rotated rows.

        scales[n] = max |W'[n]| / (127 * 16)

    Raises:
        ValueError: a member's rows or columns are no multiples of 16.
    """
    if obstacle := members_obstacle(weight.rows, weight.in_features):
        raise ValueError(obstacle)
    largest = torch.empty(weight.shape[0], device=weight.device)
    # on the meta device there is nothing to look at
    for rows, levels, absmax in () if largest.is_meta else _parts_of(weight):
        largest[rows] = (levels.abs().amax(2) * absmax.abs()).amax(1)
    return int8_scale_of(largest) / WIDTH


@triton.jit
def _nf4_to_int8_kernel(
    out_ptr,  # (N, K), contiguous
    packed_ptr,
    absmax_ptr,
    group_absmax_ptr,
    absmax_mean_ptr,
    levels_ptr,
    dynamic_map_ptr,
    member_table_ptr,
    scales_ptr,  # (N,)
    num_rows,  # of all members
    in_features,
    NUM_MEMBERS: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program expands CHUNKS * CHUNK_BYTES packed bytes of one member
    row, byte_start, block_start, group_start, rows = member_of(
        member_table_ptr, num_rows, in_features, NUM_MEMBERS
    )
    num_bytes = rows * (in_features // 2)
    out_ptr += row * in_features
    packed_ptr += byte_start
    scales_ptr += row
    first = tl.program_id(0).to(tl.int64) * CHUNKS * CHUNK_BYTES
    if first < num_bytes:
        for chunk in tl.static_range(CHUNKS):
            start = first + chunk * CHUNK_BYTES
            offs = start + tl.arange(0, CHUNK_BYTES)
            byte = tl.load(packed_ptr + offs, mask=offs < num_bytes, other=0).to(tl.int32)
            # a row is a multiple of 16 weights, a block of 32: the bytes of a thread share both
            own = start + tl.arange(0, CHUNK_BYTES // THREAD_BYTES) * THREAD_BYTES
            is_inside = own < num_bytes
            factor = load_absmax(
                absmax_ptr,
                group_absmax_ptr,
                absmax_mean_ptr,
                dynamic_map_ptr,
                own * 2 // QUANT_BLOCK,
                block_start,
                group_start,
                tl.program_id(1),
                is_inside,
                DOUBLE_QUANT,
            )
            scale = tl.load(scales_ptr + own * 2 // in_features, mask=is_inside, other=1.0)
            factor *= tl.div_rn(1.0, scale * _WIDTH)
            factor = tl.broadcast_to(factor[:, None], (CHUNK_BYTES // THREAD_BYTES, _WIDTH))
            factor = tl.reshape(factor, (2 * CHUNK_BYTES,))
            high = tl.load(levels_ptr + (byte >> 4))
            low = tl.load(levels_ptr + (byte & 15))
            values = round_to_int8(rotate(tl.interleave(high, low)) * factor)
            offs_out = start * 2 + tl.arange(0, 2 * CHUNK_BYTES)
            tl.store(out_ptr + offs_out, values, mask=offs_out < num_bytes * 2)


def _launch_nf4_to_int8(weight: NF4Weight, out: RotatedRows) -> None:
    N, K = weight.shape
    launch(
        _nf4_to_int8_kernel,
        (cdiv(max(weight.rows) * K // 2, CHUNKS * CHUNK_BYTES), len(weight.rows)),
        out_ptr=out.values,
        packed_ptr=weight.packed,
        **scale_tensors(weight),
        levels_ptr=device_constant("levels", weight.device),
        dynamic_map_ptr=device_constant("dynamic_map", weight.device),
        member_table_ptr=member_table(weight.rows, K, weight.block_size, weight.device),
        scales_ptr=out.scales,
        num_rows=N,
        in_features=K,
        NUM_MEMBERS=len(weight.rows),
        QUANT_BLOCK=weight.block_size,
        DOUBLE_QUANT=weight.is_double_quantized,
        CHUNK_BYTES=CHUNK_BYTES,
        CHUNKS=CHUNKS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def nf4_to_int8(
    weight: NF4Weight,  # (N, K), all members
    scales: Tensor,  # (N,) float32, of `int8_scales`
    out: Tensor | None = None,  # (N, K) INT8, contiguous
) -> RotatedRows:
    """Expand an NF4 weight to INT8 with rotated columns, all its members in one launch.

        values[n] = round(LEVELS[code[n]] H * (absmax / (16 scales[n])))

    Args:
        out: what to write the values into; a new tensor if None.

    Raises:
        ValueError: a member's rows or columns are no multiples of 16, or the scales or `out` have
            another shape or dtype, lie on another device or are not contiguous.
    """
    if obstacle := members_obstacle(weight.rows, weight.in_features):
        raise ValueError(obstacle)
    if out is None:
        out = torch.empty(weight.shape, dtype=INT8, device=weight.device)
    check_is("the scales", scales, torch.float32, weight.shape[:1])
    check_is("out", out, INT8, weight.shape)
    check_is_contiguous("the scales", scales)
    check_is_contiguous("out", out)
    check_one_device({"the weight": weight.packed, "the scales": scales, "out": out})
    result = RotatedRows(out, scales)
    if weight.device.type == "cpu":
        out.copy_(nf4_to_int8_reference(weight, scales))
    else:
        _launch_nf4_to_int8(weight, result)
    return result
