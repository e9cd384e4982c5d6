"""The choice of the next token from the logits: the most probable one, or one drawn by a seed."""

from typing import NamedTuple

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
    seen: Tensor | None,  # (B, V) bool
    sequence: Tensor,  # (B,) int64
    position: Tensor,  # (B,) int64
) -> Tensor:  # (B,) int64
    """Choose the next token of each sequence."""
    assert sampling.temperature == 0
    return logits.argmax(1)
