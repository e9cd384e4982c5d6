"""Quantize a bf16, fp16 or fp32 matrix to NF4 with double-quantized scales, on the GPU.

    absmax[j] = max |w[i]|  over block j          code[i] = #{k : w[i] / absmax[j] > MIDPOINTS[k]}

    matrix   | e0 .. e7    | ...        16 bytes a thread: 8 weights in 16 bit, 4 in fp32
                v
    packed   | b0 b1 b2 b3 | ...        their codes, first in the high nibble: one 4-byte store
    absmax   | s           | ...        one float32 a block, from its first thread

Reads N K weights once and writes N K (1/2 + 4/B) bytes with B the block size: 2.56 bytes a weight
at block size 64 in 16 bit. With double quantization the scales lie in L2 while torch takes their
mean and a second kernel reads them (8/B) to write N K (1/B + 4 / (256 B)) bytes of codes and group
scales. Memory bandwidth is the limit only if a weight costs few instructions: at 3 TB/s an H100
has time for 25. Counting 15 midpoints costs 30, so a cubic guesses the code to within one and one
comparison decides, about 17 in all.

Bit-identical to `nf4.weight.quantize_member` on the same device, whose mean of the scales it
shares. The format is that of QLoRA section 3, "4-bit NormalFloat Quantization" and "Double
Quantization".
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

import torch
from torch import Tensor

from kernels.constants import constant
from kernels.language import tl, triton
from kernels.launch import cdiv, launch
from nf4.blockwise import SMALLEST_SCALE
from nf4.double_quant import DYNAMIC_MAP_MIDPOINTS, GROUP_SIZE, QuantizedAbsmax
from nf4.levels import MIDPOINTS
from nf4.weight import (
    NF4Weight,
    check_finite,
    check_matrix,
    member,
    quantize_member,
    quantize_member_unchecked,
)

nf4_quantize_member_reference = quantize_member

# of a program, unless one quantization block needs more; a single warp looks midpoints up by
# shuffles, several do so in shared memory
NUM_WARPS = 1
# tiles of a program; all their loads are under way before the first tile is worked on
CHUNKS = 4
# the widest load of a thread
VECTOR_BYTES = 16
# groups of scales per program of the second kernel, and its warps: 4 scales a thread
GROUPS = 4
GROUP_WARPS = 8

QUANT_GROUP = tl.constexpr(GROUP_SIZE)
SCALE_FLOOR = tl.constexpr(SMALLEST_SCALE)
SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)

# the cell of a scaled weight s is round(CUBIC_0 + CUBIC_1 s + CUBIC_3 s^3), for |s| <= 1: fitted so
# that midpoint k, and it alone, lies in cell k, at least 0.03 from its ends
CUBIC_0 = tl.constexpr(7)
CUBIC_1 = tl.constexpr(11.75)
CUBIC_3 = tl.constexpr(-4.75)
# 1.5 * 2^23: added to a small float32, it rounds that to an integer in the sum's low bits
ROUNDER = tl.constexpr(12582912)


@constant
def _midpoints(device: torch.device) -> Tensor:  # (16,) float32
    """Copy the midpoints to a device once; the last cell has none, so no weight lies beyond it."""
    return torch.cat((MIDPOINTS, torch.tensor([torch.inf]))).to(device)


@constant
def _absmax_thresholds(device: torch.device) -> Tensor:  # (255,) float32
    """Compute the values beyond which the code of a scale grows by one.

    On a midpoint the even code wins. So the midpoint between an odd code and the next belongs to
    the next, which a strict comparison with the number just below it says.
    """
    below = torch.nextafter(DYNAMIC_MAP_MIDPOINTS, torch.tensor(-torch.inf))
    lower_is_odd = torch.arange(DYNAMIC_MAP_MIDPOINTS.numel()) % 2 == 1
    return torch.where(lower_is_odd, below, DYNAMIC_MAP_MIDPOINTS).to(device)


@triton.jit
def _max_or_nan(a, b):
    # a NaN must reach the scale of its block, which is where the caller looks for it
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nf4_quantize_kernel(
    packed_ptr,  # (ceil(num_elements / 2),)
    absmax_ptr,  # (ceil(num_elements / QUANT_BLOCK),)
    matrix_ptr,  # (num_elements,)
    midpoints_ptr,
    num_elements,
    num_bytes,  # of `packed`; an argument, so that triton knows whether 16 divides it
    QUANT_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a tile, which has VECTOR weights for each of the threads
    VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program encodes CHUNKS tiles of BLOCKS quantization blocks
    TILE: tl.constexpr = BLOCKS * QUANT_BLOCK
    BLOCK_VECTORS: tl.constexpr = QUANT_BLOCK // VECTOR
    first_block = tl.program_id(0).to(tl.int64) * (CHUNKS * BLOCKS)
    matrix_ptr += first_block * QUANT_BLOCK
    packed_ptr += first_block * (QUANT_BLOCK // 2)
    absmax_ptr += first_block
    # the number of elements left fits 32 bits once it is cut to the program's share
    left = tl.minimum(num_elements - first_block * QUANT_BLOCK, CHUNKS * TILE).to(tl.int32)
    left_bytes = num_bytes - first_block * (QUANT_BLOCK // 2)
    left_bytes = tl.minimum(left_bytes, CHUNKS * TILE // 2).to(tl.int32)
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        offs = chunk * TILE + tl.arange(0, TILE)
        # a missing weight counts as zero
        tiles = tiles + (tl.load(matrix_ptr + offs, mask=offs < left, other=0.0),)  # noqa: RUF005, triton knows no star
    midpoints = tl.load(midpoints_ptr + tl.arange(0, 16))
    for chunk in tl.static_range(CHUNKS):
        weights = tl.reshape(tiles[chunk].to(tl.float32), (TILE // VECTOR, VECTOR))
        # every thread ends up with the scale of its vector's block: nothing to move between layouts
        absmax = tl.reduce(tl.abs(weights), 1, _max_or_nan)
        absmax = tl.reduce(tl.reshape(absmax, (BLOCKS, BLOCK_VECTORS)), 1, _max_or_nan)
        absmax = tl.broadcast_to(tl.expand_dims(absmax, 1), (BLOCKS, BLOCK_VECTORS))
        absmax = tl.reshape(absmax, (TILE // VECTOR,))
        # tl.full, because triton takes a subnormal literal for a float64
        floor = tl.full(absmax.shape, SCALE_FLOOR, tl.float32)
        inverse = tl.div_rn(1.0, tl.maximum(absmax, floor))
        scaled = tl.reshape(weights * inverse[:, None], (TILE,))
        guess = tl.fma(scaled, tl.fma(scaled * scaled, CUBIC_3, CUBIC_1), ROUNDER + CUBIC_0)
        # the mask keeps a NaN's cell inside the table
        cell = guess.to(tl.int32, bitcast=True) & 15
        # the sign of a difference is exact: -1 for a weight above its cell's midpoint, 0 on it
        beyond = (tl.gather(midpoints, cell, 0) - scaled).to(tl.int32, bitcast=True) >> 31
        high, low = tl.split(tl.reshape(cell - beyond, (TILE // 2, 2)))
        offs_packed = chunk * (TILE // 2) + tl.arange(0, TILE // 2)
        byte = (high * 16 + low).to(tl.uint8)
        tl.store(packed_ptr + offs_packed, byte, mask=offs_packed < left_bytes)
        vector = tl.arange(0, TILE // VECTOR)
        block = chunk * BLOCKS + vector // BLOCK_VECTORS
        is_first = (vector % BLOCK_VECTORS == 0) & (block * QUANT_BLOCK < left)
        tl.store(absmax_ptr + block, absmax, mask=is_first)


@triton.jit
def _nf4_quantize_absmax_kernel(
    codes_ptr,  # (num_blocks,)
    group_absmax_ptr,  # (ceil(num_blocks / QUANT_GROUP),)
    absmax_ptr,  # (num_blocks,)
    absmax_mean_ptr,  # (1,)
    thresholds_ptr,
    num_blocks,
    GROUPS: tl.constexpr,
):
    # one program encodes the scales of GROUPS groups
    first_group = tl.program_id(0).to(tl.int64) * GROUPS
    offs = first_group * QUANT_GROUP + tl.arange(0, GROUPS * QUANT_GROUP)
    mask = offs < num_blocks
    absmax = tl.load(absmax_ptr + offs, mask=mask, other=0.0)
    centred = tl.where(mask, absmax - tl.load(absmax_mean_ptr), 0.0)
    centred = tl.reshape(centred, (GROUPS, QUANT_GROUP))
    group_absmax = tl.max(tl.abs(centred), 1)
    inverse = tl.div_rn(1.0, tl.maximum(group_absmax, SMALLEST_NORMAL))
    scaled = tl.reshape(centred * inverse[:, None], (GROUPS * QUANT_GROUP,))
    code = tl.zeros(scaled.shape, tl.int32)
    for bit in tl.static_range(8):
        higher = code + (128 >> bit)
        # a comparison that a NaN passes, as it does in torch.bucketize
        stays = scaled <= tl.load(thresholds_ptr + higher - 1)
        code = tl.where(stays, code, higher)
    has_spread = tl.expand_dims(group_absmax, 1) != 0.0
    has_spread = tl.broadcast_to(has_spread, (GROUPS, QUANT_GROUP))
    code = tl.where(tl.reshape(has_spread, (GROUPS * QUANT_GROUP,)), code, 0)
    tl.store(codes_ptr + offs, code.to(tl.uint8), mask=mask)
    group = first_group + tl.arange(0, GROUPS)
    tl.store(group_absmax_ptr + group, group_absmax, mask=group * QUANT_GROUP < num_blocks)


def _launch_nf4_quantize_absmax(
    scales: QuantizedAbsmax,  # its mean is read, the rest is written
    absmax: Tensor,  # (num_blocks,) float32
) -> None:
    num_blocks = absmax.numel()
    launch(
        _nf4_quantize_absmax_kernel,
        (cdiv(num_blocks, GROUPS * GROUP_SIZE),),
        codes_ptr=scales.codes,
        group_absmax_ptr=scales.group_absmax,
        absmax_ptr=absmax,
        absmax_mean_ptr=scales.mean,
        thresholds_ptr=_absmax_thresholds(absmax.device),
        num_blocks=num_blocks,
        GROUPS=GROUPS,
        num_warps=GROUP_WARPS,
        enable_fp_fusion=False,
    )


def _launch_nf4_quantize(
    target: NF4Weight,  # one member
    matrix: Tensor,  # (N, K)
) -> Tensor:  # (num_blocks,) float32, the scales before double quantization
    matrix = matrix.contiguous()
    num_elements, block_size = matrix.numel(), target.block_size
    num_blocks = cdiv(num_elements, block_size)
    scales = target.absmax
    if isinstance(scales, QuantizedAbsmax):
        absmax = torch.empty(num_blocks, dtype=torch.float32, device=target.device)
    else:
        absmax = scales
    vector = VECTOR_BYTES // matrix.element_size()
    num_warps = max(NUM_WARPS, block_size // (32 * vector))
    blocks = num_warps * 32 * vector // block_size
    # fusing `midpoint - weight * inverse` would compare with a product that is not rounded
    launch(
        _nf4_quantize_kernel,
        (cdiv(num_blocks, CHUNKS * blocks),),
        packed_ptr=target.packed,
        absmax_ptr=absmax,
        matrix_ptr=matrix,
        midpoints_ptr=_midpoints(target.device),
        num_elements=num_elements,
        num_bytes=target.packed.numel(),
        QUANT_BLOCK=block_size,
        BLOCKS=blocks,
        VECTOR=vector,
        CHUNKS=CHUNKS,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    if isinstance(scales, QuantizedAbsmax):
        # torch's own mean, which bitsandbytes takes too: its last bit depends on the order
        torch.mean(absmax, dim=0, keepdim=True, out=scales.mean)
        _launch_nf4_quantize_absmax(scales, absmax)
    return absmax


def nf4_quantize_member_unchecked(
    weight: NF4Weight,
    index: int,
    matrix: Tensor,  # (rows[index], in_features), on the weight's device
    name: str,
) -> Tensor:  # (num_blocks,) float32
    """Quantize a matrix into one member of a weight, in place, whatever its values.

    For a caller that quantizes many and waits for the device once: `nf4_quantize_member` without
    its last step.

    Returns:
        The scales before double quantization. One of them is not finite where a weight of its
        block is not; then the member holds no weight.

    Raises:
        ValueError: the matrix has another shape or lies on another device, or is not floating
            point.
    """
    if weight.device.type == "cpu":
        return quantize_member_unchecked(weight, index, matrix, name)
    target = member(weight, index)
    check_matrix(target, matrix, name)
    return _launch_nf4_quantize(target, matrix)


def nf4_quantize_member(
    weight: NF4Weight,
    index: int,
    matrix: Tensor,  # (rows[index], in_features), on the weight's device
    name: str,
) -> None:
    """Quantize a matrix into one member of a weight, in place.

        absmax[j] = max |w[i]|  over the block's i
        code[i]   = #{k : w[i] * (1 / absmax[j]) > MIDPOINTS[k]}

    Args:
        name: what an error calls the matrix: its name in the checkpoint.

    Raises:
        ValueError: the matrix has another shape or lies on another device, is not floating point,
            or holds a NaN or an infinity.

    Note:
        Synchronizes with the device once, to look for non-finite weights. By then a GPU has written
        the member: a refused member holds no weight.
    """
    if weight.device.type == "cpu":
        nf4_quantize_member_reference(weight, index, matrix, name)
        return
    check_finite(nf4_quantize_member_unchecked(weight, index, matrix, name), matrix, name)
