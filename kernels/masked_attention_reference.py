"""Attention under a mask in torch, forward and back: the kernels' reference and the CPU path.

The equations are those of `masked_attention.py`. Everything is computed in float32 and rounded
once, for some queries at a time, so that at most NUM_SCORES scores are held.
"""

import math

import torch
from torch import Tensor

from kernels.masked_attention_mask import Samples, is_seen_reference
from kernels.softcap import softcap_reference

# numbers of the scores that are held at once
NUM_SCORES = 1 << 24


def masked_attention_reference(
    query: Tensor,  # (B, H, T, E)
    key: Tensor,  # (B, H_kv, T_all, E)
    value: Tensor,  # (B, H_kv, T_all, E)
    scale: float,
    cap: float | None,
    window: int | None,
    samples: Samples | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> tuple[Tensor, Tensor]:  # out (B, H, T, E), lse (B, H, T) float32
    """Attend in float32, some queries at a time, rounding once."""
    outs, lses = [], []
    for rows in _row_chunks(query, key):
        scores = _scores(query[:, :, rows], rows, query, key, scale, cap, window, samples)
        largest = scores.amax(dim=-1, keepdim=True)
        if sinks is not None:
            sink = sinks.float().view(key.shape[1], -1, 1, 1)
            largest = largest.maximum(sink)
        # by lse instead of the largest, weights would err as much as large scores are rounded
        weights = (scores - largest).exp()
        total = weights.sum(dim=-1, keepdim=True)
        if sinks is not None:
            total += (sink - largest).exp()
        out = weights @ value[:, :, None].float() / total
        outs.append(out.flatten(1, 2).to(query.dtype))
        lses.append((largest + total.log()).squeeze(-1).flatten(1, 2))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def masked_attention_backward_reference(
    grad: Tensor,  # (B, H, T, E)
    query: Tensor,  # (B, H, T, E)
    key: Tensor,  # (B, H_kv, T, E)
    value: Tensor,  # (B, H_kv, T, E)
    out: Tensor,  # (B, H, T, E)
    lse: Tensor,  # (B, H, T) float32
    scale: float,
    cap: float | None,
    window: int | None,
    samples: Samples | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients in float32, some queries at a time, rounding once."""
    grad_q = torch.empty_like(query)
    grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
    for rows in _row_chunks(query, key):
        some_q, some_grad, some_out = (
            _grouped(x[:, :, rows], key).float() for x in (query, grad, out)
        )
        scores = _scores(query[:, :, rows], rows, query, key, scale, cap, window, samples)
        p = (scores - _grouped(lse[:, :, rows], key)[..., None]).exp()
        delta = (some_grad * some_out).sum(dim=-1, keepdim=True)
        grad_s = scale * p * (some_grad @ value[:, :, None].float().mT - delta)
        if cap is not None:
            grad_s *= 1 - (scores.clamp(min=-cap) / cap).square()
        grad_q[:, :, rows] = (grad_s @ key[:, :, None].float()).flatten(1, 2).to(query.dtype)
        grad_k += (grad_s.mT @ some_q).sum(dim=2)
        grad_v += (p.mT @ some_grad).sum(dim=2)
    return grad_q, grad_k.to(key.dtype), grad_v.to(value.dtype)


def _row_chunks(query: Tensor, key: Tensor) -> list[slice]:
    """Split the queries so that their scores do not exceed NUM_SCORES."""
    B, H, T, _ = query.shape
    step = max(1, NUM_SCORES // (B * H * key.shape[2]))
    return [slice(first, min(first + step, T)) for first in range(0, T, step)]


def _grouped(heads: Tensor, key: Tensor) -> Tensor:  # (B, H, ...) -> (B, H_kv, H / H_kv, ...)
    """View the query heads by the head of keys and values that they share."""
    return heads.unflatten(1, (key.shape[1], -1))


def _scores(
    some: Tensor,  # (B, H, some rows, E)
    rows: slice,
    query: Tensor,
    key: Tensor,
    scale: float,
    cap: float | None,
    window: int | None,
    samples: Samples | None = None,
) -> Tensor:  # (B, H_kv, H / H_kv, some rows, T_all) float32
    """Compute the capped scores of some queries, minus infinity where they do not see."""
    num_keys = key.shape[2]
    products = scale * (_grouped(some, key).float() @ key[:, :, None].float().mT)
    is_seen = is_seen_reference(rows, query.shape[2], num_keys, window, samples, key.device)
    if samples is not None:
        # over the heads
        is_seen = is_seen[:, None, None]
    scores = products if cap is None else softcap_reference(products, cap)
    return scores.masked_fill(~is_seen, -math.inf)
