"""Compute the gradients' norm, and from it the numbers that an update of AdamW needs, on the GPU.

    S       = sum of g^2 over the arena, in float64           1  every gradient, fixed order
    norm    = sqrt(S) / loss_scale                            2  one program: factors of the update

Two launches. The sum reads each gradient once, 4 bytes; the plan is a handful of numbers. Nothing
is asked of the host: where the norm is not finite, the plan says so, and the step counter t, which
lives on the device, stays.
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

import math
import struct

import torch
from torch import Tensor

from kernels.adamw_arenas import (
    CORRECTION2,
    FACTOR,
    IS_FINITE,
    MOMENT_BLOCK,
    NORM,
    NUM_SHARED_SCALARS,
    SUM_PROGRAMS,
    TILE_BLOCKS,
    Arenas,
)
from kernels.constants import constant
from kernels.language import tl, triton
from kernels.launch import launch

CLIP_EPSILON = 1e-6
CLIP_EPS = tl.constexpr(CLIP_EPSILON)

SUM_WARPS = 4
PLAN_WARPS = 4


@constant
def corrections(
    device: torch.device, betas: tuple[float, float]
) -> Tensor:  # (num_steps, 2) float64
    """Tabulate 1 - b1^t and sqrt(1 - b2^t) from t = 0, until float32 knows no difference from 1.

    A GPU's power function would round differently from Python's. Row 0 is never used.
    """
    beta1, beta2 = betas
    rows = [(1.0, 1.0)]
    while len(rows) == 1 or rows[-1][0] < 1 or rows[-1][1] < 1 - 2**-26:
        t = len(rows)
        rows.append((1 - beta1**t, math.sqrt(1 - beta2**t)))
    return torch.tensor(rows, dtype=torch.float64).to(device)


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


@triton.jit(do_not_specialize=["learning_rate_bits", "max_norm_bits", "num_corrections"])
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
    # one program computes the scalars of the step, in float64
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
    table = corrections(gradients.device, arenas.betas)
    launch(
        _adamw_sum_squares_kernel,
        (SUM_PROGRAMS,),
        partial_sums_ptr=arenas.partial_sums,
        gradients_ptr=gradients,
        num_tiles=gradients.numel() // tile,
        TILE=tile,
        PROGRAMS=SUM_PROGRAMS,
        num_warps=SUM_WARPS,
        # the product is exact, so fusing changes nothing but the time
        enable_fp_fusion=True,
    )
    launch(
        _adamw_plan_kernel,
        (1,),
        scalars_ptr=arenas.scalars,
        num_updates_ptr=arenas.num_updates,
        partial_sums_ptr=arenas.partial_sums,
        loss_scale_ptr=loss_scale,
        groups_ptr=arenas.groups,
        corrections_ptr=table,
        num_corrections=len(table),
        learning_rate_bits=_bits(learning_rate),
        max_norm_bits=_bits(max_norm),
        NUM_GROUPS=len(arenas.groups),
        PROGRAMS=SUM_PROGRAMS,
        num_warps=PLAN_WARPS,
        enable_fp_fusion=False,
    )
