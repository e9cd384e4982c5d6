"""Cross-entropy of the head's logits without ever holding them all.

The logits of 8,192 tokens over a vocabulary of 128,256 take 4 GiB in float32, and their gradient as
much again. The head is frozen, so the gradient with respect to the hidden states is all that is
needed, and it can be formed chunk by chunk while the logits are at hand: one product for the
logits, one for the gradient, nothing recomputed in the backward pass. Rows without a label never
reach the head.
"""

from typing import Any

import torch
from torch import Tensor

# float32 logits held at once
LOGITS_BYTES = 512 << 20


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of the logits of a frozen head W.

        z      = h W^T                             one chunk of rows at a time
        loss   = sum_i logsumexp(z_i) - z_i[target_i]
        grad_h = grad_loss (softmax(z) - onehot(target)) W

    All of grad_h but its factor is formed in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (M, D), only rows that have a target
        head: Tensor,  # (V, D), hidden's dtype
        targets: Tensor,  # (M,) int64
    ) -> Tensor:  # () float32
        chunk = max(1, LOGITS_BYTES // (4 * head.shape[0]))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ head.T).float()
            picked = targets[rows, None]
            log_normalizer = logits.logsumexp(dim=1, keepdim=True)
            loss += (log_normalizer - logits.gather(1, picked)).sum()
            if grad_hidden is not None:
                probabilities = logits.sub_(log_normalizer).exp_()
                probabilities.scatter_add_(1, picked, torch.full_like(log_normalizer, -1.0))
                grad_hidden[rows] = probabilities.to(hidden.dtype) @ head
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        # the incoming factor is loss scale / target tokens: applied in float32, a float16 one could
        # underflow
        return (grad_hidden.float() * grad_outputs[0]).to(grad_hidden.dtype), None, None


def linear_cross_entropy(
    hidden: Tensor,  # (M, D), only rows that have a target
    head: Tensor,  # (V, D)
    targets: Tensor,  # (M,) int64
) -> Tensor:  # () float32, summed over the rows
    """Sum the cross-entropy of softmax(hidden head^T) at the targets.

    The products are in hidden's dtype, everything after them in float32.
    """
    return _LinearCrossEntropy.apply(hidden, head.to(hidden.dtype), targets)
