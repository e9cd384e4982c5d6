"""Update every parameter of a model by AdamW in one launch, over flat arenas.

    norm    = |g| / loss_scale                                `adamw_plan.py`: two launches
    g       = g min(1, max_norm / (norm + 1e-6)) / loss_scale
    p       = p - lr wd p                                     this file: the third launch
    m       = m + (1 - b1) (g - m)
    v       = b2 v + (1 - b2) g^2
    p       = p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Loshchilov and Hutter 2019, algorithm 2; QLoRA section 3, "Paged Optimizers". `adamw_arenas.py` says
how the buffers are laid out, `adamw_8bit.py` how moments are kept in 8 bits. The host decides
nothing: where the norm is not finite, the third launch leaves everything as it was. It moves 28
bytes a parameter with float32 moments (p, g, m, v read, p, m, v written) and 16 + 16/256 with 8-bit
moments. bitsandbytes launches once a tensor and waits for the device after each; its CUDA kernels
divide approximately and apply the weight decay after the step, where torch and this file apply it
before.

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

import torch
from torch import Tensor

from kernels.adamw_8bit import (
    ZERO_CODE,
    dequantize_moment,
    moment_tables,
    nearest_magnitude,
    quantize_moment,
    scaled_to_absmax,
)
from kernels.adamw_arenas import (
    CORRECTION2,
    FACTOR,
    IS_FINITE,
    MOMENT_BLOCK,
    NORM,
    NUM_SHARED_SCALARS,
    TILE_BLOCKS,
    Arenas,
    Moments,
)
from kernels.adamw_plan import CLIP_EPSILON, _launch_adamw_plan, corrections
from kernels.language import tl, triton
from kernels.launch import launch
from kernels.ptx import load_byte, load_float
from nf4.double_quant import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP

EPSILON = 1e-8
# of a thread of the update with 8-bit moments: five programs on an H100's multiprocessor; left to
# itself, the compiler takes fewer for an A100, and spills
NUM_REGISTERS_8BIT = 96

BLOCK = tl.constexpr(MOMENT_BLOCK)
# elements of a vector: 16 bytes in float32, 4 of codes
VECTOR = tl.constexpr(4)
EPS = tl.constexpr(EPSILON)


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
    beta1, beta2 = arenas.betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(EPSILON)
    for span, factor, weight_decay in _spans_of_groups(arenas):
        p, rate = arenas.parameters[span], learning_rate * factor
        p.mul_(1 - rate * weight_decay)
        p.addcdiv_(m[span], denominator[span], value=-rate / (1 - beta1**t))
    _store_moments(arenas.moments, m, v)
    return norm


def _spans_of_groups(arenas: Arenas) -> list[tuple[slice, float, float]]:
    """List runs of blocks of one parameter group: their elements, factor and weight decay."""
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
    """Quantize the blocks in 8 bit; without any, m and v are the moments themselves."""
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


def make_adamw_tables(device: torch.device, betas: tuple[float, float]) -> None:
    """Make the tables that a step reads on a device, so that they are there when memory ends."""
    corrections(device, betas)
    moment_tables(device)


@triton.jit
def _step(p, g, m, v, decay, step_size, factor, correction2, b1_rest, b2, b2_rest):
    # fused where torch's CPU kernels fuse; launch with enable_fp_fusion=False for the rest
    g *= factor
    # torch's lerp begins at the nearer end
    is_near = b1_rest < 0.5
    m = tl.fma(g - m, tl.where(is_near, b1_rest, b1_rest - 1), tl.where(is_near, m, g))
    v = tl.fma(g * b2_rest, g, v * b2)
    denominator = tl.div_rn(tl.sqrt_rn(v), correction2) + EPS
    p = p * decay + tl.div_rn(m * step_size, denominator)
    return p, m, v


@triton.jit
def _adamw_kernel(
    parameters_ptr,
    gradients_ptr,
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
    b1_rest,  # 1 - b1
    b2,
    b2_rest,  # 1 - b2
    HAS_8BIT: tl.constexpr,
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
        # past the cache of written data: each scale is read before this kernel writes it
        m = load_float(map_ptr + m_code) * load_float(exp_avg_absmax_ptr + row)
        v = load_float(unsigned_map_ptr + v_code) * load_float(exp_avg_sq_absmax_ptr + row)
        p, m, v = _step(p, g, m, v, decay, step_size, factor, correction2, b1_rest, b2, b2_rest)
        m_scaled, m_absmax = scaled_to_absmax(m)
        magnitude = nearest_magnitude(tl.abs(m_scaled), thresholds_ptr, 1)
        # -1 is no level, and a negative moment does not become zero
        negative = tl.minimum(tl.maximum(magnitude, 1), ZERO_CODE)
        is_negative = m.to(tl.int32, bitcast=True) < 0
        m_code = ZERO_CODE + tl.where(is_negative, -negative, magnitude)
        v_scaled, v_absmax = scaled_to_absmax(v)
        v_code = nearest_magnitude(v_scaled, unsigned_thresholds_ptr, 2)
        tl.store(exp_avg_codes_ptr + offs, m_code.to(tl.uint8))
        tl.store(exp_avg_sq_codes_ptr + offs, v_code.to(tl.uint8))
        tl.store(exp_avg_absmax_ptr + block, m_absmax)
        tl.store(exp_avg_sq_absmax_ptr + block, v_absmax)
    else:
        offs_moments = offs - num_8bit_blocks.to(tl.int64) * BLOCK
        m = tl.load(exp_avg_ptr + offs_moments)
        v = tl.load(exp_avg_sq_ptr + offs_moments)
        p, m, v = _step(p, g, m, v, decay, step_size, factor, correction2, b1_rest, b2, b2_rest)
        tl.store(exp_avg_ptr + offs_moments, m)
        tl.store(exp_avg_sq_ptr + offs_moments, v)
    tl.store(parameters_ptr + offs, p)


def _launch_adamw(arenas: Arenas) -> None:
    moments = arenas.moments
    num_blocks, num_8bit_blocks = len(arenas.group_of_block), len(moments.exp_avg_absmax)
    assert num_blocks % TILE_BLOCKS == 0
    assert num_8bit_blocks % TILE_BLOCKS == 0
    beta1, beta2 = arenas.betas
    levels, thresholds, unsigned_levels, unsigned_thresholds = moment_tables(
        arenas.parameters.device
    )
    launch(
        _adamw_kernel,
        (num_blocks // TILE_BLOCKS,),
        parameters_ptr=arenas.parameters,
        gradients_ptr=arenas.gradients,
        exp_avg_ptr=moments.exp_avg,
        exp_avg_sq_ptr=moments.exp_avg_sq,
        exp_avg_codes_ptr=moments.exp_avg_codes,
        exp_avg_sq_codes_ptr=moments.exp_avg_sq_codes,
        exp_avg_absmax_ptr=moments.exp_avg_absmax,
        exp_avg_sq_absmax_ptr=moments.exp_avg_sq_absmax,
        group_of_block_ptr=arenas.group_of_block,
        scalars_ptr=arenas.scalars,
        map_ptr=levels,
        thresholds_ptr=thresholds,
        unsigned_map_ptr=unsigned_levels,
        unsigned_thresholds_ptr=unsigned_thresholds,
        num_8bit_blocks=num_8bit_blocks,
        # rounded before the kernel subtracts from it, also by the interpreter
        b1_rest=struct.unpack("f", struct.pack("f", 1 - beta1))[0],
        b2=beta2,
        b2_rest=1 - beta2,
        HAS_8BIT=num_8bit_blocks > 0,
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

    and then AdamW, with the learning rate and the weight decay of each block's parameter group.

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
