"""A Hadamard rotation of a matrix's columns, and INT8 with a scale a row behind it.

    x'[m, 16 i + j] = sum over r of H[r, j] x[m, 16 i + r]        H of 16 x 16, of 1 and -1
    scales[m]       = max |x'[m]| / 127
    values[m]       = round(x'[m] / scales[m])

INT8 has steps of one size, so one large number in a row costs all others their accuracy. H spreads
it over 16 numbers. On the activations of a real model a product in INT8 errs by 1.0 to 1.4 % then,
by 1.6 to 3.3 % without H, and by 2.3 to 3.3 % in E4M3, whose 3 bits behind the point are few for
numbers of like size. H of 64 x 64 would get 0.9 to 1.3 %.

H is symmetric and H H = 16, so y = x W^T needs no rotation back if a weight's rows are rotated and
divided by 16: y = x' (W' / 16)^T. A weight's scales hold that 16.

H comes as four levels of sums and differences, in one order: a kernel equals the reference bit for
bit. What is under 2^22 in magnitude is rounded by adding 1.5 * 2^23, whose last bit is worth 1: to
nearest, ties to even, and the sum's lowest 8 bits are the number in INT8.

QuaRot (Ashkboos et al. 2024) rotates activations and weights so.
"""

# triton's annotations know no bitcast of a dtype
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.fp8 import LEAST_LARGEST, Fp8Rows, Fp8Weight
from kernels.language import tl, triton

INT8 = torch.int8
# the numbers that H mixes: 2^LEVELS
LEVELS = 4
WIDTH = 1 << LEVELS
# a factor, for the same reason as E4M3's
INT8_SCALE_OF_LARGEST = 1 / 127
_LEVELS = tl.constexpr(LEVELS)
_WIDTH = tl.constexpr(WIDTH)
_ROUNDING = tl.constexpr(1.5 * 2**23)


class RotatedRows(NamedTuple):
    """A rotated matrix in INT8 with a scale a row: x' = values * scales[:, None].

    Of a weight W' / 16.
    """

    values: Tensor  # (M, K) INT8, rows contiguous
    scales: Tensor  # (M,) float32


# what the products in 8 bits multiply
EightBitRows = Fp8Rows | RotatedRows
EightBitWeight = Fp8Weight | RotatedRows


def empty_rotated_rows(shape: Sequence[int], device: torch.device) -> RotatedRows:  # (M, K)
    """Allocate a rotated matrix with a scale a row."""
    values = torch.empty(shape, dtype=INT8, device=device)
    return RotatedRows(values, torch.empty(shape[:1], dtype=torch.float32, device=device))


def rotated(x: Tensor) -> Tensor:  # (M, K) -> (M, K) float32
    """Mix every 16 columns by H."""
    parts = x.float().view(-1, WIDTH)
    for _ in range(LEVELS):
        left, right = parts.view(-1, WIDTH // 2, 2).unbind(-1)
        parts = torch.cat([left + right, left - right], dim=1)
    return parts.view(x.shape)


def int8_scale_of(largest: Tensor) -> Tensor:  # float32, of any shape
    """Find the scale that brings the largest magnitude to 127; NaN if it is not finite."""
    scale = largest.clamp(min=LEAST_LARGEST) * INT8_SCALE_OF_LARGEST
    return scale.masked_fill(~largest.isfinite(), torch.nan)


def in_int8(scaled: Tensor) -> Tensor:  # float32, to 127 in magnitude -> INT8
    """Round to nearest, ties to even; NaN counts as 127, and its scale is NaN."""
    return scaled.nan_to_num(nan=127.0).round().to(INT8)


@triton.jit
def rotate(x):  # float32, a multiple of 16 -> the same
    for _ in tl.static_range(_LEVELS):
        pairs = tl.reshape(x, (x.shape[0] // _WIDTH, _WIDTH // 2, 2))
        left, right = tl.split(pairs)
        mixed = tl.join(left + right, left - right).permute(0, 2, 1)
        x = tl.reshape(mixed, (x.shape[0],))
    return x


@triton.jit
def round_to_int8(scaled):  # float32, to 127 in magnitude; NaN becomes 127
    # the minimum keeps the product before it and the sum apart: as one multiply-add they would
    # round once
    wide = tl.minimum(scaled, 127.0) + _ROUNDING
    return wide.to(tl.int32, bitcast=True).to(tl.int8)
