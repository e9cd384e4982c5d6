"""One layer of the decoder, forward and backward, written out.

    r1 = x + delta                        the layer before left its last addition to this norm
    q | k | v = qkv(norm(r1)), rotated
    r2 = r1 + o(attention(q, k, v))
    gate | up = gate_up(norm(r2))
    x, delta = r2, down(activation(gate) up)

Autograd would save each operation's inputs and add up gradients in tensors of their own. Written
out, the backward pass keeps r1, r2, their rstd, q | k | v, what attention mixed, gate | up and the
few columns of each low-rank update: 4.5 D + 2 F numbers a token of hidden size D and intermediate
size F where keys and values are a quarter of the queries. Everything else is computed again on the
way by kernels that read its sources anyway, or overwritten by its gradient. One buffer holds the
gradient of the residual stream from the last layer to the first.

    M = B T rows, D hidden_size, F intermediate_size
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.glu import Activation, glu, glu_backward
from kernels.rms_norm import rms_norm, rms_norm_backward
from kernels.rope import rope, rope_backward
from llama.attention import Mixed, attention, attention_backward
from llama.config import LlamaConfig
from lora.linear_group import LinearGroup


class Shared(NamedTuple):
    """What all layers of one pass share."""

    positions: Tensor  # (B, T), rows of the tables
    cos: Tensor  # (T_max, head_dim / 2) float32
    sin: Tensor
    dropout_seed: Tensor | None = None  # (1,) int64, needed where a group drops


class NormedHeads(NamedTuple):
    """Heads before they were normalized, one a row, and what that divided them by."""

    heads: Tensor  # (M H, head_dim)
    rstd: Tensor  # (M H,) float32


class Attended(NamedTuple):
    """The first half of a layer: what its backward pass needs, and its result.

    Of a group's input only h is kept, what its low-rank updates make of it.
    """

    r1: Tensor  # (M, D)
    rstd1: Tensor  # (M,) float32
    h_qkv: Tensor  # (M, T of the group)
    # of queries and keys, where they are normalized
    head_norms: tuple[NormedHeads, ...]
    mixed: Mixed
    h_o: Tensor  # (M, T of the group)
    delta: Tensor  # (M, D)


class Gated(NamedTuple):
    """The second half up to the gates."""

    r2: Tensor  # (M, D)
    rstd2: Tensor  # (M,) float32
    h_gate_up: Tensor  # (M, T of the group)
    gate_up_ext: Tensor  # (M, 2 F + T of the group)


class Activations:
    """What a layer's backward pass needs of its forward pass."""

    def __init__(self, attended: Attended, gated: Gated, h_down: Tensor) -> None:
        self.r1, self.rstd1, self.h_qkv, self.head_norms, self.mixed, self.h_o, _ = attended
        self.h_down = h_down  # (M, T of the group)
        self._gated = [gated]

    def pop_gated(self) -> Gated:
        """Hand over the second half, which goes once its backward pass has used it."""
        return self._gated.pop()


class LayerInput(NamedTuple):
    """What a layer's activations are computed again from."""

    r1: Tensor  # (M, D)
    h_down: Tensor  # (M, T of the group)


class KeyValueCache:
    """Keys and values of the tokens seen so far, one (B, H_kv, T, head_dim) pair per layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def num_tokens(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values and return all of the layer's."""
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            old_key, old_value = self.layers[layer]
            self.layers[layer] = (
                torch.cat((old_key, key), dim=2),
                torch.cat((old_value, value), dim=2),
            )
        return self.layers[layer]


