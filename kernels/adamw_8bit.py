"""Moments of AdamW in 8 bits: how they are quantized, in torch and in Triton.

    absmax[j] = max |x[i]|  over block j of 256
    code[i]   = the index in the map nearest to x[i] / absmax[j]

The format is bitsandbytes': m in the signed and v in the unsigned dynamic map
(`nf4/double_quant.py`), on a midpoint the even code, and an m that is not zero never takes the code
of the other sign or, if negative, of zero. Different here: a block of zeros has the codes of zero.
"""

# triton's annotations do not know static_range
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

import torch
from torch import Tensor

from kernels.adamw_arenas import MOMENT_BLOCK
from kernels.constants import constant
from kernels.language import tl, triton
from kernels.ptx import load_float
from nf4.double_quant import (
    DYNAMIC_MAP,
    DYNAMIC_MAP_MIDPOINTS,
    UNSIGNED_DYNAMIC_MAP,
    UNSIGNED_DYNAMIC_MAP_MIDPOINTS,
    nearest_codes,
)

# the code of zero: of m, of v
ZERO_CODES = (127, 0)
ZERO_CODE = tl.constexpr(ZERO_CODES[0])
SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)
# 1.5 * 2^23: added to a small float32, it rounds that to an integer in the sum's low bits
ROUNDER = tl.constexpr(12582912)
ROUNDER_BITS = tl.constexpr(0x4B400000)


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


def _thresholds(midpoints: Tensor, lower_wins: Tensor) -> Tensor:
    """Move the midpoints that belong to the level above to the number below them.

    So a strict comparison finds the code on a midpoint too.
    """
    below = torch.nextafter(midpoints, torch.tensor(-torch.inf))
    return torch.where(lower_wins, midpoints, below)


@constant
def moment_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # all float32
    """Make both maps, each with the values beyond which a magnitude's index grows by one.

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


@triton.jit
def nearest_magnitude(
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
def scaled_to_absmax(x):  # (BLOCKS, BLOCK)
    absmax = tl.max(tl.abs(x), 1)
    inverse = tl.div_rn(1.0, tl.maximum(absmax, SMALLEST_NORMAL))
    return x * inverse[:, None], absmax
