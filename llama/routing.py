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
        shares: softmax(logits); None where nothing needs them.
        is_normalized: whether a token's weights sum to one.
        places: the sorted row of each pair of a token and an expert.
        offsets: where the rows of each expert begin.
    """

    chosen: Tensor  # (M, k) int64
    weights: Tensor  # (M, k) float32
    shares: Tensor | None  # (M, E) float32
    places: Tensor  # (M, k) int64
    offsets: Tensor  # (E + 1,) int32
    is_normalized: bool

    def weights_of_rows(self) -> Tensor:  # (R,) float32
        """The weights in the order of the sorted rows."""
        weights = self.weights.flatten()
        return torch.empty_like(weights).scatter_(0, self.places.flatten(), weights)


def choose(
    y: Tensor,  # (M, D)
    router: Tensor,  # (E, D)
    num_chosen: int,
    is_normalized: bool,
    bias: Tensor | None = None,  # (E,)
    needs_shares: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Choose the experts of each token, and weigh them: `Routing`'s chosen, weights and shares.

    Args:
        needs_shares: compute all shares, also where the weights do not.
    """
    logits = y.float() @ router.float().T
    if bias is not None:
        logits += bias.float()
    largest, chosen = logits.topk(num_chosen, dim=1)
    shares = logits.softmax(dim=1) if needs_shares or not is_normalized else None
    if is_normalized:
        return chosen, largest.softmax(dim=1), shares
    assert shares is not None
    return chosen, shares.gather(1, chosen), shares


def route(
    y: Tensor,  # (M, D)
    router: Tensor,  # (E, D)
    num_chosen: int,
    is_normalized: bool,
    bias: Tensor | None = None,  # (E,)
    needs_shares: bool = False,
) -> Routing:
    """Choose the experts of each token, and sort the pairs by expert; takes what `choose` does."""
    chosen, weights, shares = choose(y, router, num_chosen, is_normalized, bias, needs_shares)
    num_experts = router.shape[0]
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(max(len(order), num_experts + 1), device=y.device)
    offsets = torch.searchsorted(experts, numbers[: num_experts + 1], out_int32=True)
    places = torch.empty_like(order).scatter_(0, order, numbers[: len(order)])
    return Routing(chosen, weights, shares, places.view_as(chosen), offsets, is_normalized)


def put_at_chosen(
    matrix: Tensor,  # (M, E), written
    chosen: Tensor,  # (M, k)
    values: Tensor,  # (M, k)
) -> Tensor:
    """Write values to the places of the experts that tokens have."""
    # in one dimension: in deterministic runs torch waits for the device to scatter in two
    first = torch.arange(len(chosen), device=chosen.device)[:, None] * matrix.shape[1]
    matrix.view(-1).scatter_(0, (chosen + first).view(-1), values.reshape(-1))
    return matrix


def route_backward(
    grad_weights: Tensor,  # (M, k) float32
    routing: Routing,
    router: Tensor,  # (E, D)
    grad_logits: Tensor | None = None,  # (M, E) float32
) -> Tensor:  # (M, D) float32
    """Compute y's gradient through the router from that of the weights.

        grad_logits += softmax(logits) (grad - sum_e softmax(logits)[e] grad[e])
        grad_y       = grad_logits W

    where grad is that of each share, over the experts that the softmax is over.

    Args:
        grad_logits: of another loss; None: there is none.
    """
    weighted = routing.weights * grad_weights
    mean, chosen = weighted.sum(dim=1, keepdim=True), routing.chosen
    if routing.is_normalized:
        of_chosen = weighted - routing.weights * mean
        grad = weighted.new_zeros(weighted.shape[0], router.shape[0])
    else:
        assert routing.shares is not None
        grad = routing.shares * -mean
        # no sum at a place, which would be in any order
        of_chosen = grad.gather(1, chosen) + weighted
    put_at_chosen(grad, chosen, of_chosen)
    if grad_logits is not None:
        grad += grad_logits
    return grad @ router.float()
