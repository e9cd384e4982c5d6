"""Expand an NF4 weight to E4M3 with one scale, or its transpose, in one launch, on the GPU.

    scale      = max |absmax| / 448
    W8[n, k]   = E4M3(LEVELS[code[n, k]] * (absmax[block of (n, k)] / scale))

    packed   | b0 .. b7     | ...        as it is: a thread expands 8 bytes to 16 values,
                  v                      which it stores at once
    W8       | e0 .. e15    | ...

    packed   | tile: 128 rows of 32 bytes |        the transpose: values change places in
                  v                                shared memory, 16 of them a store
    W8T      | row 2 j: the high codes of byte j |
             | row 2 j + 1: the low codes        |

FP8 products take both operands along the columns that they add over, so y = x W^T wants W8 and
grad_x = grad_y W its transpose. Each reads N K (1/2 + 1/B + 4 / (256 B)) bytes, B the block size,
and writes N K: 1.516 bytes a weight at block size 64. Memory bandwidth is the limit.

Levels reach from -1 to 1, so no weight is larger than the largest absmax, and a block whose largest
weight was quantized has one that equals its absmax: the scale is known from the blocks' scales
alone. It stands with the frozen weight and is computed once. One scale does: the normal numbers of
E4M3 span 15 octaves, and with a scale a row the weights err as much (2.65 %). Equals the reference
bit for bit.
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels.checks import check_is, check_is_contiguous, check_one_device
from kernels.device import properties
from kernels.fp8 import ALIGNMENT as ROW_ALIGNMENT
from kernels.fp8 import E4M3, Fp8Weight, fp8_obstacle, scale_of, shape_obstacle
from kernels.language import tl, triton
from kernels.launch import cdiv, launch
from kernels.nf4_decode import (
    TABLE_COLUMNS,
    device_constant,
    load_absmax,
    member_table,
    scale_tensors,
)
from nf4.double_quant import QuantizedAbsmax, dequantize_absmax
from nf4.weight import NF4Weight, dequantize, member

NUM_WARPS = 4
# packed bytes of a thread
THREAD_BYTES = tl.constexpr(8)
CHUNK_BYTES = THREAD_BYTES.value * 32 * NUM_WARPS
# chunks per program, whose loads overlap
CHUNKS = 4
ALIGNMENT = tl.constexpr(ROW_ALIGNMENT)
# of the transpose: rows and packed columns of a tile
TILE_ROWS = 128
TILE_BYTES = 32


def absmax_of(weight: NF4Weight) -> Tensor:  # (num_blocks,) float32
    parts = [member(weight, index).absmax for index in range(len(weight.rows))]
    return torch.cat(
        [dequantize_absmax(part) if isinstance(part, QuantizedAbsmax) else part for part in parts]
    )


def nf4_to_fp8_reference(weight: NF4Weight, scale: Tensor) -> Tensor:  # (N, K) E4M3
    """Expand levels times scaled scales in float32, rounded once to E4M3."""
    scaled = replace(weight, absmax=absmax_of(weight) * scale.reciprocal())
    return dequantize(scaled, torch.float32).to(E4M3)


def fp8_scale(weight: NF4Weight) -> Tensor:  # () float32
    """Compute the one scale of a weight from the scales of its blocks.

        scale = max |absmax| / 448

    Double quantization may make a small absmax negative, hence the magnitude.
    """
    return scale_of(absmax_of(weight).abs().max())


@triton.jit
def member_of(member_table_ptr, num_rows, in_features, NUM_MEMBERS: tl.constexpr):
    # row, byte, block and group at which the program's member begins, and its number of rows
    if NUM_MEMBERS == 1:
        # the only one begins everything, and nothing waits for the table
        zero = tl.cast(0, tl.int64)
        return zero, zero, zero, zero, tl.cast(num_rows, tl.int64)
    else:
        line = member_table_ptr + tl.program_id(1) * TABLE_COLUMNS
        row = tl.multiple_of(tl.load(line), ALIGNMENT)
        byte = tl.multiple_of(tl.load(line + 1), ALIGNMENT)
        rows = tl.multiple_of(tl.load(line + 4) // in_features, ALIGNMENT)
        return row, byte, tl.load(line + 2), tl.load(line + 3), rows


@triton.jit
def _nf4_to_fp8_kernel(
    out_ptr,  # (N, K), contiguous
    packed_ptr,
    absmax_ptr,
    group_absmax_ptr,
    absmax_mean_ptr,
    levels_ptr,
    dynamic_map_ptr,
    member_table_ptr,
    scale_ptr,
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
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    first = tl.program_id(0).to(tl.int64) * CHUNKS * CHUNK_BYTES
    if first < num_bytes:
        for chunk in tl.static_range(CHUNKS):
            start = first + chunk * CHUNK_BYTES
            offs = start + tl.arange(0, CHUNK_BYTES)
            byte = tl.load(packed_ptr + offs, mask=offs < num_bytes, other=0).to(tl.int32)
            # a row is a multiple of 16 weights, a block of 32: the bytes of a thread share a scale
            own = start + tl.arange(0, CHUNK_BYTES // THREAD_BYTES) * THREAD_BYTES
            absmax = load_absmax(
                absmax_ptr,
                group_absmax_ptr,
                absmax_mean_ptr,
                dynamic_map_ptr,
                own * 2 // QUANT_BLOCK,
                block_start,
                group_start,
                tl.program_id(1),
                own < num_bytes,
                DOUBLE_QUANT,
            )
            absmax *= inverse
            absmax = tl.broadcast_to(absmax[:, None], (CHUNK_BYTES // THREAD_BYTES, THREAD_BYTES))
            absmax = tl.reshape(absmax, (CHUNK_BYTES,))
            high = tl.load(levels_ptr + (byte >> 4)) * absmax
            low = tl.load(levels_ptr + (byte & 15)) * absmax
            values = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
            offs_out = start * 2 + tl.arange(0, 2 * CHUNK_BYTES)
            tl.store(out_ptr + offs_out, values, mask=offs_out < num_bytes * 2)


@triton.jit
def _nf4_to_fp8_transposed_kernel(
    out_ptr,  # (K, N), contiguous
    packed_ptr,
    absmax_ptr,
    group_absmax_ptr,
    absmax_mean_ptr,
    levels_ptr,
    dynamic_map_ptr,
    member_table_ptr,
    scale_ptr,
    num_rows,  # of all members
    in_features,
    NUM_MEMBERS: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BYTES: tl.constexpr,
):
    # one program transposes TILE_ROWS rows of TILE_BYTES packed bytes of one member
    row, byte_start, block_start, group_start, rows = member_of(
        member_table_ptr, num_rows, in_features, NUM_MEMBERS
    )
    row_bytes = in_features // 2
    tiles = tl.cdiv(row_bytes, TILE_BYTES)
    first_row = (tl.program_id(0) // tiles).to(tl.int64) * TILE_ROWS
    first_j = tl.program_id(0) % tiles * TILE_BYTES
    if first_row < rows:
        # from here on in 32 bits
        offs_n = tl.arange(0, TILE_ROWS)[None, :]
        in_rows = offs_n < (rows - first_row).to(tl.int32)
        first_byte = first_row * row_bytes + first_j
        offs_j = tl.arange(0, TILE_BYTES)[:, None]
        in_tile = (first_j + offs_j < row_bytes) & in_rows
        packed_ptr += byte_start + first_byte
        byte = tl.load(packed_ptr + offs_n * row_bytes + offs_j, mask=in_tile, other=0)
        # 8 bytes of a row share a scale
        offs_own = tl.arange(0, TILE_BYTES // 8)[:, None] * 8
        own = first_byte + offs_n * row_bytes + offs_own
        absmax = load_absmax(
            absmax_ptr,
            group_absmax_ptr,
            absmax_mean_ptr,
            dynamic_map_ptr,
            own * 2 // QUANT_BLOCK,
            block_start,
            group_start,
            tl.program_id(1),
            (first_j + offs_own < row_bytes) & in_rows,
            DOUBLE_QUANT,
        )
        absmax *= tl.div_rn(1.0, tl.load(scale_ptr))
        absmax = tl.broadcast_to(absmax[:, None, :], (TILE_BYTES // 8, 8, TILE_ROWS))
        absmax = tl.reshape(absmax, (TILE_BYTES, TILE_ROWS))
        high = tl.load(levels_ptr + (byte >> 4).to(tl.int32)) * absmax
        low = tl.load(levels_ptr + (byte & 15).to(tl.int32)) * absmax
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        out_ptr += row + first_row + first_j.to(tl.int64) * (2 * num_rows)
        out_ptrs = out_ptr + offs_j * (2 * num_rows) + offs_n
        tl.store(out_ptrs, high.to(dtype), mask=in_tile)
        tl.store(out_ptrs + num_rows, low.to(dtype), mask=in_tile)


def _launch_nf4_to_fp8(
    weight: NF4Weight,
    scale: Tensor,  # () float32
    out: Tensor,  # (N, K) E4M3, or (K, N)
    is_transposed: bool,
) -> None:
    N, K = weight.shape
    rows = max(weight.rows)
    if is_transposed:
        kernel = _nf4_to_fp8_transposed_kernel
        tile = {"TILE_ROWS": TILE_ROWS, "TILE_BYTES": TILE_BYTES}
        num_programs = cdiv(rows, TILE_ROWS) * cdiv(K // 2, TILE_BYTES)
    else:
        kernel = _nf4_to_fp8_kernel
        tile = {"CHUNK_BYTES": CHUNK_BYTES, "CHUNKS": CHUNKS}
        num_programs = cdiv(rows * K // 2, CHUNKS * CHUNK_BYTES)
    launch(
        kernel,
        (num_programs, len(weight.rows)),
        out_ptr=out,
        packed_ptr=weight.packed,
        **scale_tensors(weight),
        levels_ptr=device_constant("levels", weight.device),
        dynamic_map_ptr=device_constant("dynamic_map", weight.device),
        member_table_ptr=member_table(weight.rows, K, weight.block_size, weight.device),
        scale_ptr=scale,
        num_rows=N,
        in_features=K,
        NUM_MEMBERS=len(weight.rows),
        QUANT_BLOCK=weight.block_size,
        DOUBLE_QUANT=weight.is_double_quantized,
        **tile,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def members_obstacle(rows: Sequence[int], in_features: int) -> str:
    """Say what keeps a weight's members from E4M3; an empty string if nothing does."""
    return next(filter(None, (shape_obstacle(num_rows, in_features) for num_rows in rows)), "")


