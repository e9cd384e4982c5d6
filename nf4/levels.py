"""The 16 values of 4-bit NormalFloat and where they come from.

NF4 is a lookup table, not a float format: code i stands for LEVELS[i], and no bit of a code is a
sign or an exponent. The levels are quantiles of the standard normal distribution, scaled to
[-1, 1], with an exact zero (QLoRA section 3, "4-bit NormalFloat Quantization"; `nf4/README.md`
derives them). The table below is the one definition in this repository; `derive_levels` shows how
it arises, and a test asserts that both are equal bit for bit.
"""

from statistics import NormalDist

import torch
from torch import Tensor

LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)

# a value encodes to the number of midpoints strictly below it: on a midpoint the lower code wins
MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / 2

# the mean of 1 - 1/30 and 1 - 1/32, the outermost half-bin quantiles for 15 and for 16 levels
OUTERMOST_QUANTILE = 0.9677083


def derive_levels() -> Tensor:  # (16,) float32
    """Compute the levels from quantiles of the standard normal distribution.

        positive = Q(linspace(o, 1/2, 9)[:-1])      8 levels
        negative = -Q(linspace(o, 1/2, 8)[:-1])     7 levels
        LEVELS   = sort(negative, 0, positive) / Q(o)

    with Q the inverse normal CDF and o = OUTERMOST_QUANTILE. Quantiles are spaced in float32,
    mapped through Q in float64 and normalized in float32; any other mix of precisions misses the
    published table by 1e-7.
    """

    def quantiles(count: int) -> list[float]:
        spaced = torch.linspace(OUTERMOST_QUANTILE, 0.5, count, dtype=torch.float32)[:-1]
        return [NormalDist().inv_cdf(p) for p in spaced.double().tolist()]

    values = [-q for q in quantiles(8)] + [0.0] + quantiles(9)
    levels = torch.tensor(sorted(values), dtype=torch.float64).float()
    return levels / levels.max()
