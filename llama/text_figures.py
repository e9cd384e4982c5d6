"""What models make of a text: its perplexity, and how far their logits are apart.

Models that are compared need not fit the memory together: of each its hidden states are kept, D
numbers a token, and the logits, V numbers a token, are formed from them chunk by chunk where two
are compared. That takes one head for all, which no adapter here changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.loss import chunk_rows, linear_cross_entropy
from llama.model import Llama


@dataclass(frozen=True)
class Reading:
    """A model's way through a text."""

    perplexity: float
    hidden: list[Tensor]  # of each window (T, D), on the CPU


@dataclass(frozen=True)
class LogitChange:
    """How far the logits of two models are apart, over all tokens and the whole vocabulary."""

    largest: float
    mean: float


def windows_of(ids: list[int], length: int) -> list[Tensor]:
    """Cut a text into windows of (1, T) token ids; one token alone predicts nothing and is left
    out."""
    starts = range(0, len(ids), length)
    return [torch.tensor([ids[start : start + length]]) for start in starts if len(ids) - start > 1]


@torch.no_grad()
def read_text(model: Llama, windows: Sequence[Tensor]) -> Reading:
    """Compute a model's perplexity on windows of a text, each read for itself, and its hidden
    states.

        perplexity = exp(mean of -log p(token | those before it in the window))
    """
    total, num_tokens, hidden = 0.0, 0, []
    cap = model.config.final_logit_softcapping
    for ids in windows:
        ids = ids.to(model.device)
        states = model.hidden_states(ids)[0]
        total += float(linear_cross_entropy(states[:-1], model.head, ids[0, 1:], cap))
        num_tokens += ids.shape[1] - 1
        hidden.append(states.cpu())
    return Reading(math.exp(total / num_tokens), hidden)


@torch.no_grad()
def logit_change(model: Llama, reading: Reading, other: Reading) -> LogitChange:
    """Compare the logits that two models with the head of `model` have on the same windows."""
    largest, total, count = 0.0, 0.0, 0
    for states, other_states in zip(reading.hidden, other.hidden, strict=True):
        num_rows = chunk_rows(model.config.vocab_size, torch.float32, len(states))
        pairs = zip(states.split(num_rows), other_states.split(num_rows), strict=True)
        for rows, other_rows in pairs:
            logits, other_logits = (model.project(h.to(model.device)) for h in (rows, other_rows))
            change = (logits - other_logits).abs()
            largest = max(largest, float(change.max()))
            total += float(change.sum(dtype=torch.float64))
            count += change.numel()
    return LogitChange(largest, total / count)
