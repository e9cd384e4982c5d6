"""Bend scores so that none exceeds a cap, for the kernels that do so in passing.

    softcap(x) = cap tanh(x / cap)                 softcap'(x) = 1 - (softcap(x) / cap)^2

Gemma Team 2024, "Gemma 2", section 2. Ten operations a value, two of them on the special function
unit, in float32. By the exponential, so a result errs by up to ERROR of the cap, where tanh itself
would err by units of its own last place: 2e-5 of a cap of 50, and mostly far less.
"""

import torch
from torch import Tensor

from kernels.language import tl, triton

# of float32: two units of the exponential count half, two of the quotient in full, one is rounding
ERROR = 4 * torch.finfo(torch.float32).eps


def softcap_reference(x: Tensor, cap: float) -> Tensor:
    """Compute cap tanh(x / cap) in the tensor's dtype."""
    return cap * torch.tanh(x / cap)


@triton.jit
def softcap(x, cap):
    # of both signs, and infinities, the exponential is finite or its reciprocal zero
    return cap - tl.fdiv(2.0 * cap, 1.0 + tl.exp(x * (2.0 / cap)))


@triton.jit
def softcap_slope(capped, cap):
    share = capped * (1.0 / cap)
    return 1.0 - share * share
