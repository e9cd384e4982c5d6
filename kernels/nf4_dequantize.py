"""Expand an NF4 weight to bf16, fp16 or fp32 in one launch, nested scales and all members included.

    W[n, k] = LEVELS[code[n, k]] * (DYNAMIC_MAP[absmax_code] * group_absmax + mean)

    packed   | b0 b1 b2 b3 | ...        a chunk is 4 consecutive bytes per thread
                v  v  v  v
    W        | e0 .. e7    | ...        8 consecutive values per thread: one 16-byte store in 16 bit

Reads N K (1/2 + 1/B + 4 / (256 B)) bytes with B the block size (without double quantization
N K (1/2 + 4/B)) and writes 2 N K, in fp32 4 N K: 2.516 bytes a weight at block size 64 in 16 bit.
N K multiplications, so memory bandwidth is the limit. Chunks are one-dimensional and exactly 4
bytes a thread because in that shape Triton vectorizes both load and store without a detour through
shared memory, provided that it knows the members to be aligned.

    out      | row 0        | gap | row 1        | gap | ...        gap = row stride - K

W may be a part of wider rows, which hold the columns of an adapter behind it. Then a thread's 8
values stay together if 8 divides K and the row stride; they move up by a gap for each row that ends
before them. A program finds its first row by a division and counts further ends by comparing, where
rows are long.

Bit-identical to `nf4.weight.dequantize`: float32 level times float32 scale, rounded once. The
format is that of QLoRA section 3, "4-bit NormalFloat Quantization" and "Double Quantization".
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false

from math import gcd

import torch
from torch import Tensor

from kernels.checks import (
    check_dtype,
    check_one_device,
    check_rows_are_apart,
    check_rows_are_contiguous,
)
from kernels.language import tl, triton
from kernels.launch import cdiv, launch
from kernels.nf4_decode import (
    TABLE_COLUMNS,
    device_constant,
    load_absmax,
    member_table,
    scale_tensors,
)
from nf4.weight import NF4Weight, dequantize

nf4_dequantize_reference = dequantize

NUM_WARPS = 4
# packed bytes of a thread
THREAD_BYTES = tl.constexpr(4)
CHUNK_BYTES = THREAD_BYTES.value * 32 * NUM_WARPS
# values that a thread makes of its 4 bytes
MAX_VECTOR = 8
# chunks per program, whose loads overlap
CHUNKS = 4
# more ends of rows than this in a program, and a division is cheaper than comparing with each
MAX_ROW_ENDS = 4
# the widest access, 16 bytes, needs starts and lengths that are multiples of this
ALIGNMENT = tl.constexpr(16)


@triton.jit
def _nf4_dequantize_kernel(
    out_ptr,  # (sum of rows, in_features), each row contiguous
    packed_ptr,
    absmax_ptr,
    group_absmax_ptr,
    absmax_mean_ptr,
    levels_ptr,
    dynamic_map_ptr,
    member_table_ptr,
    num_rows,  # of all members
    in_features,
    row_stride,
    NUM_MEMBERS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,  # every member has a multiple of 2 * ALIGNMENT elements
    HAS_GAPS: tl.constexpr,  # row_stride > in_features; the next two matter then only
    VECTOR: tl.constexpr,  # divides in_features and row_stride
    ROW_ENDS: tl.constexpr,  # at most so many lie in a program's elements; 0: unknown
    QUANT_BLOCK: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program expands CHUNKS * CHUNK_BYTES packed bytes of one member
    member = tl.program_id(1)
    if NUM_MEMBERS == 1:
        # the only one begins everything, and nothing waits for the table
        member_row = tl.cast(0, tl.int64)
        byte_start = tl.cast(0, tl.int64)
        block_start = tl.cast(0, tl.int64)
        group_start = tl.cast(0, tl.int64)
        num_elements = tl.cast(num_rows, tl.int64) * in_features
    else:
        row = member_table_ptr + member * TABLE_COLUMNS
        member_row = tl.load(row)
        byte_start = tl.load(row + 1)
        block_start = tl.load(row + 2)
        group_start = tl.load(row + 3)
        num_elements = tl.load(row + 4)
    first_element = member_row * in_features
    num_bytes = (num_elements + 1) // 2
    if IS_ALIGNED:
        first_element = tl.multiple_of(first_element, ALIGNMENT)
        byte_start = tl.multiple_of(byte_start, ALIGNMENT)
        num_elements = tl.multiple_of(num_elements, ALIGNMENT)
        num_bytes = tl.multiple_of(num_bytes, ALIGNMENT)
    first_byte = tl.program_id(0).to(tl.int64) * CHUNKS * CHUNK_BYTES
    if first_byte < num_bytes:
        if HAS_GAPS:
            # counted in vectors of values, which no row's end divides
            chunk_length: tl.constexpr = 2 * CHUNK_BYTES // VECTOR
            row_length = in_features // VECTOR
            gap = (row_stride - in_features).to(tl.int64) // VECTOR
            first_vector = tl.program_id(0).to(tl.int64) * CHUNKS * chunk_length
            first_row = first_vector // row_length
            # in 32 bits, where comparing and dividing cost less
            first_column = (first_vector - first_row * row_length).to(tl.int32)
            first_place = first_vector + first_row * gap + member_row * (row_length + gap)
        for chunk in tl.static_range(CHUNKS):
            offs = first_byte + chunk * CHUNK_BYTES + tl.arange(0, CHUNK_BYTES)
            mask = offs < num_bytes
            byte = tl.load(packed_ptr + byte_start + offs, mask=mask, other=0).to(tl.int32)
            # one scale serves all bytes of a thread, since a block's values are a multiple of those
            own = tl.arange(0, CHUNK_BYTES // THREAD_BYTES) * THREAD_BYTES
            own += first_byte + chunk * CHUNK_BYTES
            scale = load_absmax(
                absmax_ptr,
                group_absmax_ptr,
                absmax_mean_ptr,
                dynamic_map_ptr,
                own * 2 // QUANT_BLOCK,
                block_start,
                group_start,
                member,
                own < num_bytes,
                DOUBLE_QUANT,
            )
            scales = tl.broadcast_to(scale[:, None], (CHUNK_BYTES // THREAD_BYTES, THREAD_BYTES))
            absmax = tl.reshape(scales, (CHUNK_BYTES,))
            high = tl.load(levels_ptr + (byte >> 4)) * absmax
            low = tl.load(levels_ptr + (byte & 15)) * absmax
            values = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
            if HAS_GAPS:
                vectors = chunk * chunk_length + tl.arange(0, chunk_length)
                column = first_column + vectors
                place = first_place + vectors
                if ROW_ENDS > 0:
                    for end in tl.static_range(1, ROW_ENDS + 1):
                        place += tl.where(column >= end * row_length, gap, 0)
                else:
                    place += column // row_length * gap
                offs_out = place[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
                mask_out = (first_vector + vectors < num_elements // VECTOR)[:, None]
                values = tl.reshape(values, (chunk_length, VECTOR))
                tl.store(out_ptr + offs_out, values, mask=mask_out)
            else:
                offs_out = (first_byte + chunk * CHUNK_BYTES) * 2 + tl.arange(0, 2 * CHUNK_BYTES)
                tl.store(out_ptr + first_element + offs_out, values, mask=offs_out < num_elements)


def _launch_nf4_dequantize(
    weight: NF4Weight, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    in_features = weight.in_features
    has_gaps = not out.is_contiguous()
    row_stride = out.stride(0) if has_gaps else in_features
    program_elements = 2 * CHUNKS * CHUNK_BYTES
    row_ends = cdiv(program_elements, in_features)
    # a kernel counts a row and the elements of a program behind it in 32 bits
    assert not has_gaps or in_features + program_elements < 2**31
    table = member_table(weight.rows, in_features, weight.block_size, weight.device)
    sizes = [rows * in_features for rows in weight.rows]
    grid = (cdiv((max(sizes) + 1) // 2, CHUNKS * CHUNK_BYTES), len(sizes))
    launch(
        _nf4_dequantize_kernel,
        grid,
        out_ptr=out,
        packed_ptr=weight.packed,
        **scale_tensors(weight),
        levels_ptr=device_constant("levels", weight.device),
        dynamic_map_ptr=device_constant("dynamic_map", weight.device),
        member_table_ptr=table,
        num_rows=sum(weight.rows),
        in_features=in_features,
        row_stride=row_stride,
        NUM_MEMBERS=len(sizes),
        IS_ALIGNED=all(size % (2 * ALIGNMENT.value) == 0 for size in sizes),
        HAS_GAPS=has_gaps,
        # constant without gaps, so that one kernel serves all
        VECTOR=gcd(in_features, row_stride, MAX_VECTOR) if has_gaps else MAX_VECTOR,
        ROW_ENDS=row_ends if has_gaps and row_ends <= MAX_ROW_ENDS else 0,
        QUANT_BLOCK=weight.block_size,
        DOUBLE_QUANT=weight.is_double_quantized,
        CHUNK_BYTES=CHUNK_BYTES,
        CHUNKS=CHUNKS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out


def _check_out(out: Tensor, weight: NF4Weight, dtype: torch.dtype) -> None:
    if tuple(out.shape) != weight.shape:
        raise ValueError(
            f"out must have the weight's shape {weight.shape}: got {tuple(out.shape)}; "
            f"pass scratch[:, :{weight.in_features}] of a wider scratch"
        )
    if out.dtype != dtype:
        raise ValueError(
            f"out must have the dtype that the weight is expanded to, {dtype}: got {out.dtype}; "
            "pass a tensor or a dtype that agrees"
        )
    check_one_device({"the weight": weight.packed, "out": out})
    check_rows_are_contiguous("out", out)
    check_rows_are_apart("out", out)


def nf4_dequantize(
    weight: NF4Weight,  # (N, K), all members
    dtype: torch.dtype,
    out: Tensor | None = None,  # (N, K) dtype, each row contiguous
) -> Tensor:  # (N, K) dtype
    """Expand an NF4 weight to floats, all its members in one launch.

        W[n, k] = LEVELS[code[n, k]] * absmax[block of (n, k)]

    Args:
        out: what to write into and return, for instance the first K columns of a wider matrix,
            whose other columns stay as they are; a new tensor if None.

    Raises:
        ValueError: `dtype` is not bfloat16, float16 or float32, or `out` has another shape or
            dtype, lies on another device, or has rows that are not contiguous or overlap.
    """
    check_dtype("the dtype of an expanded weight", dtype)
    if out is not None:
        _check_out(out, weight, dtype)
    if weight.device.type == "cpu":
        expanded = nf4_dequantize_reference(weight, dtype)
        return expanded if out is None else out.copy_(expanded)
    return _launch_nf4_dequantize(weight, dtype, out)
