"""A mixture of experts as a pass over one token a sequence computes it.

Few tokens have few experts, so the weights of those alone are read: the device picks each token's
experts from the packed weight and expands them, and the host does not wait to know which. Where
tokens could have more experts together than there are, all are expanded, as for a prompt.

    B sequences, k experts a token, P = B k pairs of a token and an expert, D hidden_size
"""

import torch
from torch import Tensor

from kernels.expert_rows import combine_expert_rows
from kernels.glu import glu
from kernels.nf4_decode import make_nf4_tables
from llama.experts import ExpertMLP, Routed
from llama.routing import choose
from lora.expert_group import ExpertGroup
from lora.rows import Rows
from nf4.weight import NF4Weight, pick_parts


class TokenExperts:
    """A layer's experts, with what their passes over single tokens need."""

    # h of an update of experts is of their rows, not of the tokens
    A = None

    def __init__(self, mlp: ExpertMLP, dtype: torch.dtype, num_sequences: int) -> None:
        self._mlp = mlp
        num_chosen, _ = mlp.choice
        num_pairs = num_sequences * num_chosen
        device = mlp.gate.weight.device
        self._places = torch.arange(num_pairs, device=device).view(-1, num_chosen)
        self._picks = num_pairs <= mlp.gate.out_features
        if self._picks and device.type != "cpu":
            for group in (mlp.gate_up, mlp.down):
                if isinstance(group.weight, NF4Weight):
                    # before the first pass: kernels/constants.py says why
                    some = pick_parts(group.weight, group.num_experts, self._places.flatten())
                    make_nf4_tables(some)

    def __call__(self, y: Tensor, h: Tensor | None) -> Tensor:  # (B, D)
        """Compute the weighted sum of the outputs of each token's experts."""
        mlp = self._mlp
        if not self._picks:
            kept = Routed()
            mlp.project_in(Rows(y), None, kept)
            return mlp.project_out(mlp.inner(kept), None, kept)
        chosen, weights, _ = choose(y, mlp.gate.weight, *mlp.choice, mlp.gate.bias)
        experts, rows = chosen.flatten(), y.repeat_interleave(chosen.shape[1], dim=0)
        inner = glu(_products(rows, mlp.gate_up, experts), mlp.activation)
        rows = _products(inner, mlp.down, experts)
        return combine_expert_rows(rows, self._places, weights)


def _products(x: Tensor, group: ExpertGroup, experts: Tensor) -> Tensor:  # (P, K) -> (P, N)
    """Multiply each row by the matrices of its own expert, its bias and its update added."""
    W, columns = group.pick(experts, x.dtype), x[:, :, None]
    if group.biases is None:
        y = torch.bmm(W, columns)[:, :, 0]
    else:
        biases = group.biases[experts].to(x.dtype)
        y = torch.baddbmm(biases[:, :, None], W, columns)[:, :, 0]
    return y if group.update is None else y + group.update.pick(x, experts)
