"""Causal grouped-query attention, forward and back, by the fastest exact product there is.

    mixed = softmax(scale q k^T + mask) v

    mask    token i sees j <= i, with a window of W tokens j > i - W, and only its own sample

torch chooses between cuDNN's, FlashAttention's and its own products by device; each keeps one
number a row and head for the backward pass, not the scores. Its graph holds that number, so here
alone a graph of autograd lives inside a layer's pass that is otherwise written out. What torch does
not know, or only by a mask of T^2 numbers, `kernels.masked_attention` does: capped scores, windows
shorter than the rows, rows of several samples.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.masked_attention import (
    Samples,
    masked_attention,
    masked_attention_backward,
)


class Scores(NamedTuple):
    """How a layer scores the tokens that one sees."""

    scale: float  # of q k^T
    cap: float | None  # softcap(scale q k^T) takes its place; None: it does not
    window: int | None  # tokens that each sees, itself included; None: all


class Mixed(NamedTuple):
    """The result of an attention and what its backward pass needs."""

    inputs: tuple[Tensor, Tensor, Tensor]  # q (B, H, T, head_dim), k and v (B, H_kv, T, head_dim)
    # (B, H, T, head_dim), with the graph to the inputs if torch made it and it has a backward pass
    output: Tensor
    scores: Scores
    lse: Tensor | None  # (B, H, T) float32; None where torch made it
    samples: Samples | None


def attention(
    query: Tensor,  # (B, H, T, head_dim)
    key: Tensor,  # (B, H_kv, T_all, head_dim)
    value: Tensor,
    scores: Scores,
    has_backward: bool,
    samples: Samples | None = None,
) -> Mixed:
    """Let every token mix the values of itself and of those before it.

    A single query is the last of all tokens; several are all tokens there are.

    Args:
        has_backward: keep what `attention_backward` needs.
        samples: where each token lies, if a row holds several.
    """
    num_queries, (scale, cap, window) = query.shape[2], scores
    if num_queries == 1 and window is not None:
        key, value = key[:, :, -window:], value[:, :, -window:]
    is_windowed = window is not None and num_queries > window
    if cap is not None or is_windowed or samples is not None:
        output, lse = masked_attention(query, key, value, scale, cap, window, samples)
        return Mixed((query, key, value), output, scores, lse, samples)
    with torch.set_grad_enabled(has_backward):
        inputs = (query.detach(), key.detach(), value.detach())
        for tensor in inputs:
            tensor.requires_grad_(has_backward)
        is_causal = num_queries > 1
        output = F.scaled_dot_product_attention(
            *inputs, is_causal=is_causal, scale=scale, enable_gqa=True
        )
    return Mixed(inputs, output, scores, None, None)


def attention_backward(mixed: Mixed, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value from that of the output."""
    if mixed.lse is not None:
        scale, cap, window = mixed.scores
        return masked_attention_backward(
            grad, *mixed.inputs, mixed.output, mixed.lse, scale, cap, window, mixed.samples
        )
    query, key, value = torch.autograd.grad(mixed.output, mixed.inputs, grad)
    return query, key, value
