"""One layer of the decoder, forward and backward, written out.

    r1 = x + delta                        the layer before left its last addition to this norm
    q | k | v = qkv(norm(r1)), rotated
    r2 = r1 + o(attention(q, k, v))
    gate | up = gate_up(norm(r2))
    x, delta = r2, down(activation(gate) up)

Where a family normalizes what a half adds, it is norm(o(...)) and norm(down(...)) that are added.

Autograd would save each operation's inputs and add up gradients in tensors of their own. Written
out, the backward pass keeps r1, r2, their rstd, q | k | v, what attention mixed, gate | up and the
few columns of each low-rank update: 4.5 D + 2 F numbers a token of hidden size D and intermediate
size F where keys and values are a quarter of the queries, and 2 D more where what the halves add is
normalized. Everything else is computed again on the
way by kernels that read its sources anyway, or overwritten by its gradient. One buffer holds the
gradient of the residual stream from the last layer to the first.

    M = B T rows, D hidden_size, F intermediate_size
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.glu import Activation, glu, glu_backward
from kernels.masked_attention_mask import Samples
from kernels.rms_norm import rms_norm
from kernels.rms_norm_backward import rms_norm_backward
from kernels.rope import rope
from kernels.rope_backward import rope_backward
from llama.attention import Mixed, Scores, attention, attention_backward
from llama.config import LlamaConfig
from lora.linear_group import LinearGroup


class Shared(NamedTuple):
    """What all layers of one pass share."""

    positions: Tensor  # (B, T), rows of the tables
    cos: Tensor  # (T_max, head_dim / 2) float32
    sin: Tensor
    dropout_seed: Tensor | None = None  # (1,) int64, needed where a group drops
    samples: Samples | None = None  # where rows hold several


class Normed(NamedTuple):
    """Rows before they were normalized, and what that multiplied them by."""

    rows: Tensor
    rstd: Tensor  # float32


class Attended(NamedTuple):
    """The first half of a layer: what its backward pass needs.

    Of a group's input only h is kept, what its low-rank updates make of it.
    """

    r1: Tensor  # (M, D)
    rstd1: Tensor  # (M,) float32
    h_qkv: Tensor  # (M, T of the group)
    # of queries and keys, (M H, head_dim) each, where they are normalized
    head_norms: tuple[Normed, ...]
    mixed: Mixed
    h_o: Tensor  # (M, T of the group)
    behind: Normed | None  # what o gave, (M, D), where that is normalized


class Gated(NamedTuple):
    """The second half up to the gates."""

    r2: Tensor  # (M, D)
    rstd2: Tensor  # (M,) float32
    h_gate_up: Tensor  # (M, T of the group)
    gate_up_ext: Tensor  # (M, 2 F + T of the group)


class Projected(NamedTuple):
    """The end of the second half."""

    h_down: Tensor  # (M, T of the group)
    behind: Normed | None  # what down gave, (M, D), where that is normalized


class Activations:
    """What a layer's backward pass needs of its forward pass."""

    def __init__(self, attended: Attended, gated: Gated, projected: Projected) -> None:
        self.attended = attended
        self._second = [(gated, projected)]

    def pop_second(self) -> tuple[Gated, Projected]:
        """Hand over the second half, which goes once its backward pass has used it."""
        return self._second.pop()


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
            # views of a buffer that holds the queries too
            self.layers.append((_own(key), _own(value)))
        else:
            old_key, old_value = self.layers[layer]
            self.layers[layer] = (
                torch.cat((old_key, key), dim=2),
                torch.cat((old_value, value), dim=2),
            )
        return self.layers[layer]


