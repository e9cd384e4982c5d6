"""Causal grouped-query attention, forward and back, by the fastest exact product that torch has.

    mixed = softmax(q k^T / sqrt(head_dim) + causal mask) v

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


def attention(query: Tensor, key: Tensor, value: Tensor, has_backward: bool) -> Mixed:
    """Let every token mix the values of itself and of those before it.

    A single query sees all keys; several see a triangle, and there are as many keys as queries.

    Args:
        has_backward: keep what `attention_backward` needs.
    """
    with torch.set_grad_enabled(has_backward):
        inputs = (query.detach(), key.detach(), value.detach())
        for tensor in inputs:
            tensor.requires_grad_(has_backward)
        is_causal = query.shape[2] > 1
        output = F.scaled_dot_product_attention(*inputs, is_causal=is_causal, enable_gqa=True)
    return Mixed(inputs, output)


def attention_backward(mixed: Mixed, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value from that of the output."""
    query, key, value = torch.autograd.grad(mixed.output, mixed.inputs, grad)
    return query, key, value
