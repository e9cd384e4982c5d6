"""E4M3, the 8-bit floats of the FP8 products: how numbers become it, the records, who can multiply.

    values = E4M3(v / scale)        scale = max |v| / 448

E4M3 has a sign, 4 bits of exponent and 3 of mantissa: 448 is its largest number, 2^-9 the smallest
above zero, and it has a NaN and no infinity. So numbers go with a float32 scale, one a row of
activations and one a weight, which brings the largest to 448.

Numbers are multiplied by 1 / scale and rounded once, to nearest, ties to even, subnormal ones too;
torch on a CPU and a GPU's instruction (`cvt.rn.satfinite`) agree on that. They differ above 464,
of which torch makes a NaN and a GPU 448. No number comes there: the scale, its inverse and the
product round by 2^-24 of themselves each, and a little more than 448 becomes 448 in both. Triton
has no E4M3 below compute capability 8.9.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
# of a scale and the largest magnitude that it stands for. A factor, since torch divides by a Python
# number on a CPU and multiplies by its inverse on a GPU
SCALE_OF_LARGEST = 1 / 448
# a smaller maximum counts as this one, so that neither the scale nor its inverse leaves float32's
# normal numbers; zeros stay zeros
LEAST_LARGEST = 2.0**-100
# the first GPUs with tensor cores for E4M3
FP8_FROM = (8, 9)
# rows of FP8 products begin at multiples of 16 bytes, and are a number of those long
ALIGNMENT = 16


class Fp8Rows(NamedTuple):
    """A matrix with a scale a row: x = values * scales[:, None]."""

    values: Tensor  # (M, K) E4M3, rows contiguous
    scales: Tensor  # (M,) float32


class Fp8Weight(NamedTuple):
    """A matrix with one scale: W = values * scale."""

    values: Tensor  # (N, K) E4M3, rows contiguous
    scale: Tensor  # () float32


class LowRankTail(NamedTuple):
    """A low-rank update of a product's rows: h B^T, in 16 bits."""

    h: Tensor  # (M, T), rows contiguous
    B: Tensor  # (N, T), rows or columns contiguous


def empty_fp8_rows(shape: Sequence[int], device: torch.device) -> Fp8Rows:  # shape: (M, K)
    """Allocate a matrix with a scale a row."""
    values = torch.empty(shape, dtype=E4M3, device=device)
    return Fp8Rows(values, torch.empty(shape[:1], dtype=torch.float32, device=device))


def scale_of(largest: Tensor) -> Tensor:  # float32, of any shape
    """Find the scale that brings the largest magnitude to 448; NaN if it is not finite."""
    scale = largest.clamp(min=LEAST_LARGEST) * SCALE_OF_LARGEST
    return scale.masked_fill(~largest.isfinite(), torch.nan)


def fp8_obstacle(capability: tuple[int, int]) -> str:
    """Say what keeps a GPU from FP8 products; an empty string if nothing does."""
    if capability < FP8_FROM:
        return f"FP8 products need compute capability 8.9 or later: this GPU has {capability}"
    return ""


def shape_obstacle(num_rows: int, num_columns: int) -> str:
    """Say what keeps a weight from FP8 products; an empty string if nothing does.

    Its transpose is an operand of the backward pass, so both sizes count.
    """
    if num_rows % ALIGNMENT or num_columns % ALIGNMENT:
        return (
            f"a weight in 8 bits must have rows and columns that are multiples of {ALIGNMENT}: got "
            f"{num_rows} and {num_columns}; multiply it in 16 bits"
        )
    return ""
