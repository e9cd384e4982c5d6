"""The halves of a layer, attention and MLP: the linear groups of each, and the norms of its heads.

Each half is named as the checkpoint names it. `llama/layer.py` runs both, forward and backward; it
runs `llama/experts.py` as it runs the MLP.
"""

import torch
from torch import Tensor, nn

from kernels.glu import Activation, glu, glu_backward
from kernels.glu_8bit import glu_8bit
from llama.config import LlamaConfig
from llama.norm import RMSNorm
from lora.linear_group import LinearGroup, new_rows
from lora.rows import Rows


class Gated:
    """What an MLP's backward pass needs; the forward pass sets each as soon as it is computed."""

    gate_up_ext: Tensor  # (M, 2 F + tail)
    h_gate_up: Tensor  # (M, tail)
    h_down: Tensor  # (M, tail)


class Attention(nn.Module):
    """The projections around causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        D, heads = config.hidden_size, config.heads(index)
        self.counts = (config.num_attention_heads, *2 * (heads.num_key_value_heads,))
        self.head_dim = head_dim = heads.head_dim
        assert heads.has_values or config.has_value_norm
        # numbers of a token that are its projected keys and its values at once
        self.num_shared = 0 if heads.has_values else heads.num_key_value_heads * head_dim
        rows = tuple(count * head_dim for count in self.counts[: 2 + heads.has_values])
        names = ("q_proj", "k_proj", "v_proj")[: len(rows)]
        if config.is_fused:
            names, rows = ("qkv_proj",), (sum(rows),)
        self.qkv = LinearGroup(names, rows, D, config.qkv_bias)
        self.o = LinearGroup(("o_proj",), (D,), self.counts[0] * head_dim, config.o_bias)
        # of queries, keys and values, as far as a family has them
        self.head_norms: tuple[RMSNorm, ...] = ()
        if config.qk_norm:
            widths = config.qk_norm_widths(index)
            self.q_norm, self.k_norm = (RMSNorm(width, config) for width in widths)
            self.head_norms = (self.q_norm, self.k_norm)
        if config.has_value_norm:
            self.v_norm = RMSNorm(head_dim, config, has_weight=False)
            self.head_norms += (self.v_norm,)
        self.has_joint_norm = config.has_joint_qk_norm
        sinks = torch.empty(self.counts[0]) if config.has_sinks else None
        # of each head, a score beside those of the tokens, which has no value
        self.sinks = None if sinks is None else nn.Parameter(sinks, requires_grad=False)

    @property
    def width(self) -> int:
        """Numbers of all heads of a token."""
        return sum(self.counts) * self.head_dim

    def project(self, y: Rows, seed: Tensor | None) -> Tensor:  # (M, width)
        """Compute the heads of queries, keys and values; of values that are keys, their norm writes
        them."""
        if not self.num_shared:
            return self.qkv.forward(y, seed)
        heads = new_rows(y.ext, y.ext.shape[0], self.width)
        self.qkv.forward(y, seed, out=heads[:, : self.qkv.num_rows])
        return heads

    def empty_gradient(self, num_rows: int, like: Tensor) -> Tensor:  # (num_rows, N + tail)
        """Allocate a buffer for the heads' gradient, and for the projections' with its tail."""
        N, tail = self.qkv.num_rows, self.qkv.tail
        return new_rows(like, num_rows, max(self.width, N + tail))

    def project_gradient(self, grad_ext: Tensor) -> Tensor:  # (M, N + tail)
        """Turn the gradient of the heads into that of the projections, in place."""
        N, tail = self.qkv.num_rows, self.qkv.tail
        if self.num_shared:
            grad_ext[:, N - self.num_shared : N] += grad_ext[:, N : self.width]
        return grad_ext[:, : N + tail]

    def normalize_heads(self, qkv: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Normalize queries, keys and values in place, head by head or together, in families that
        do.

        Returns:
            What they were before, and rstd.
        """
        kept = []
        parts = self._heads(qkv) if self.head_norms else ()
        for norm, part in zip(self.head_norms, parts, strict=False):
            # keys that are values are kept once
            is_kept = self.num_shared and len(kept) == 2
            heads = kept[1][0] if is_kept else own(part).view(-1, norm.weight.shape[0])
            y, _, rstd = norm(heads)
            part.copy_(y.view(part.shape))
            kept.append((heads, rstd))
        return kept

    def normalize_heads_backward(self, grad_qkv: Tensor, kept: list[tuple[Tensor, Tensor]]) -> None:
        """Turn the gradients of normalized queries, keys and values into theirs, in place."""
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
        if inner.in_8_bits is None:
            glu(gates_and_ups, self.activation, out=h)
        else:
            glu_8bit(gates_and_ups, self.activation, h, inner.in_8_bits)
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
