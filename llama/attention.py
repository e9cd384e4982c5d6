"""Causal grouped-query attention, forward and back, by the fastest exact product there is.

    mixed = softmax(scale q k^T + mask) v

    mask    token i sees j <= i, and with a window of W tokens j > i - W

torch chooses between cuDNN's, FlashAttention's and its own products by device; each keeps one
number a row and head for the backward pass, not the scores. Its graph holds that number, so here
alone a graph of autograd lives inside a layer's pass that is otherwise written out. torch knows no
scores that are capped: `kernels.softcap_attention` has those.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.softcap_attention import softcap_attention, softcap_attention_backward


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
    lse: Tensor | None  # (B, H, T) float32, where scores are capped


def attention(
    query: Tensor,  # (B, H, T, head_dim)
    key: Tensor,  # (B, H_kv, T_all, head_dim)
    value: Tensor,
    scores: Scores,
    has_backward: bool,
) -> Mixed:
    """Let every token mix the values of itself and of those before it.

    A single query is the last of all tokens; several are all tokens there are.

    Args:
        has_backward: keep what `attention_backward` needs.
    """
    num_queries, (scale, cap, window) = query.shape[2], scores
    if num_queries == 1 and window is not None:
        key, value = key[:, :, -window:], value[:, :, -window:]
    if cap is not None:
        output, lse = softcap_attention(query, key, value, scale, cap, window)
        return Mixed((query, key, value), output, scores, lse)
    with torch.set_grad_enabled(has_backward):
        inputs = (query.detach(), key.detach(), value.detach())
        for tensor in inputs:
            tensor.requires_grad_(has_backward)
        if window is None or num_queries <= window:
            is_causal = num_queries > 1
            output = F.scaled_dot_product_attention(
                *inputs, is_causal=is_causal, scale=scale, enable_gqa=True
            )
        else:
            output = _in_a_window(*inputs, scale, window)
    return Mixed(inputs, output, scores, None)


def _in_a_window(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """Attend by a mask, which torch's products take without grouped queries only."""
    rows = torch.arange(query.shape[2], device=query.device)
    distance = rows[:, None] - rows[None, :]
    num_shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_shared, dim=1) for x in (key, value))
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def attention_backward(mixed: Mixed, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value from that of the output."""
    scale, cap, window = mixed.scores
    if cap is not None:
        assert mixed.lse is not None
        return softcap_attention_backward(
            grad, *mixed.inputs, mixed.output, mixed.lse, scale, cap, window
        )
    query, key, value = torch.autograd.grad(mixed.output, mixed.inputs, grad)
    return query, key, value
