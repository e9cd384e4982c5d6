"""The halves of a layer, attention and MLP: the linear groups of each, and the norms of its heads.

Each half is named as the checkpoint names it. `llama/layer.py` runs both, forward and backward; it
runs `llama/experts.py` as it runs the MLP.
"""

import torch
from torch import Tensor, nn

from kernels.glu import Activation, glu, glu_backward
from kernels.glu_fp8 import glu_fp8
from llama.config import LlamaConfig
from llama.norm import RMSNorm
from lora.linear_group import LinearGroup
from lora.rows import Rows


class Gated:
    """What an MLP's backward pass needs; the forward pass sets each as soon as it is computed."""

    gate_up_ext: Tensor  # (M, 2 F + tail)
    h_gate_up: Tensor  # (M, tail)
    h_down: Tensor  # (M, tail)


class Attention(nn.Module):
    """The projections around causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, head_dim = config.hidden_size, config.head_dim
        self.counts = (config.num_attention_heads, *2 * (config.num_key_value_heads,))
        self.head_dim = head_dim
        rows = tuple(count * head_dim for count in self.counts)
        names = ("q_proj", "k_proj", "v_proj")
        if config.is_fused:
            names, rows = ("qkv_proj",), (sum(rows),)
        self.qkv = LinearGroup(names, rows, D, config.qkv_bias)
        self.o = LinearGroup(("o_proj",), (D,), self.counts[0] * head_dim, config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(width, config) for width in config.qk_norm_widths)
        self.head_norms = (self.q_norm, self.k_norm) if config.qk_norm else ()
        self.has_joint_norm = config.has_joint_qk_norm
        sinks = torch.empty(self.counts[0]) if config.has_sinks else None
        # of each head, a score beside those of the tokens, which has no value
        self.sinks = None if sinks is None else nn.Parameter(sinks, requires_grad=False)

    def normalize_heads(self, qkv: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Normalize queries and keys in place, head by head or together, in families that do.

        Returns:
            What they were before, and rstd.
        """
        kept = []
        parts = self._heads(qkv) if self.head_norms else ()
        for norm, part in zip(self.head_norms, parts, strict=False):
            heads = own(part).view(-1, norm.weight.shape[0])
            y, _, rstd = norm(heads)
            part.copy_(y.view(part.shape))
            kept.append((heads, rstd))
        return kept

    def normalize_heads_backward(self, grad_qkv: Tensor, kept: list[tuple[Tensor, Tensor]]) -> None:
        """Turn the gradients of normalized queries and keys into theirs, in place."""
        parts = self._heads(grad_qkv) if self.head_norms else ()
        for norm, part, (heads, rstd) in zip(self.head_norms, parts, kept, strict=False):
            grad = own(part).view(heads.shape)
            norm.backward(grad, None, heads, rstd, out=grad)
            part.copy_(grad.view(part.shape))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """View the heads of queries, keys and values, each (B, T, heads, head_dim)."""
        return qkv.unflatten(-1, (sum(self.counts), -1)).split(self.counts, dim=2)


class MLP(nn.Module):
    """The projections of a gated linear unit (Shazeer 2020): down(activation(gate(x)) up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        names, rows = ("gate_proj", "up_proj"), (width, width)
        if config.is_mlp_fused:
            names, rows = ("gate_up_proj",), (2 * width,)
        self.gate_up = LinearGroup(names, rows, D, config.mlp_bias)
        self.down = LinearGroup(("down_proj",), (D,), width, config.mlp_bias)
        self.activation: Activation = config.activation

    @property
    def tail(self) -> int:
        """Columns behind the gradient of the output, for that of h."""
        return self.down.tail

    def empty_input(self, num_rows: int, like: Tensor) -> Rows:  # (num_rows, D + tail)
        """Allocate buffers for the input."""
        return self.gate_up.empty_input(num_rows, like)

    def project_in(self, y: Rows, seed: Tensor | None, kept: Gated) -> None:
        """Compute gate | up."""
        gate_up = self.gate_up
        kept.gate_up_ext = gate_up.empty_output(y.ext.shape[0], y.ext)
        gate_up.forward(y, seed, out=kept.gate_up_ext[:, : gate_up.num_rows])
        kept.h_gate_up = own(y.ext[:, gate_up.in_features :])

    def inner(self, kept: Gated) -> Rows:  # (M, F + tail)
        """Compute activation(gate) up."""
        down, gates_and_ups = self.down, kept.gate_up_ext[:, : self.gate_up.num_rows]
        inner = down.empty_input(gates_and_ups.shape[0], gates_and_ups)
        h = inner.ext[:, : down.in_features]
        if inner.fp8 is None:
            glu(gates_and_ups, self.activation, out=h)
        else:
            glu_fp8(gates_and_ups, self.activation, h, inner.fp8)
        return inner

    def project_out(self, inner: Rows, seed: Tensor | None, kept: Gated) -> Tensor:  # (M, D)
        """Compute the output of what `inner` returns."""
        output = self.down.forward(inner, seed)
        kept.h_down = own(inner.ext[:, self.down.in_features :])
        return output

    def inner_backward(self, grad_out: Tensor, seed: Tensor | None, kept: Gated) -> None:
        """Turn gate | up into their gradient.

        Args:
            grad_out: (M, D + tail), of the output.
        """
        down = self.down
        grad_inner = down.backward(grad_out, kept.h_down, seed)
        assert grad_inner is not None
        # gate | up give way to their gradient, and grad_inner to activation(gate) up
        gates_and_ups = kept.gate_up_ext[:, : self.gate_up.num_rows]
        _, inner = glu_backward(grad_inner, gates_and_ups, self.activation)
        down.accumulate_grad_A(grad_out, inner, seed)
        del kept.h_down

    def project_in_backward(self, seed: Tensor | None, kept: Gated) -> Tensor:  # (M, D)
        """Compute the gradient of the input."""
        grad_y = self.gate_up.backward(kept.gate_up_ext, kept.h_gate_up, seed)
        assert grad_y is not None
        return grad_y

    def accumulate_grad_A(self, y: Tensor, seed: Tensor | None, kept: Gated) -> None:
        """Add up the gradients that need the input, y (M, D)."""
        self.gate_up.accumulate_grad_A(kept.gate_up_ext, y, seed)
        del kept.h_gate_up, kept.gate_up_ext


def own(part: Tensor) -> Tensor:
    """Copy a part of a buffer out, so that the rest can go or the part be written to."""
    return part.clone(memory_format=torch.contiguous_format)