class RMSNorm(nn.Module):
    """The weight of a root mean square normalization (Zhang and Sennrich 2019).

        y = weight * r / sqrt(mean(r^2) + eps)

    In float32, rounded once. transformers rounds r / sqrt(...) first, so in 16 bits it differs by
    up to one rounding.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps


class Attention(nn.Module):
    """The projections around causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        q_rows = config.num_attention_heads * config.head_dim
        kv_rows = config.num_key_value_heads * config.head_dim
        names, rows = ("q_proj", "k_proj", "v_proj"), (q_rows, kv_rows, kv_rows)
        if config.is_fused:
            names, rows = ("qkv_proj",), (sum(rows),)
        self.qkv = LinearGroup(names, rows, config.hidden_size, config.qkv_bias)
        self.o = LinearGroup(("o_proj",), (config.hidden_size,), q_rows, config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    @property
    def head_norms(self) -> tuple[RMSNorm, ...]:
        """Of queries and keys, where there are any."""
        return (self.q_norm, self.k_norm) if hasattr(self, "q_norm") else ()


class MLP(nn.Module):
    """The projections of a gated linear unit (Shazeer 2020): down(activation(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        names, rows = ("gate_proj", "up_proj"), (width, width)
        if config.is_fused:
            names, rows = ("gate_up_proj",), (2 * width,)
        self.gate_up = LinearGroup(names, rows, config.hidden_size, config.mlp_bias)
        self.down = LinearGroup(("down_proj",), (config.hidden_size,), width, config.mlp_bias)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.window = config.windows[index]
        self.activation: Activation = config.activation
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,  # (M, D)
        delta: Tensor | None,  # (M, D), still to be added to x
        shared: Shared,
        cache: KeyValueCache | None = None,
        has_backward: bool = False,
    ) -> tuple[Tensor, Tensor, Activations | LayerInput]:  # x, delta (M, D) and what is kept
        """Run the layer; with a cache its keys and values go before the new tokens' own.

        Args:
            has_backward: keep what `backward` takes instead of what `recompute` takes.
        """
        down = self.mlp.down
        attended = self._attend(x, delta, shared, cache, has_backward)
        gated = self._gate(attended, shared)
        r1, r2 = attended.r1, gated.r2
        kept = (attended, gated) if has_backward else None
        # what is not kept makes room
        del attended
        inner_ext = down.empty_input(r1.shape[0], r1)
        gates_and_ups = gated.gate_up_ext[:, : self.mlp.gate_up.num_rows]
        glu(gates_and_ups, self.activation, out=inner_ext[:, : down.in_features])
        del gated, gates_and_ups
        delta_out = down.forward(inner_ext, shared.dropout_seed)
        h_down = _own(inner_ext[:, down.in_features :])
        if kept is None:
            return r2, delta_out, LayerInput(r1, h_down)
        return r2, delta_out, Activations(*kept, h_down)

    def recompute(self, kept: LayerInput, shared: Shared) -> Activations:
        """Compute the activations of an earlier `forward` again, bit for bit.

        The last projection is left out: of its input the backward pass needs no more than h, which
        is a few columns, and its output it does not need.
        """
        attended = self._attend(kept.r1, None, shared, None, has_backward=True)
        return Activations(attended, self._gate(attended, shared), kept.h_down)

    def _attend(
        self,
        x: Tensor,
        delta: Tensor | None,
        shared: Shared,
        cache: KeyValueCache | None,
        has_backward: bool,
    ) -> Attended:
        qkv, o, norm = self.self_attn.qkv, self.self_attn.o, self.input_layernorm
        M, D = x.shape
        y_ext = qkv.empty_input(M, x)
        _, r1, rstd1 = rms_norm(x, norm.weight, norm.eps, delta, out=y_ext[:, :D])
        buffer = qkv.forward(y_ext, shared.dropout_seed).unflatten(0, tuple(shared.positions.shape))
        head_norms = self._normalize_heads(buffer)
        # the rotation overwrites what it is given, which nothing else holds
        tables = (shared.positions, shared.cos, shared.sin)
        query, key, value = rope(buffer, *tables, self.num_heads, self.num_kv_heads)
        if cache is not None:
            key, value = cache.extend(self.index, key, value)
        mixed = attention(query, key, value, self.window, has_backward)
        mixed_ext = o.extended(_rows_of(mixed.output))
        delta = o.forward(mixed_ext, shared.dropout_seed)
        h_o = _own(mixed_ext[:, o.in_features :])
        return Attended(r1, rstd1, _own(y_ext[:, D:]), head_norms, mixed, h_o, delta)

    def _normalize_heads(self, qkv: Tensor) -> tuple[NormedHeads, ...]:
        """Normalize queries and keys in place, where the family does, head by head."""
        kept = []
        for norm, part in zip(self.self_attn.head_norms, self._heads(qkv), strict=False):
            heads = _own(part).view(-1, norm.weight.shape[0])
            y, _, rstd = rms_norm(heads, norm.weight, norm.eps)
            part.copy_(y.view(part.shape))
            kept.append(NormedHeads(heads, rstd))
        return tuple(kept)

    def _normalize_heads_backward(self, grad_qkv: Tensor, kept: tuple[NormedHeads, ...]) -> None:
        """Turn the gradients of normalized queries and keys into theirs, in place."""
        norms = self.self_attn.head_norms
        for norm, part, normed in zip(norms, self._heads(grad_qkv), kept, strict=False):
            grad = _own(part).view(normed.heads.shape)
            rms_norm_backward(grad, None, *normed, norm.weight, out=grad)
            part.copy_(grad.view(part.shape))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """View the heads of queries, keys and values, each (B, T, heads, head_dim)."""
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = qkv.unflatten(-1, (sum(counts), -1)).split(counts, dim=2)
        return query, key, value

    def _gate(self, attended: Attended, shared: Shared) -> Gated:
        gate_up, norm = self.mlp.gate_up, self.post_attention_layernorm
        M, D = attended.r1.shape
        y_ext = gate_up.empty_input(M, attended.r1)
        _, r2, rstd2 = rms_norm(
            attended.delta, norm.weight, norm.eps, attended.r1, out=y_ext[:, :D]
        )
        gate_up_ext = gate_up.empty_output(M, attended.r1)
        gate_up.forward(y_ext, shared.dropout_seed, out=gate_up_ext[:, : gate_up.num_rows])
        return Gated(r2, rstd2, _own(y_ext[:, D:]), gate_up_ext)

    @property
    def grad_tail(self) -> int:
        """Columns that the gradient of the residual stream has behind its own."""
        return max(self.self_attn.o.tail, self.mlp.down.tail)

    def backward(
        self,
        grad_ext: Tensor,  # (M, D + at least grad_tail), the gradient of x and of delta
        kept: Activations,
        shared: Shared,
        needs_grad_x: bool = True,
    ) -> None:
        """Turn the gradient of the layer's result into that of its input, in place.

            grad_r2  = grad + norm'(gate_up'(activation'(down'(grad))))
            grad_r1  = grad_r2 + norm'(qkv'(rotation'(attention'(o'(grad_r2)))))

        Adds the gradients of the low-rank updates to those of the parameters.

        Args:
            kept: of the same pass, and used up.
            needs_grad_x: False for the first layer, whose input is frozen.
        """
        qkv, o = self.self_attn.qkv, self.self_attn.o
        gate_up, down = self.mlp.gate_up, self.mlp.down
        seed = shared.dropout_seed
        M, D = kept.r1.shape
        B, T = shared.positions.shape
        grad = grad_ext[:, :D]

        r2, rstd2, h_gate_up, gate_up_ext = kept.pop_gated()
        grad_out = grad_ext[:, : D + down.tail]
        grad_inner = down.backward(grad_out, kept.h_down, seed)
        assert grad_inner is not None
        # gates and ups give way to their gradients, and their gradient to what they gave
        _, inner = glu_backward(grad_inner, gate_up_ext[:, : gate_up.num_rows], self.activation)
        down.accumulate_grad_A(grad_out, inner, seed)
        del grad_inner, inner
        grad_y = gate_up.backward(gate_up_ext, h_gate_up, seed)
        assert grad_y is not None
        norm = self.post_attention_layernorm
        rms_norm_backward(grad_y, grad, r2, rstd2, norm.weight, out=grad, y=grad_y)
        gate_up.accumulate_grad_A(gate_up_ext, grad_y, seed)
        del grad_y, r2, rstd2, h_gate_up, gate_up_ext

        grad_out = grad_ext[:, : D + o.tail]
        grad_mixed = o.backward(grad_out, kept.h_o, seed)
        assert grad_mixed is not None
        o.accumulate_grad_A(grad_out, _rows_of(kept.mixed.output), seed)
        grad_heads = grad_mixed.view(B, T, self.num_heads, -1).transpose(1, 2)
        grads = attention_backward(kept.mixed, grad_heads)
        del grad_mixed, grad_heads
        grad_qkv_ext = qkv.empty_output(M, grad)
        grad_qkv = grad_qkv_ext[:, : qkv.num_rows].unflatten(0, (B, T))
        rope_backward(*grads, shared.positions, shared.cos, shared.sin, out=grad_qkv)
        del grads
        self._normalize_heads_backward(grad_qkv, kept.head_norms)
        grad_y = qkv.backward(grad_qkv_ext, kept.h_qkv, seed, needs_grad_x)
        norm = self.input_layernorm
        if grad_y is None:
            y, _, _ = rms_norm(kept.r1, norm.weight, norm.eps)
        else:
            y = grad_y
            rms_norm_backward(grad_y, grad, kept.r1, kept.rstd1, norm.weight, out=grad, y=y)
        qkv.accumulate_grad_A(grad_qkv_ext, y, seed)


def _own(part: Tensor) -> Tensor:
    """Copy a part of a buffer out, so that the rest can go or the part be written to."""
    return part.clone(memory_format=torch.contiguous_format)


def _rows_of(heads: Tensor) -> Tensor:
    """View (B, H, T, head_dim) as (B T, H head_dim) rows, copying if the heads lie otherwise."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)
