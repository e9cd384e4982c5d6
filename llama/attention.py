"""Causal grouped-query attention, forward and back, by the fastest exact product that torch has.

    mixed = softmax(q k^T / sqrt(head_dim) + mask) v

    mask    token i sees j <= i, and with a window of W tokens j > i - W

torch chooses between cuDNN's, FlashAttention's and its own products by device; each keeps one
number a row and head for the backward pass, not the scores. Its graph holds that number, so here
alone a graph of autograd lives inside a layer's pass that is otherwise written out.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mixed(NamedTuple):
    """The result of an attention and what its backward pass needs."""

    inputs: tuple[Tensor, Tensor, Tensor]  # q (B, H, T, head_dim), k and v (B, H_kv, T, head_dim)
    output: Tensor  # (B, H, T, head_dim), with the graph to the inputs if it has a backward pass


def attention(
    query: Tensor,  # (B, H, T, head_dim)
    key: Tensor,  # (B, H_kv, T_all, head_dim)
    value: Tensor,
    window: int | None,
    has_backward: bool,
) -> Mixed:
    """Let every token mix the values of itself and of those before it.

    A single query is the last of all tokens; several are all tokens there are.

    Args:
        window: tokens that each sees, itself included; None: all.
        has_backward: keep what `attention_backward` needs.
    """
    num_queries = query.shape[2]
    if num_queries == 1 and window is not None:
        key, value = key[:, :, -window:], value[:, :, -window:]
    with torch.set_grad_enabled(has_backward):
        inputs = (query.detach(), key.detach(), value.detach())
        for tensor in inputs:
            tensor.requires_grad_(has_backward)
        if window is None or num_queries <= window:
            is_causal = num_queries > 1
            output = F.scaled_dot_product_attention(*inputs, is_causal=is_causal, enable_gqa=True)
        else:
            output = _in_a_window(*inputs, window)
    return Mixed(inputs, output)


def _in_a_window(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attend by a mask, which torch's products take without grouped queries only."""
    rows = torch.arange(query.shape[2], device=query.device)
    distance = rows[:, None] - rows[None, :]
    num_shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_shared, dim=1) for x in (key, value))
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attention_backward(mixed: Mixed, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value from that of the output."""
    query, key, value = torch.autograd.grad(mixed.output, mixed.inputs, grad)
    return query, key, value
