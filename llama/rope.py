"""The angles of rotary position embeddings (Su et al. 2021); `kernels.rope` rotates by them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llama.rope_scaling import LinearRopeScaling, LongRopeScaling, Rope


def rope_frequencies(
    rope: Rope | None, head_dim: int, is_long: bool = False
) -> Tensor:  # (head_dim / 2,) float32, radians per position
    """Compute the rotation speed of each pair of dimensions.

        f[i] = rope_theta^(-2 i / head_dim)

    Linear scaling divides all by its factor. Llama 3.1 divides the slow ones by `factor`, keeps the
    fast ones and interpolates between, so that a model trained on short contexts (original =
    original_max_position_embeddings) reads long ones:

        smooth = (original f / 2 pi - low_freq_factor) / (high_freq_factor - low_freq_factor)
        f      = (1 - s) f / factor + s f          s = smooth clamped to [0, 1]

    Phi-3 divides each by a factor of its own, and by another for long sequences.

    Heads without rotary positions turn by nothing: cosines of 1 and sines of 0 leave every number
    as it is.

    The operations and their order are transformers', so the values are equal bit for bit.

    Args:
        is_long: for sequences beyond original_max_position_embeddings of a LongRopeScaling.
    """
    # on the CPU, so that a model built on the meta device has them too
    exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    if rope is None:
        return torch.zeros_like(exponents)
    frequencies = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearRopeScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, LongRopeScaling):
        factors = scaling.long_factor if is_long else scaling.short_factor
        return 1.0 / (torch.tensor(factors, device="cpu") * rope.theta**exponents)
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rope_factor(rope: Rope | None) -> float:
    """Find the factor of cosines and sines."""
    scaling = None if rope is None else rope.scaling
    return scaling.attention_factor if isinstance(scaling, LongRopeScaling) else 1.0


class RopeTables(NamedTuple):
    """The rotations of positions: a row of each."""

    cos: Tensor  # (T, head_dim / 2) float32
    sin: Tensor


def rope_tables(
    frequencies: Tensor,  # (head_dim / 2,) float32
    positions: Tensor,  # (T,)
    factor: float = 1.0,
) -> RopeTables:
    """Compute cos and sin of every position's rotation, times a factor."""
    angles = positions[:, None].float() * frequencies[None, :]
    return RopeTables(angles.cos() * factor, angles.sin() * factor)
