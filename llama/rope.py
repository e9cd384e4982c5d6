"""The angles of rotary position embeddings (Su et al. 2021); `kernels.rope` rotates by them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.rope_scaling import (
    LinearRopeScaling,
    LongRopeScaling,
    ProportionalRopeScaling,
    Rope,
    Turn,
    YarnRopeScaling,
)


def rope_frequencies(
    rope: Rope | None,
    rotary_dim: int,  # r, of the dimensions that turn
    is_long: bool = False,
) -> Tensor:  # (r / 2,) float32, radians per position
    """Compute the rotation speed of each pair of dimensions.

        f[i] = rope_theta^(-2 i / r)

    Linear scaling divides all by its factor. Llama 3.1 divides the slow ones by `factor`, keeps the
    fast ones and interpolates between, so that a model trained on short contexts (original =
    original_max_position_embeddings) reads long ones:

        smooth = (original f / 2 pi - low_freq_factor) / (high_freq_factor - low_freq_factor)
        f      = (1 - s) f / factor + s f          s = smooth clamped to [0, 1]

    Phi-3 divides each by a factor of its own, and by another for long sequences. YaRN interpolates
    like Llama 3.1 does, over the number of the pair in place of its frequency (`_yarn`). Gemma-4
    lets a share of the pairs turn, the fast ones, and divides their frequencies by its factor.

    Heads without rotary positions turn by nothing: cosines of 1 and sines of 0 leave every number
    as it is.

    The operations and their order are transformers', so the values are equal bit for bit.

    Args:
        is_long: for sequences beyond original_max_position_embeddings of a LongRopeScaling.
    """
    # on the CPU, so that a model built on the meta device has them too
    exponents = torch.arange(0, rotary_dim, 2, device="cpu").float() / rotary_dim
    if rope is None:
        return torch.zeros_like(exponents)
    frequencies = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearRopeScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, ProportionalRopeScaling):
        frequencies[int(scaling.share * rotary_dim // 2) :] = 0
        return frequencies / scaling.factor
    if isinstance(scaling, LongRopeScaling):
        factors = scaling.long_factor if is_long else scaling.short_factor
        return 1.0 / (torch.tensor(factors, device="cpu") * rope.theta**exponents)
    if isinstance(scaling, YarnRopeScaling):
        return _yarn(rope.theta, scaling, exponents)
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def stacked_frequencies(
    turns: Sequence[Turn],
) -> Tensor:  # (number of turns, 2, most pairs of dimensions) float32
    """Compute the frequencies of several kinds of heads, for sequences of the usual length and for
    long ones; zeros behind those of heads with fewer pairs."""
    most = max(turn.rotary_dim for turn in turns) // 2
    rows = [
        F.pad(own, (0, most - len(own)))
        for turn in turns
        for own in (rope_frequencies(*turn, is_long) for is_long in (False, True))
    ]
    return torch.stack(rows).unflatten(0, (-1, 2))


def _yarn(theta: float, scaling: YarnRopeScaling, exponents: Tensor) -> Tensor:
    """Divide the slow frequencies by a factor, and keep the fast ones.

        ramp = (i - low) / (high - low), clamped to [0, 1]
        f    = ramp f / factor + (1 - ramp) f

    The pairs low and high turn beta_fast and beta_slow times over the first length. YaRN section
    3.2, with the bounds of its authors' code.
    """
    num_dims = 2 * len(exponents)

    def pair_of(turns: float) -> float:
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return num_dims * math.log(length) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, num_dims - 1)
    if low == high:
        # as transformers keeps the ramp from dividing by 0
        high += 0.001
    ramp = ((torch.arange(len(exponents), device="cpu").float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    radian = theta**exponents  # in positions
    return 1.0 / (scaling.factor * radian) * (1 - kept) + 1.0 / radian * kept


def rope_factor(rope: Rope | None) -> float:
    """Find the factor of cosines and sines."""
    scaling = None if rope is None else rope.scaling
    has_factor = isinstance(scaling, (LongRopeScaling, YarnRopeScaling))
    return scaling.attention_factor if has_factor else 1.0


def rope_tables(
    frequencies: Tensor,  # (r / 2,) float32
    positions: Tensor,  # (T,)
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (T, r / 2) float32 each
    """Compute cos and sin of every position's rotation, times a factor."""
    angles = positions[:, None].float() * frequencies[None, :]
    return angles.cos() * factor, angles.sin() * factor


def query_factors(
    rope: Rope | None,
    positions: Tensor,  # (T,)
) -> Tensor | None:  # (T,) float32
    """Compute the factor of every position's query; None where queries are as they are.

    1 + beta log(1 + floor(position / original_max_position_embeddings))
    """
    scaling = None if rope is None else rope.query_scaling
    if scaling is None:
        return None
    lengths = torch.floor(positions / scaling.original_max_position_embeddings)
    return 1 + scaling.beta * torch.log(1 + lengths)
