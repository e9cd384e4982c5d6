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

Bit-identical to `nf4.weight.dequantize`: float32 level times float32 scale, rounded once. The
format is that of QLoRA section 3, "4-bit NormalFloat Quantization" and "Double Quantization".
"""

# triton's annotations know neither launch options nor static_range
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

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
# 4 bytes for each of a program's threads
CHUNK_BYTES = 4 * 32 * NUM_WARPS
# chunks per program, whose loads overlap
CHUNKS = 4
# what the widest access, 16 bytes, needs every start and length to be a multiple of
ALIGNMENT = tl.constexpr(16)


@triton.jit
def _nf4_dequantize_kernel(
    out_ptr,  # (sum of rows, in_features), contiguous
    packed_ptr,
    absmax_ptr,
    group_absmax_ptr,
    absmax_mean_ptr,
    levels_ptr,
    dynamic_map_ptr,
    member_table_ptr,
    in_features,
    IS_ALIGNED: tl.constexpr,  # every member has a multiple of 2 * ALIGNMENT elements
    QUANT_BLOCK: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program expands CHUNKS * CHUNK_BYTES packed bytes of one member
    member = tl.program_id(1)
    row = member_table_ptr + member * TABLE_COLUMNS
    first_element = tl.load(row) * in_features
    byte_start = tl.load(row + 1)
    block_start = tl.load(row + 2)
    group_start = tl.load(row + 3)
    num_elements = tl.load(row + 4)
    num_bytes = (num_elements + 1) // 2
    if IS_ALIGNED:
        first_element = tl.multiple_of(first_element, ALIGNMENT)
        byte_start = tl.multiple_of(byte_start, ALIGNMENT)
        num_elements = tl.multiple_of(num_elements, ALIGNMENT)
        num_bytes = tl.multiple_of(num_bytes, ALIGNMENT)
    first_byte = tl.program_id(0).to(tl.int64) * CHUNKS * CHUNK_BYTES
    if first_byte < num_bytes:
        for chunk in tl.static_range(CHUNKS):
            offs = first_byte + chunk * CHUNK_BYTES + tl.arange(0, CHUNK_BYTES)
            mask = offs < num_bytes
            byte = tl.load(packed_ptr + byte_start + offs, mask=mask, other=0).to(tl.int32)
            absmax = load_absmax(
                absmax_ptr,
                group_absmax_ptr,
                absmax_mean_ptr,
                dynamic_map_ptr,
                offs * 2 // QUANT_BLOCK,
                block_start,
                group_start,
                member,
                mask,
                DOUBLE_QUANT,
            )
            high = tl.load(levels_ptr + (byte >> 4)) * absmax
            low = tl.load(levels_ptr + (byte & 15)) * absmax
            values = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
            offs_out = (first_byte + chunk * CHUNK_BYTES) * 2 + tl.arange(0, 2 * CHUNK_BYTES)
            tl.store(out_ptr + first_element + offs_out, values, mask=offs_out < num_elements)


def _launch_nf4_dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    table = member_table(weight.rows, weight.in_features, weight.block_size, weight.device)
    sizes = [rows * weight.in_features for rows in weight.rows]
    grid = (triton.cdiv((max(sizes) + 1) // 2, CHUNKS * CHUNK_BYTES), len(sizes))
    # triton launches on the current device, which need not be the weight's
    with torch.cuda.device_of(weight.packed):
        _nf4_dequantize_kernel[grid](
            out,
            weight.packed,
            *scale_tensors(weight),
            device_constant("levels", weight.device),
            device_constant("dynamic_map", weight.device),
            table,
            weight.in_features,
            IS_ALIGNED=all(size % (2 * ALIGNMENT.value) == 0 for size in sizes),
            QUANT_BLOCK=weight.block_size,
            DOUBLE_QUANT=weight.is_double_quantized,
            CHUNK_BYTES=CHUNK_BYTES,
            CHUNKS=CHUNKS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return out


def nf4_dequantize(
    weight: NF4Weight,  # (N, K), all members
    dtype: torch.dtype,
) -> Tensor:  # (N, K) dtype
    """Expand an NF4 weight to floats, all its members in one launch.

        W[n, k] = LEVELS[code[n, k]] * absmax[block of (n, k)]

    Raises:
        ValueError: `dtype` is not bfloat16, float16 or float32.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"a weight dequantizes to bfloat16, float16 or float32: got {dtype}")
    if weight.device.type == "cpu":
        return nf4_dequantize_reference(weight, dtype)
    return _launch_nf4_dequantize(weight, dtype)
