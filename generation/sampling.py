"""The choice of the next token from the logits: the most probable one, or one drawn by a seed.

Each draw takes one uniform number, a hash of the seed, the prompt's number and the token's place in
its sequence. So a drawn answer is the same however often it is drawn, in any batch and on any
device, as far as the logits are the same; no generator keeps a state.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How the next token is chosen.

    Attributes:
        temperature: the logits are divided by it; 0 takes the most probable token.
        top_k: draw from so many most probable tokens alone; None: from all.
        top_p: draw from the fewest tokens whose probabilities add up to this; 1: from all.
        repetition_penalty: logits of tokens that the sequence has are divided by it where they are
            positive, and multiplied by it where they are negative.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


def choose(
    logits: Tensor,  # (B, V) float32
    sampling: Sampling,
    seen: Tensor | None,  # (B, V) bool: the tokens of prompt and answer; None: not penalized
    sequence: Tensor,  # (B,) int64, the number of each prompt
    position: Tensor,  # (B,) int64, the index of the new token in its sequence
) -> Tensor:  # (B,) int64
    """Choose each sequence's next token, as transformers' processors in their order would.

        repetition penalty, temperature, top-k, top-p, draw

    Tokens as probable as the k-th are kept with it. Among equally probable tokens the smaller id
    comes first.

    Note:
        Does not wait for the device, nor decide anything by a value on it: a CUDA graph may hold
        it. Logits that are not numbers choose some token of the vocabulary.
    """
    logits = penalize(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    probabilities, ids = distribution(logits, sampling)
    mass = probabilities.cumsum(dim=1)
    drawn = uniform(sampling.seed, sequence, position) * mass[:, -1]
    place = (mass <= drawn.unsqueeze(1)).sum(dim=1)
    # rounding may carry a number close to one past the last token that has a probability
    last = (probabilities > 0).sum(dim=1) - 1
    place = place.minimum(last).clamp(min=0)
    return ids.gather(1, place.unsqueeze(1)).squeeze(1)


def penalize(
    logits: Tensor,  # (B, V) float32
    penalty: float,
    seen: Tensor | None,  # (B, V) bool
) -> Tensor:  # (B, V) float32
    """Make tokens less probable that a sequence has already (Keskar et al. 2019, "CTRL")."""
    if penalty == 1:
        return logits
    assert seen is not None
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def distribution(
    logits: Tensor,  # (B, V) float32
    sampling: Sampling,
) -> tuple[Tensor, Tensor]:  # (B, V) float64 and int64
    """Compute the probabilities to draw with, in descending order, and the tokens they are of.

    Tokens that top-k and top-p leave out have zero; the others' add up to what top-p keeps. In
    float64: a sum over a large vocabulary in float32 errs by more than a rare token's probability.
    """
    ordered, ids = (logits / sampling.temperature).sort(dim=1, descending=True, stable=True)
    if sampling.top_k is not None and sampling.top_k < ordered.shape[1]:
        kth = ordered[:, sampling.top_k - 1 : sampling.top_k]
        ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    probabilities = ordered.double().softmax(dim=1)
    if sampling.top_p < 1:
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return probabilities, ids


def uniform(
    seed: int,
    sequence: Tensor,  # (B,) int64
    position: Tensor,  # (B,) int64
) -> Tensor:  # (B,) float64 in [0, 1)
    """Hash a seed and two counters to a uniform number of 53 bits.

        z = mix(seed + (sequence + 1) gamma)
        z = mix(z + (position + 1) gamma)
        u = (z >> 11) / 2^53

    mix and gamma are SplitMix64's: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number
    Generators", with Stafford's Mix13. A sequence's numbers are SplitMix64's output from a state
    that seed and sequence give. Products and sums wrap in int64 as they do in uint64, on every
    device.
    """
    z = torch.full_like(sequence, _signed(seed))
    for counter in (sequence, position):
        z = _mix(z + (counter + 1) * _GAMMA)
    return _shifted(z, 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    """Mix the bits of 64-bit integers, each of which has one image."""
    z = (z ^ _shifted(z, 30)) * _MIX[0]
    z = (z ^ _shifted(z, 27)) * _MIX[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, num_bits: int) -> Tensor:
    """Shift right without the sign, which torch's int64 would copy."""
    return (z >> num_bits) & ((1 << 64 - num_bits) - 1)


def _signed(value: int) -> int:
    """The integer of int64 with the same lowest 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))
