"""Which experts each token has, the order in which they compute, and the way back.

    logits   = y W^T + b                                   W and b the router, frozen
    chosen   = the k experts with the largest logits
    weights  = softmax(logits)[chosen]                     over all experts
             = softmax(logits[chosen])                     where a token's weights sum to one

    tokens          0: experts 2, 0      1: experts 0, 1
    pairs           (0, 2) (0, 0) (1, 0) (1, 1)
    sorted rows     (0, 0) (1, 0) | (1, 1) | (0, 2)        offsets 0, 2, 3, 4

Logits and weights are in float32; transformers rounds logits to 16 bits, where two experts of a
token may then be equal. The order of one expert's rows is fixed, so two passes give the same
numbers, bit for bit. Nothing waits for the device, and shapes depend on the number of tokens alone.

    M tokens, E experts, k of them a token, R = M k pairs, D hidden_size
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The experts of each token.

    Attributes:
        shares: softmax(logits); None where a token's weights sum to one.
        places: the sorted row of each pair of a token and an expert.
        offsets: where the rows of each expert begin.
    """

    chosen: Tensor  # (M, k) int64
    weights: Tensor  # (M, k) float32
    shares: Tensor | None  # (M, E) float32
    places: Tensor  # (M, k) int64
    offsets: Tensor  # (E + 1,) int32


def choose(
    y: Tensor,  # (M, D)
    router: Tensor,  # (E, D)
    num_chosen: int,
    is_normalized: bool,
    bias: Tensor | None = None,  # (E,)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Choose the experts of each token, and weigh them: `Routing`'s chosen, weights and shares."""
    logits = y.float() @ router.float().T
    if bias is not None:
        logits += bias.float()
    largest, chosen = logits.topk(num_chosen, dim=1)
    if is_normalized:
        return chosen, largest.softmax(dim=1), None
    shares = logits.softmax(dim=1)
    return chosen, shares.gather(1, chosen), shares


def route(
    y: Tensor,  # (M, D)
    router: Tensor,  # (E, D)
    num_chosen: int,
    is_normalized: bool,
    bias: Tensor | None = None,  # (E,)
) -> Routing:
    """Choose the experts of each token, and sort the pairs by expert."""
    chosen, weights, shares = choose(y, router, num_chosen, is_normalized, bias)
    num_experts = router.shape[0]
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(max(len(order), num_experts + 1), device=y.device)
    offsets = torch.searchsorted(experts, numbers[: num_experts + 1], out_int32=True)
    places = torch.empty_like(order).scatter_(0, order, numbers[: len(order)])
    return Routing(chosen, weights, shares, places.view_as(chosen), offsets)


def route_backward(
    grad_weights: Tensor,  # (M, k) float32
    routing: Routing,
    router: Tensor,  # (E, D)
) -> Tensor:  # (M, D) float32
    """Compute y's gradient through the router from that of the weights.

        grad_logits = softmax(logits) (grad - sum_e softmax(logits)[e] grad[e])
        grad_y      = grad_logits W

    where grad is that of each share, over the experts that the softmax is over.
    """
    weighted = routing.weights * grad_weights
    mean, chosen = weighted.sum(dim=1, keepdim=True), routing.chosen
    if routing.shares is None:
        of_chosen = weighted - routing.weights * mean
        grad_logits = weighted.new_zeros(weighted.shape[0], router.shape[0])
    else:
        grad_logits = routing.shares * -mean
        # no sum at a place, which would be in any order
        of_chosen = grad_logits.gather(1, chosen) + weighted
    # in one dimension: in deterministic runs torch waits for the device to scatter in two
    first = torch.arange(len(chosen), device=chosen.device)[:, None] * router.shape[0]
    grad_logits.view(-1).scatter_(0, (chosen + first).view(-1), of_chosen.view(-1))
    return grad_logits @ router.float()
