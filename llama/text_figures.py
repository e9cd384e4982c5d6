"""The perplexity of a text under a model, and how far the logits of two models are apart.

Two models need not fit the memory together. Each leaves its hidden states, D numbers a token; the
comparison computes the logits from them, V numbers a token, chunk by chunk. Both must have the same
head, which no adapter here changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.loss import chunk_rows, linear_cross_entropy
from llama.model import Llama
from rows.batch import NO_LOSS, Batch


@dataclass(frozen=True)
class ReadText:
    """What a model computes of a text."""

    perplexity: float
    hidden: list[Tensor]  # of each window (T, D), on the CPU


@dataclass(frozen=True)
class LogitChange:
    """How far the logits of two models are apart, over all tokens and the whole vocabulary."""

    largest: float
    mean: float


def windows_of(ids: list[int], length: int) -> list[Batch]:
    """Cut a text into windows of one row each; one token alone predicts nothing and is left out."""
    starts = range(0, len(ids), length)
    rows = [torch.tensor([ids[start : start + length]]) for start in starts if len(ids) - start > 1]
    return [Batch(row, row) for row in rows]


@torch.no_grad()
def read_text(model: Llama, windows: Sequence[Batch]) -> ReadText:
    """Compute the perplexity of a model on windows of a text, each window by itself, and the hidden
    states.

        perplexity = exp(mean of -log p(token | those before it in the window))

    The mean is over the tokens that have a label.
    """
    total, num_tokens, hidden = 0.0, 0, []
    scale, cap = model.config.logit_scale, model.config.final_logit_softcapping
    for window in windows:
        states = model.hidden_states(window.input_ids.to(model.device))[0]
        labels = window.labels[0, 1:].to(model.device)
        has_label = labels != NO_LOSS
        rows, targets = states[:-1][has_label], labels[has_label]
        total += float(linear_cross_entropy(rows, model.head, targets, scale=scale, cap=cap))
        num_tokens += len(targets)
        hidden.append(states.cpu())
    return ReadText(math.exp(total / num_tokens), hidden)


@torch.no_grad()
def logit_change(model: Llama, read: ReadText, other: ReadText) -> LogitChange:
    """Compare the logits of two models on the same windows; both have the head of `model`."""
    largest, total, count = 0.0, 0.0, 0
    for states, other_states in zip(read.hidden, other.hidden, strict=True):
        num_rows = chunk_rows(model.config.vocab_size, torch.float32, len(states))
        pairs = zip(states.split(num_rows), other_states.split(num_rows), strict=True)
        for rows, other_rows in pairs:
            logits, other_logits = (model.project(h.to(model.device)) for h in (rows, other_rows))
            change = (logits - other_logits).abs()
            largest = max(largest, float(change.max()))
            total += float(change.sum(dtype=torch.float64))
            count += change.numel()
    return LogitChange(largest, total / count)
