"""The auxiliary loss of a mixture of experts: small where all experts have as many tokens.

    loss = E sum_e f[e] p[e]          f[e]  how often a token has expert e, in the mean
                                      p[e]  the share of expert e, softmax(logits)[e], in the mean

Fedus et al. 2021, "Switch Transformers", section 2.2, as load_balancing_loss_func of transformers
computes it: both means are over the tokens of all layers together, and padding is no token. A
choice has no gradient, so f has none:

    d loss / d shares[m, e] = E f[e] / N        N rows: tokens times layers with experts

f is known once the last layer has chosen. So the layers add up in the forward pass, and the
gradient joins that of each router in the backward pass. The router is frozen: the gradient goes on
to the hidden states, and the updates of the layers below learn from it.

    M tokens, E experts, k of them a token
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llama.layer_experts import Experts
from llama.routing import Routing, put_at_chosen


def balance_reference(shares: Tensor, num_chosen: int) -> Tensor:  # (N, E) -> ()
    """Compute the loss of the shares of all rows, under autograd."""
    _, chosen = shares.topk(num_chosen)
    is_chosen = torch.zeros_like(shares).scatter(1, chosen, 1.0)
    return shares.shape[1] * (is_chosen.mean(0) @ shares.mean(0))


class Balance(NamedTuple):
    """The sums of one pass, which its layers write in place.

    Attributes:
        is_token: 0 for padding.
        num_rows: tokens times layers.
        num_chosen: rows that have the expert.
        shares: summed over the rows.
        grad_shares: of each share of each row.
    """

    is_token: Tensor  # (M,) float32
    num_rows: Tensor  # () float32
    num_chosen: Tensor  # (E,) float32
    shares: Tensor  # (E,) float32
    grad_shares: Tensor  # (E,) float32

    @classmethod
    def of(cls, is_token: Tensor, experts: Experts) -> "Balance":
        """Begin a pass."""
        num_rows = is_token.sum() * sum(experts.has_experts)
        zeros = (is_token.new_zeros(experts.num_experts) for _ in range(3))
        return cls(is_token, num_rows, *zeros)

    def add(self, routing: Routing) -> None:
        """Add the tokens of a layer, in the forward pass, once each."""
        assert routing.shares is not None
        is_chosen = put_at_chosen(
            torch.zeros_like(routing.shares),
            routing.chosen,
            self.is_token[:, None].expand(routing.chosen.shape),
        )
        self.num_chosen.add_(is_chosen.sum(dim=0))
        self.shares.add_(self.is_token @ routing.shares)

    def loss(self) -> Tensor:  # () float32
        """Compute the loss, after the last layer."""
        frequencies, shares = self.num_chosen / self.num_rows, self.shares / self.num_rows
        return len(shares) * (frequencies @ shares)

    def begin_backward(self, factor: Tensor) -> None:  # () float32
        """Compute the gradient of the shares, times a factor, before the backward pass."""
        num_experts = len(self.shares)
        torch.mul(self.num_chosen, factor * num_experts / self.num_rows**2, out=self.grad_shares)

    def grad_logits(self, shares: Tensor) -> Tensor:  # (M, E) -> (M, E) float32
        """Compute the gradient of a layer's logits.

        grad_logits[m] = shares[m] (grad_shares - shares[m] . grad_shares)
        """
        means = shares @ self.grad_shares
        return self.is_token[:, None] * shares * (self.grad_shares - means[:, None])