class RMSNorm(nn.Module):
    """A root mean square normalization (Zhang and Sennrich 2019) and its weight.

        y = (weight + offset) * r / sqrt(mean(r^2) + eps)

    In float32, rounded once. transformers rounds r / sqrt(...) first, so in 16 bits it differs by
    up to one rounding.
    """

    def __init__(self, width: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps
        self.offset = offset

    def forward(
        self,
        x: Tensor,  # (M, D)
        residual: Tensor | None = None,  # (M, D)
        out: Tensor | None = None,  # (M, D)
    ) -> tuple[Tensor, Tensor, Tensor]:  # y, r (M, D), rstd (M,) float32
        """Normalize as `kernels.rms_norm.rms_norm` does."""
        return rms_norm(x, self.weight, self.eps, residual, out, self.offset)

    def backward(
        self,
        grad_y: Tensor,  # (M, D)
        grad_r: Tensor | None,  # (M, D)
        r: Tensor,  # (M, D)
        rstd: Tensor,  # (M,) float32
        out: Tensor | None = None,  # (M, D)
        y: Tensor | None = None,  # (M, D)
    ) -> Tensor:  # (M, D)
        """Compute r's gradient as `kernels.rms_norm.rms_norm_backward` does."""
        return rms_norm_backward(grad_y, grad_r, r, rstd, self.weight, out, y, self.offset)


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
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, config.norm_offset)

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
        self.scores = Scores(
            1 / math.sqrt(config.query_pre_attn_scalar),
            config.attn_logit_softcapping,
            config.windows[index],
        )
        self.activation: Activation = config.activation
        self.norms = config.norms
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        for name in self.norms:
            if name is not None:
                norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)
                self.add_module(name, norm)

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
        attended, delta = self._attend(x, delta, shared, cache, has_backward)
        r1 = attended.r1
        gated = self._gate(r1, delta, shared)
        r2 = gated.r2
        kept = (attended, gated) if has_backward else None
        # what is not kept makes room
        del attended, delta
        inner_ext = self._inner(gated)
        del gated
        projected, delta = self._project(inner_ext, shared)
        if kept is None:
            return r2, delta, LayerInput(r1, projected.h_down)
        return r2, delta, Activations(*kept, projected)

    def recompute(self, kept: LayerInput, shared: Shared) -> Activations:
        """Compute the activations of an earlier `forward` again, bit for bit.

        The last projection is left out: of its input the backward pass needs no more than h, which
        is a few columns, and its output it does not need, unless that is normalized.
        """
        attended, delta = self._attend(kept.r1, None, shared, None, has_backward=True)
        gated = self._gate(kept.r1, delta, shared)
        del delta
        projected = Projected(kept.h_down, None)
        if self.norms.behind_mlp is not None:
            projected, _ = self._project(self._inner(gated), shared)
        return Activations(attended, gated, projected)

    def _attend(
        self,
        x: Tensor,
        delta: Tensor | None,
        shared: Shared,
        cache: KeyValueCache | None,
        has_backward: bool,
    ) -> tuple[Attended, Tensor]:
        """Compute what the first half adds."""
        qkv, o = self.self_attn.qkv, self.self_attn.o
        M, D = x.shape
        y_ext = qkv.empty_input(M, x)
        _, r1, rstd1 = self.norm(self.norms.before_attention)(x, delta, out=y_ext[:, :D])
        buffer = qkv.forward(y_ext, shared.dropout_seed).unflatten(0, tuple(shared.positions.shape))
        head_norms = self._normalize_heads(buffer)
        # the rotation overwrites what it is given, which nothing else holds
        tables = (shared.positions, shared.cos, shared.sin)
        query, key, value = rope(buffer, *tables, self.num_heads, self.num_kv_heads)
        if cache is not None:
            key, value = cache.extend(self.index, key, value)
        mixed = attention(query, key, value, self.scores, has_backward, shared.samples)
        mixed_ext = o.extended(_rows_of(mixed.output))
        output = o.forward(mixed_ext, shared.dropout_seed)
        h_o = _own(mixed_ext[:, o.in_features :])
        delta, behind = self._normalize_behind(self.norms.behind_attention, output)
        h_qkv = _own(y_ext[:, D:])
        return Attended(r1, rstd1, h_qkv, head_norms, mixed, h_o, behind), delta

    def norm(self, name: str) -> RMSNorm:
        """Find one of the layer's norms by its name in the checkpoint."""
        return getattr(self, name)

    def _normalize_behind(self, name: str | None, output: Tensor) -> tuple[Tensor, Normed | None]:
        """Normalize what a half of the layer gave, where the family does."""
        if name is None:
            return output, None
        delta, _, rstd = self.norm(name)(output)
        return delta, Normed(output, rstd)

    def _normalize_behind_backward(
        self, name: str | None, grad_ext: Tensor, behind: Normed | None, group: LinearGroup
    ) -> Tensor:  # (M, D + T of the group)
        """Compute the gradient of what a half gave, where the half's last group takes it."""
        D = group.num_rows
        if name is None or behind is None:
            return grad_ext[:, : D + group.tail]
        grad = grad_ext[:, :D]
        grad_out = group.empty_output(grad.shape[0], grad)
        self.norm(name).backward(grad, None, *behind, out=grad_out[:, :D])
        return grad_out

    def _normalize_heads(self, qkv: Tensor) -> tuple[Normed, ...]:
        """Normalize queries and keys in place, where the family does, head by head."""
        kept = []
        for norm, part in zip(self.self_attn.head_norms, self._heads(qkv), strict=False):
            heads = _own(part).view(-1, norm.weight.shape[0])
            y, _, rstd = norm(heads)
            part.copy_(y.view(part.shape))
            kept.append(Normed(heads, rstd))
        return tuple(kept)

    def _normalize_heads_backward(self, grad_qkv: Tensor, kept: tuple[Normed, ...]) -> None:
        """Turn the gradients of normalized queries and keys into theirs, in place."""
        norms = self.self_attn.head_norms
        for norm, part, normed in zip(norms, self._heads(grad_qkv), kept, strict=False):
            grad = _own(part).view(normed.rows.shape)
            norm.backward(grad, None, *normed, out=grad)
            part.copy_(grad.view(part.shape))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """View the heads of queries, keys and values, each (B, T, heads, head_dim)."""
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = qkv.unflatten(-1, (sum(counts), -1)).split(counts, dim=2)
        return query, key, value

    def _gate(self, r1: Tensor, delta: Tensor, shared: Shared) -> Gated:
        gate_up, norm = self.mlp.gate_up, self.norm(self.norms.before_mlp)
        M, D = r1.shape
        y_ext = gate_up.empty_input(M, r1)
        _, r2, rstd2 = norm(delta, r1, out=y_ext[:, :D])
        gate_up_ext = gate_up.empty_output(M, r1)
        gate_up.forward(y_ext, shared.dropout_seed, out=gate_up_ext[:, : gate_up.num_rows])
        return Gated(r2, rstd2, _own(y_ext[:, D:]), gate_up_ext)

    def _inner(self, gated: Gated) -> Tensor:  # (M, F + T of down)
        down = self.mlp.down
        inner_ext = down.empty_input(gated.r2.shape[0], gated.r2)
        gates_and_ups = gated.gate_up_ext[:, : self.mlp.gate_up.num_rows]
        glu(gates_and_ups, self.activation, out=inner_ext[:, : down.in_features])
        return inner_ext

    def _project(self, inner_ext: Tensor, shared: Shared) -> tuple[Projected, Tensor]:
        """Compute what the second half adds."""
        down = self.mlp.down
        output = down.forward(inner_ext, shared.dropout_seed)
        h_down = _own(inner_ext[:, down.in_features :])
        delta, behind = self._normalize_behind(self.norms.behind_mlp, output)
        return Projected(h_down, behind), delta

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

        down' and o' are of norm'(...) where what a half adds is normalized.

        Adds the gradients of the low-rank updates to those of the parameters.

        Args:
            kept: of the same pass, and used up.
            needs_grad_x: False for the first layer, whose input is frozen.
        """
        qkv, o = self.self_attn.qkv, self.self_attn.o
        gate_up, down = self.mlp.gate_up, self.mlp.down
        seed = shared.dropout_seed
        r1, rstd1, h_qkv, head_norms, mixed, h_o, behind_attention = kept.attended
        M, D = r1.shape
        B, T = shared.positions.shape
        grad = grad_ext[:, :D]

        (r2, rstd2, h_gate_up, gate_up_ext), (h_down, behind_mlp) = kept.pop_second()
        grad_out = self._normalize_behind_backward(
            self.norms.behind_mlp, grad_ext, behind_mlp, down
        )
        del behind_mlp
        grad_inner = down.backward(grad_out, h_down, seed)
        assert grad_inner is not None
        # gates and ups give way to their gradients, and their gradient to what they gave
        _, inner = glu_backward(grad_inner, gate_up_ext[:, : gate_up.num_rows], self.activation)
        down.accumulate_grad_A(grad_out, inner, seed)
        del grad_out, grad_inner, inner, h_down
        grad_y = gate_up.backward(gate_up_ext, h_gate_up, seed)
        assert grad_y is not None
        norm = self.norm(self.norms.before_mlp)
        norm.backward(grad_y, grad, r2, rstd2, out=grad, y=grad_y)
        gate_up.accumulate_grad_A(gate_up_ext, grad_y, seed)
        del grad_y, r2, rstd2, h_gate_up, gate_up_ext

        grad_out = self._normalize_behind_backward(
            self.norms.behind_attention, grad_ext, behind_attention, o
        )
        grad_mixed = o.backward(grad_out, h_o, seed)
        assert grad_mixed is not None
        o.accumulate_grad_A(grad_out, _rows_of(mixed.output), seed)
        del grad_out
        grad_heads = grad_mixed.view(B, T, self.num_heads, -1).transpose(1, 2)
        grads = attention_backward(mixed, grad_heads)
        del grad_mixed, grad_heads
        grad_qkv_ext = qkv.empty_output(M, grad)
        grad_qkv = grad_qkv_ext[:, : qkv.num_rows].unflatten(0, (B, T))
        rope_backward(*grads, shared.positions, shared.cos, shared.sin, out=grad_qkv)
        del grads
        self._normalize_heads_backward(grad_qkv, head_norms)
        grad_y = qkv.backward(grad_qkv_ext, h_qkv, seed, needs_grad_x)
        norm = self.norm(self.norms.before_attention)
        if grad_y is None:
            y, _, _ = norm(r1)
        else:
            y = grad_y
            norm.backward(grad_y, grad, r1, rstd1, out=grad, y=y)
        qkv.accumulate_grad_A(grad_qkv_ext, y, seed)


def _own(part: Tensor) -> Tensor:
    """Copy a part of a buffer out, so that the rest can go or the part be written to."""
    return part.clone(memory_format=torch.contiguous_format)


def _rows_of(heads: Tensor) -> Tensor:
    """View (B, H, T, head_dim) as (B T, H head_dim) rows, copying if the heads lie otherwise."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)
