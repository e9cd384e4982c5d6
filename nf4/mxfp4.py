"""MXFP4: weights in 4 bits with a power of two for each block of 32, expanded exactly.

    w = E2M1[code] 2^(scale - 127)

    blocks  (..., G, 16) uint8   two codes a byte, the first in the low nibble
    scales  (..., G) uint8       E8M0, an exponent alone

A code is a sign, two bits of an exponent and one of a mantissa. All values and all scales are
bfloat16's, subnormal numbers among them, so expanding rounds nothing. The largest values at the
largest scales, which no weight has, are beyond its range.

OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1. NF4 differs: its values
lie where those of a normal distribution are dense, and its scale is the block's largest value.
"""

from functools import cache

import torch
from torch import Tensor

# behind the name of a weight, for the two tensors that stand for it
BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
_EXPONENT_BIAS = 127
# what weights are expanded to
EXPANDED = torch.bfloat16


@cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor(VALUES, device=device)


def expand(
    blocks: Tensor,  # (..., G, 16) uint8
    scales: Tensor,  # (..., G) uint8
) -> Tensor:  # (..., 32 G) bfloat16
    """Expand blocks of codes to weights."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    values = _values(blocks.device)[codes.int()]
    exponents = scales.int() - _EXPONENT_BIAS
    return torch.ldexp(values, exponents[..., None]).flatten(-2).to(EXPANDED)
