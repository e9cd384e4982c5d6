"""Update every parameter of a model by AdamW in one launch, over flat arenas.

    block        | 256 | 256 | ... | 256 | ... |    each parameter starts with a block; the rest of
    parameters   | p0        | p1  | p2  | ... |    its last block is padding: zero, and stays zero
    gradients    | g0        | g1  | g2  | ... |
    moments      | 8-bit codes, one absmax a block | float32 |    either region may be empty

    S       = sum of g^2 over the arena, in float64           1  every gradient, fixed order
    norm    = sqrt(S) / loss_scale                            2  one program: what the step needs
    g       = g min(1, max_norm / (norm + 1e-6)) / loss_scale
    p       = p - lr wd p                                     3  everything else
    m       = m + (1 - b1) (g - m)
    v       = b2 v + (1 - b2) g^2
    p       = p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Loshchilov and Hutter 2019, algorithm 2; QLoRA section 3, "Paged Optimizers". The host decides
nothing: where the norm is not finite, the third launch leaves everything as it was and the step
counter t, which lives on the device, stays. A launch reads g once for the norm (4 bytes) and moves
28 bytes a parameter with float32 moments (p, g, m, v read, p, m, v written) or 16 + 16/256 with
8-bit ones, and 2 more for the 16-bit copy. bitsandbytes instead launches once a tensor and waits
for the device after each.

Moments in 8 bit are bitsandbytes': blocks of 256, m in the signed and v in the unsigned dynamic map
(`nf4/double_quant.py`), the nearest level, on a midpoint the even code, and an m that is not zero
never takes the code of the other sign or, if negative, of zero. What differs: decay comes before
the step, as in torch, where its CUDA kernels apply it afterwards; its divisions are approximate;
and a block of zeros has the codes of zero.

The kernels fuse a product and a sum where torch's CPU kernels do, and nowhere else: there the
reference is torch.optim.AdamW bit for bit, and the kernels are the reference but for its square
root, which is MKL's and errs by one unit in the last place for a fifth of all numbers.
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.constants import constant
from kernels.launch import launch
from kernels.ptx import load_byte, load_float
from nf4.double_quant import (
    DYNAMIC_MAP,
    DYNAMIC_MAP_MIDPOINTS,
    UNSIGNED_DYNAMIC_MAP,
    UNSIGNED_DYNAMIC_MAP_MIDPOINTS,
    nearest_codes,
)

BETA1, BETA2 = 0.9, 0.999
EPSILON = 1e-8
CLIP_EPSILON = 1e-6

# elements that share an absmax, and a learning rate
MOMENT_BLOCK = 256
# the code of zero: of m, of v
ZERO_CODES = (127, 0)
# blocks of a program, one a warp; both regions of an arena are multiples of it
TILE_BLOCKS = 4

# programs that add up squares, whatever the GPU: so the order of the sum is always the same
SUM_PROGRAMS = 1024
SUM_WARPS = 4
PLAN_WARPS = 4
# of a thread of the update with 8-bit moments: five programs on an H100's multiprocessor; left to
# itself, the compiler takes fewer for an A100, and spills
NUM_REGISTERS_8BIT = 96

BLOCK = tl.constexpr(MOMENT_BLOCK)
B1_REST = tl.constexpr(1 - BETA1)
B2 = tl.constexpr(BETA2)
B2_REST = tl.constexpr(1 - BETA2)
# elements of a vector: 16 bytes in float32, 4 of codes
VECTOR = tl.constexpr(4)
EPS = tl.constexpr(EPSILON)
CLIP_EPS = tl.constexpr(CLIP_EPSILON)
SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)
# 1.5 * 2^23: added to a small float32, it rounds that to an integer in the sum's low bits
ROUNDER = tl.constexpr(12582912)
ROUNDER_BITS = tl.constexpr(0x4B400000)
ZERO_CODE = tl.constexpr(ZERO_CODES[0])

# what the second launch leaves for the third: these, then decay and step size of each group
NORM, IS_FINITE, FACTOR, CORRECTION2 = (tl.constexpr(index) for index in range(4))
NUM_SHARED_SCALARS = tl.constexpr(4)


@dataclass(frozen=True, eq=False)
class Moments:
    """Both moments of an arena: the first blocks in 8 bit, the others in float32."""

    exp_avg_codes: Tensor  # (num_8bit_blocks * MOMENT_BLOCK,) uint8
    exp_avg_sq_codes: Tensor
    exp_avg_absmax: Tensor  # (num_8bit_blocks,) float32
    exp_avg_sq_absmax: Tensor
    exp_avg: Tensor  # (num_32bit_blocks * MOMENT_BLOCK,) float32
    exp_avg_sq: Tensor


@dataclass(frozen=True, eq=False)
class Arenas:
    """What a step reads and writes; blocks of all tensors lie in one order."""

    parameters: Tensor  # (num_blocks * MOMENT_BLOCK,) float32
    gradients: Tensor  # (num_blocks * MOMENT_BLOCK,) float32
    compute_copy: Tensor | None  # (num_blocks * MOMENT_BLOCK,) 16-bit: the parameters, rounded
    moments: Moments
    group_of_block: Tensor  # (num_blocks,) uint8
    groups: Tensor  # (num_groups, 2) float64: factor of the learning rate, weight decay
    num_updates: Tensor  # (1,) int32, t: steps that were not skipped
    scalars: Tensor  # (NUM_SHARED_SCALARS + 2 * num_groups,) float32, from launch to launch
    partial_sums: Tensor  # (SUM_PROGRAMS,) float64, of the gradients' squares


def adamw_reference(
    arenas: Arenas,
    learning_rate: float,
    max_norm: float,
    loss_scale: Tensor,  # () float32
) -> Tensor:  # () float32, the norm of the gradients before clipping
    """Take one step of AdamW over the arenas, in torch; skip it if the norm is not finite."""
    scale = float(loss_scale)
    norm = (torch.linalg.vector_norm(arenas.gradients, dtype=torch.float64) / scale).float()
    if not norm.isfinite():
        return norm
    clip = min(1.0, max_norm / (float(norm) + CLIP_EPSILON)) if max_norm > 0 else 1.0
    t = int(arenas.num_updates.add_(1))
    g = arenas.gradients * (clip / scale)
    m, v = _expand_moments(arenas.moments)
    m.lerp_(g, 1 - BETA1)
    v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
    denominator = v.sqrt().div_(math.sqrt(1 - BETA2**t)).add_(EPSILON)
    for span, factor, weight_decay in _spans_of_groups(arenas):
        p, rate = arenas.parameters[span], learning_rate * factor
        p.mul_(1 - rate * weight_decay)
        p.addcdiv_(m[span], denominator[span], value=-rate / (1 - BETA1**t))
    _store_moments(arenas.moments, m, v)
    if arenas.compute_copy is not None:
        arenas.compute_copy.copy_(arenas.parameters)
    return norm


def _spans_of_groups(arenas: Arenas) -> list[tuple[slice, float, float]]:
    """List runs of blocks of one group: their elements, factor and weight decay."""
    settings = arenas.groups.tolist()
    indices, counts = torch.unique_consecutive(arenas.group_of_block, return_counts=True)
    spans, start = [], 0
    for index, count in zip(indices.tolist(), counts.tolist(), strict=True):
        stop = start + count * MOMENT_BLOCK
        spans.append((slice(start, stop), *settings[index]))
        start = stop
    return spans


def _expand_moments(moments: Moments) -> tuple[Tensor, Tensor]:
    """Dequantize the blocks in 8 bit; without any, these are the moments themselves."""
    if moments.exp_avg_codes.numel() == 0:
        return moments.exp_avg, moments.exp_avg_sq
    m = dequantize_moment(moments.exp_avg_codes, moments.exp_avg_absmax, DYNAMIC_MAP)
    v = dequantize_moment(moments.exp_avg_sq_codes, moments.exp_avg_sq_absmax, UNSIGNED_DYNAMIC_MAP)
    return torch.cat((m, moments.exp_avg)), torch.cat((v, moments.exp_avg_sq))


def _store_moments(moments: Moments, m: Tensor, v: Tensor) -> None:
    """Quantize the blocks in 8 bit; those in float32 are stored already where they are all."""
    num_8bit = moments.exp_avg_codes.numel()
    if num_8bit == 0:
        return
    codes, absmax = quantize_moment(m[:num_8bit], is_signed=True)
    moments.exp_avg_codes.copy_(codes)
    moments.exp_avg_absmax.copy_(absmax)
    codes, absmax = quantize_moment(v[:num_8bit], is_signed=False)
    moments.exp_avg_sq_codes.copy_(codes)
    moments.exp_avg_sq_absmax.copy_(absmax)
    moments.exp_avg.copy_(m[num_8bit:])
    moments.exp_avg_sq.copy_(v[num_8bit:])


def quantize_moment(
    moment: Tensor,  # (num_blocks * MOMENT_BLOCK,) float32
    is_signed: bool,
) -> tuple[Tensor, Tensor]:  # codes uint8, absmax (num_blocks,) float32
    """Quantize a moment to 8 bits, in torch.

        absmax[j] = max |x[i]|  over the block's i
        code[i]   = the index in the map nearest to x[i] * (1 / absmax[j])

    A tie goes to the even index. A negative x whose nearest level is zero gets the level below it:
    bitsandbytes keeps the sign of the first moment, whatever is lost of its size.
    """
    blocks = moment.view(-1, MOMENT_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * absmax.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()[:, None]
    midpoints = DYNAMIC_MAP_MIDPOINTS if is_signed else UNSIGNED_DYNAMIC_MAP_MIDPOINTS
    codes = nearest_codes(scaled, midpoints)
    if is_signed:
        codes -= ((codes == ZERO_CODES[0]) & blocks.signbit()).int()
    return codes.view(-1).to(torch.uint8), absmax


def dequantize_moment(
    codes: Tensor,  # (num_blocks * MOMENT_BLOCK,) uint8
    absmax: Tensor,  # (num_blocks,) float32
    levels: Tensor,  # (256,) float32, the map
) -> Tensor:  # (num_blocks * MOMENT_BLOCK,) float32
    """Expand a moment: levels[code[i]] * absmax[i // MOMENT_BLOCK]."""
    values = levels.to(codes.device)[codes.int()].view(-1, MOMENT_BLOCK)
    return (values * absmax[:, None]).view(-1)


@constant
def _corrections(device: torch.device) -> Tensor:  # (num_steps, 2) float64
    """Tabulate 1 - b1^t and sqrt(1 - b2^t) from t = 0, until float32 knows no difference from 1.

    A GPU's power function would round otherwise than Python's. Row 0 is never used.
    """
    rows = [(1.0, 1.0)]
    while len(rows) == 1 or rows[-1][0] < 1 or rows[-1][1] < 1 - 2**-26:
        t = len(rows)
        rows.append((1 - BETA1**t, math.sqrt(1 - BETA2**t)))
    return torch.tensor(rows, dtype=torch.float64).to(device)


def _thresholds(midpoints: Tensor, lower_wins: Tensor) -> Tensor:
    """Move the midpoints that belong to the level above to the number below them.

    So a strict comparison finds the code on a midpoint too.
    """
    below = torch.nextafter(midpoints, torch.tensor(-torch.inf))
    return torch.where(lower_wins, midpoints, below)


@constant
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # all float32
    """Make both maps, and the values beyond which a magnitude's index grows by one.

    A magnitude of m has index c = |code - 127|: on a midpoint the even code, that is the odd c.
    """
    magnitudes = DYNAMIC_MAP_MIDPOINTS[ZERO_CODES[0] :]
    index = torch.arange(magnitudes.numel())
    signed = _thresholds(magnitudes, index % 2 == 1)
    index = torch.arange(UNSIGNED_DYNAMIC_MAP_MIDPOINTS.numel())
    unsigned = _thresholds(UNSIGNED_DYNAMIC_MAP_MIDPOINTS, index % 2 == 0)
    tables = (DYNAMIC_MAP, signed, UNSIGNED_DYNAMIC_MAP, unsigned)
    first, second, third, fourth = (table.to(device) for table in tables)
    return first, second, third, fourth


def make_adamw_tables(device: torch.device) -> None:
    """Make the tables that a step reads on a device, so that they are there when memory ends."""
    _corrections(device)
    _tables(device)


@triton.jit
def _adamw_sum_squares_kernel(
    partial_sums_ptr,  # (PROGRAMS,) float64
    gradients_ptr,
    num_tiles,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    # one program adds up the squares of every PROGRAMS-th tile; in float64 a square is exact
    offs = tl.arange(0, TILE)
    acc = tl.zeros((TILE,), tl.float64)
    gradients_ptr += tl.program_id(0).to(tl.int64) * TILE
    for _ in range(tl.program_id(0), num_tiles, PROGRAMS):
        g = tl.load(gradients_ptr + offs).to(tl.float64)
        acc += g * g
        gradients_ptr += PROGRAMS * TILE
    tl.store(partial_sums_ptr + tl.program_id(0), tl.sum(acc, 0))


@triton.jit(do_not_specialize=["learning_rate_bits", "max_norm_bits"])
def _adamw_plan_kernel(
    scalars_ptr,  # (NUM_SHARED_SCALARS + 2 * NUM_GROUPS,)
    num_updates_ptr,
    partial_sums_ptr,  # (PROGRAMS,) float64
    loss_scale_ptr,
    groups_ptr,  # (NUM_GROUPS, 2) float64
    corrections_ptr,  # (num_corrections, 2) float64
    num_corrections,
    # float64 numbers as integers: triton takes a float argument for a float32
    learning_rate_bits,
    max_norm_bits,
    NUM_GROUPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    # one program, alone, computes what the step needs to know, in float64
    learning_rate = learning_rate_bits.to(tl.int64).to(tl.float64, bitcast=True)
    max_norm = max_norm_bits.to(tl.int64).to(tl.float64, bitcast=True)
    squares = tl.sum(tl.load(partial_sums_ptr + tl.arange(0, PROGRAMS)), 0)
    scale = tl.load(loss_scale_ptr).to(tl.float64)
    norm = (tl.sqrt(squares) / scale).to(tl.float32)
    is_finite = norm < float("inf")
    clip = max_norm / (norm.to(tl.float64) + CLIP_EPS)
    clip = tl.where((max_norm > 0) & (clip < 1.0), clip, 1.0)
    num_updates = tl.load(num_updates_ptr) + is_finite.to(tl.int32)
    tl.store(num_updates_ptr, num_updates)
    row = corrections_ptr + 2 * tl.minimum(num_updates, num_corrections - 1)
    correction1, correction2 = tl.load(row), tl.load(row + 1)
    tl.store(scalars_ptr + NORM, norm)
    tl.store(scalars_ptr + IS_FINITE, is_finite.to(tl.float32))
    tl.store(scalars_ptr + FACTOR, (clip / scale).to(tl.float32))
    tl.store(scalars_ptr + CORRECTION2, correction2.to(tl.float32))
    for group in tl.static_range(NUM_GROUPS):
        rate = learning_rate * tl.load(groups_ptr + 2 * group)
        decay = 1.0 - rate * tl.load(groups_ptr + 2 * group + 1)
        own = scalars_ptr + NUM_SHARED_SCALARS + 2 * group
        tl.store(own, decay.to(tl.float32))
        tl.store(own + 1, (-rate / correction1).to(tl.float32))


@triton.jit
def _nearest_magnitude(
    scaled,  # in [0, 1]
    thresholds_ptr,
    FIRST_CELLS: tl.constexpr,  # of the first decade: 1 in the signed map, 2 in the unsigned
):
    # decade d has FIRST_CELLS * 2^d levels, evenly spaced. Rounding a position in it finds the one
    # threshold that may lie near: the last of a decade and the first of the next are the same
    slope = tl.full(scaled.shape, FIRST_CELLS * 1e6 / 0.9, tl.float32)
    start = tl.full(scaled.shape, -FIRST_CELLS / 9, tl.float32)
    for decade in tl.static_range(1, 7):
        is_higher = scaled > 10.0 ** (decade - 7)
        slope = tl.where(is_higher, FIRST_CELLS * 1e6 * 0.2**decade / 0.9, slope)
        start = tl.where(is_higher, FIRST_CELLS * (8 * 2**decade / 9 - 1), start)
    position = tl.fma(scaled, slope, start) + ROUNDER
    index = position.to(tl.int32, bitcast=True) - ROUNDER_BITS
    return index + (scaled > load_float(thresholds_ptr + index)).to(tl.int32)


@triton.jit
def _scaled_to_absmax(x):  # (BLOCKS, BLOCK)
    absmax = tl.max(tl.abs(x), 1)
    inverse = tl.div_rn(1.0, tl.maximum(absmax, SMALLEST_NORMAL))
    return x * inverse[:, None], absmax


@triton.jit
def _step(p, g, m, v, decay, step_size, factor, correction2):
    # fused where torch's CPU kernels fuse; launch with enable_fp_fusion=False for the rest
    g *= factor
    m = tl.fma(g - m, B1_REST, m)
    v = tl.fma(g * B2_REST, g, v * B2)
    denominator = tl.div_rn(tl.sqrt_rn(v), correction2) + EPS
    p = p * decay + tl.div_rn(m * step_size, denominator)
    return p, m, v


@triton.jit
def _adamw_kernel(
    parameters_ptr,
    gradients_ptr,
    compute_copy_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    exp_avg_codes_ptr,
    exp_avg_sq_codes_ptr,
    exp_avg_absmax_ptr,
    exp_avg_sq_absmax_ptr,
    group_of_block_ptr,
    scalars_ptr,
    map_ptr,
    thresholds_ptr,
    unsigned_map_ptr,
    unsigned_thresholds_ptr,
    num_8bit_blocks,
    HAS_8BIT: tl.constexpr,
    HAS_COPY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # one program updates BLOCKS blocks of one region, a warp each
    if tl.load(scalars_ptr + IS_FINITE) == 0.0:
        return
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first_block + tl.arange(0, BLOCKS)
    # vectors of 4 for every dtype: so all tensors of a tile are spread over the threads alike
    offs = block[:, None] * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)[None, :]
    row = block[:, None]
    own = scalars_ptr + NUM_SHARED_SCALARS + 2 * load_byte(group_of_block_ptr + row)
    decay, step_size = load_float(own), load_float(own + 1)
    factor = tl.load(scalars_ptr + FACTOR)
    correction2 = tl.load(scalars_ptr + CORRECTION2)
    p = tl.load(parameters_ptr + offs)
    g = tl.load(gradients_ptr + offs)
    is_8bit = False
    if HAS_8BIT:
        is_8bit = first_block < num_8bit_blocks
    if is_8bit:
        m_code = tl.load(exp_avg_codes_ptr + offs).to(tl.int32)
        v_code = tl.load(exp_avg_sq_codes_ptr + offs).to(tl.int32)
        # these bypass the cache of what a kernel writes: each is read before it is written
        m = load_float(map_ptr + m_code) * load_float(exp_avg_absmax_ptr + row)
        v = load_float(unsigned_map_ptr + v_code) * load_float(exp_avg_sq_absmax_ptr + row)
        p, m, v = _step(p, g, m, v, decay, step_size, factor, correction2)
        m_scaled, m_absmax = _scaled_to_absmax(m)
        magnitude = _nearest_magnitude(tl.abs(m_scaled), thresholds_ptr, 1)
        # -1 is no level, and what is negative does not become zero
        negative = tl.minimum(tl.maximum(magnitude, 1), ZERO_CODE)
        is_negative = m.to(tl.int32, bitcast=True) < 0
        m_code = ZERO_CODE + tl.where(is_negative, -negative, magnitude)
        v_scaled, v_absmax = _scaled_to_absmax(v)
        v_code = _nearest_magnitude(v_scaled, unsigned_thresholds_ptr, 2)
        tl.store(exp_avg_codes_ptr + offs, m_code.to(tl.uint8))
        tl.store(exp_avg_sq_codes_ptr + offs, v_code.to(tl.uint8))
        tl.store(exp_avg_absmax_ptr + block, m_absmax)
        tl.store(exp_avg_sq_absmax_ptr + block, v_absmax)
    else:
        offs_moments = offs - num_8bit_blocks.to(tl.int64) * BLOCK
        m = tl.load(exp_avg_ptr + offs_moments)
        v = tl.load(exp_avg_sq_ptr + offs_moments)
        p, m, v = _step(p, g, m, v, decay, step_size, factor, correction2)
        tl.store(exp_avg_ptr + offs_moments, m)
        tl.store(exp_avg_sq_ptr + offs_moments, v)
    tl.store(parameters_ptr + offs, p)
    if HAS_COPY:
        tl.store(compute_copy_ptr + offs, p.to(compute_copy_ptr.dtype.element_ty))


def _bits(value: float) -> int:
    """The 64 bits of a float as an integer."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _launch_adamw_plan(
    arenas: Arenas,
    learning_rate: float,
    max_norm: float,
    loss_scale: Tensor,  # () float32
) -> None:
    tile = TILE_BLOCKS * MOMENT_BLOCK
    gradients = arenas.gradients
    corrections = _corrections(gradients.device)
    launch(
        _adamw_sum_squares_kernel,
        (SUM_PROGRAMS,),
        arenas.partial_sums,
        gradients,
        gradients.numel() // tile,
        TILE=tile,
        PROGRAMS=SUM_PROGRAMS,
        num_warps=SUM_WARPS,
        # the product is exact, so fusing changes nothing but the time
        enable_fp_fusion=True,
    )
    launch(
        _adamw_plan_kernel,
        (1,),
        arenas.scalars,
        arenas.num_updates,
        arenas.partial_sums,
        loss_scale,
        arenas.groups,
        corrections,
        len(corrections),
        _bits(learning_rate),
        _bits(max_norm),
        NUM_GROUPS=len(arenas.groups),
        PROGRAMS=SUM_PROGRAMS,
        num_warps=PLAN_WARPS,
        enable_fp_fusion=False,
    )


def _launch_adamw(arenas: Arenas) -> None:
    moments = arenas.moments
    num_blocks, num_8bit_blocks = len(arenas.group_of_block), len(moments.exp_avg_absmax)
    assert num_blocks % TILE_BLOCKS == 0
    assert num_8bit_blocks % TILE_BLOCKS == 0
    copy = arenas.compute_copy
    launch(
        _adamw_kernel,
        (num_blocks // TILE_BLOCKS,),
        arenas.parameters,
        arenas.gradients,
        # stands for what is not there; the kernel does not read it
        arenas.parameters if copy is None else copy,
        moments.exp_avg,
        moments.exp_avg_sq,
        moments.exp_avg_codes,
        moments.exp_avg_sq_codes,
        moments.exp_avg_absmax,
        moments.exp_avg_sq_absmax,
        arenas.group_of_block,
        arenas.scalars,
        *_tables(arenas.parameters.device),
        num_8bit_blocks,
        HAS_8BIT=num_8bit_blocks > 0,
        HAS_COPY=copy is not None,
        BLOCKS=TILE_BLOCKS,
        num_warps=TILE_BLOCKS,
        maxnreg=NUM_REGISTERS_8BIT if num_8bit_blocks else None,
        enable_fp_fusion=False,
    )


def adamw(
    arenas: Arenas,
    learning_rate: float,
    max_norm: float,
    loss_scale: Tensor,  # () float32, on the arenas' device
    pieces: Iterable[Arenas],
) -> Tensor:  # () float32, the norm of the gradients before clipping, on the device
    """Take one step of AdamW over the arenas, in place; skip it if the norm is not finite.

        norm = |gradients| / loss_scale
        g    = gradients min(1, max_norm / (norm + 1e-6)) / loss_scale

    and then AdamW, whose learning rate and weight decay a block's group has.

    Args:
        max_norm: clip to this norm; 0 does not clip.
        pieces: the same arenas, or parts of them that together are the whole. Each is taken, and
            its launch queued, before the next is asked for.

    Note:
        Does not wait for the device. Whether the step was skipped is whether the norm is finite.
    """
    if arenas.parameters.device.type == "cpu":
        return adamw_reference(arenas, learning_rate, max_norm, loss_scale)
    _launch_adamw_plan(arenas, learning_rate, max_norm, loss_scale)
    for piece in pieces:
        _launch_adamw(piece)
    # a copy: the next step writes its own there
    return arenas.scalars[NORM.value].clone()