def nf4_to_fp8(
    weight: NF4Weight,  # (N, K), all members
    scale: Tensor,  # () float32, of `fp8_scale`
    is_transposed: bool = False,
    out: Tensor | None = None,  # (N, K) E4M3, contiguous; (K, N) if transposed
) -> Fp8Weight:
    """Expand an NF4 weight, or its transpose, to E4M3, all its members in one launch.

        W8[n, k] = E4M3(LEVELS[code[n, k]] * (absmax[block of (n, k)] / scale))

    Args:
        out: what to write the values into; a new tensor if None.

    Raises:
        ValueError: a member's rows or columns are no multiples of 16, or the scale or `out` has
            another shape or dtype, lies on another device or is not contiguous.
        RuntimeError: the GPU has no FP8 products.
    """
    if obstacle := members_obstacle(weight.rows, weight.in_features):
        raise ValueError(obstacle)
    shape = weight.shape[::-1] if is_transposed else weight.shape
    if out is None:
        out = torch.empty(shape, dtype=E4M3, device=weight.device)
    check_is("the scale", scale, torch.float32, ())
    check_is("out", out, E4M3, shape)
    check_is_contiguous("out", out)
    check_one_device({"the weight": weight.packed, "the scale": scale, "out": out})
    if weight.device.type == "cpu":
        values = nf4_to_fp8_reference(weight, scale)
        out.copy_(values.T if is_transposed else values)
        return Fp8Weight(out, scale)
    if obstacle := fp8_obstacle(properties(weight.device).capability):
        raise RuntimeError(obstacle)
    _launch_nf4_to_fp8(weight, scale, out, is_transposed)
    return Fp8Weight(out, scale)
