"""One layer of the decoder, forward and backward, written out: read `llama/reference.py` beside it.

    r1 = x + delta                        delta: what the layer before still has to add
    q | k | v = qkv(norm(r1)), rotated
    r2 = r1 + o(attention(q, k, v))
    gate | up = gate_up(norm(r2))
    x, delta = r2, down(activation(gate) up)

In Gemma 2 a second norm follows o and down: norm(o(...)) and norm(down(...)) are added. OLMo 2 has
that norm alone, and what stands before qkv and gate_up is no norm, but hands r1 and r2 on. In
Command-R gate_up has norm(r1), as qkv has. In Gemma 4 a factor multiplies x and delta. The
reference's `Attention.forward` is `_attend` here, its `MLP.forward` is `_gate` and `_project`, each
with the norms before and behind it; `llama/halves.py` has their projections, and `llama/experts.py`
what a mixture of experts has in the MLP's place.

Autograd would save the inputs of every operation and add gradients up in tensors of their own.
Here the backward pass keeps r1, r2, their rstd, q | k | v, the output of attention, gate | up and
the few columns of each low-rank update: 4.5 D + 2 F numbers a token of hidden size D and
intermediate size F where keys and values are a quarter of the queries, and 2 D more in Gemma 2.
Kernels that read the sources anyway compute everything else again, or gradients overwrite it. One
buffer holds the gradient of the residual stream from the last layer to the first.

    M = B T rows, D hidden_size, F intermediate_size

A name in `_ext` is a matrix with more columns behind its own: h = x A^T behind an input x, the
gradient of h behind the gradient of an output. They are the tail of a linear group, and its width
is written "tail" in shapes (`lora/linear_group.py` has the algebra).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.rope import rope
from kernels.rope_backward import rope_backward
from llama.activations import Activations, Shared
from llama.attention import Scores, attention, attention_backward
from llama.cache import Slot
from llama.config import LlamaConfig
from llama.experts import ExpertMLP
from llama.halves import MLP, Attention, own
from llama.norm import NoNorm, RMSNorm, stream_norm
from lora.frozen_group import FrozenGroup
from lora.rows import Rows


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); some families normalize what is added too, and
    in some both halves have the first x."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.index, self.hidden_size = index, config.hidden_size
        self.is_parallel = config.is_parallel
        # of the pass's tables, those that rotate this layer's heads
        self.table = config.distinct_turns.index(config.turn(index))
        self.scores = Scores(
            config.score_scale, config.attn_logit_softcapping, config.windows[index]
        )
        self.self_attn, self.mlp = Attention(config, index), _mlp_of(config, index)
        self.norms = norms = config.norms
        for name in filter(None, (norms.before_attention, norms.before_mlp)):
            self.add_module(name, stream_norm(config))
        for name in filter(None, (norms.behind_attention, norms.behind_mlp)):
            self.add_module(name, RMSNorm(config.hidden_size, config))
        scalar = torch.empty(1) if config.has_layer_scalar else None
        # a factor of what leaves the layer
        self.layer_scalar = None if scalar is None else nn.Parameter(scalar, requires_grad=False)

    def norm(self, name: str) -> RMSNorm:
        """Find one of the layer's norms by its name in the checkpoint."""
        return getattr(self, name)

    def norm_before(self, name: str | None) -> RMSNorm | NoNorm:
        """Find what stands before a half of the layer."""
        return NoNorm() if name is None else self.norm(name)

    def keep_expanded(self, dtype: torch.dtype) -> None:
        """Expand the weights for all passes, before the first one."""
        for group in self._frozen_groups():
            group.keep_expanded(dtype)

    def drop_expanded(self) -> None:
        """Let each pass expand the weights."""
        for group in self._frozen_groups():
            group.expanded = None

    def _frozen_groups(self) -> Iterator[FrozenGroup]:
        return (module for module in self.modules() if isinstance(module, FrozenGroup))

    @property
    def grad_tail(self) -> int:
        """Columns behind the gradient of the residual stream, for that of h."""
        return max(self.self_attn.o.tail, self.mlp.tail)

    def forward(
        self,
        x: Tensor,  # (M, D)
        delta: Tensor | None,  # (M, D), still to be added to x
        shared: Shared,
        slot: Slot | None = None,
        has_backward: bool = False,
    ) -> tuple[Tensor, Tensor, Activations]:  # x, delta (M, D) and what is kept
        """Run the layer, and leave the keys and values in a slot if there is one.

        Args:
            has_backward: keep what `backward` takes instead of what `recompute` takes.
        """
        attended = Activations()
        delta = self._attend(x, delta, shared, slot, has_backward, attended)
        r1 = attended.r1
        # one record; or three, each of which is dropped as soon as the next one is made of it
        gated = attended if has_backward else Activations()
        r2 = self._gate(r1, delta, shared, gated)
        if shared.balance is not None and gated.routing is not None:
            shared.balance.add(gated.routing)
        del attended, delta
        inner = self.mlp.inner(gated)
        projected = gated if has_backward else Activations()
        projected.routing = gated.routing
        del gated
        delta = self._project(inner, shared, projected)
        x, delta = self.scaled(r2, delta)
        if has_backward:
            return x, delta, projected
        kept = Activations()
        kept.r1, kept.h_down = r1, projected.h_down
        return x, delta, kept

    def scaled(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:  # (M, D)
        """Multiply what leaves the layer by its factor, in families that have one; delta in
        place."""
        if self.layer_scalar is None:
            return x, delta
        return x * self.layer_scalar.to(x.dtype), delta.mul_(self.layer_scalar)

    def recompute(self, kept: Activations, shared: Shared) -> Activations:
        """Compute the activations of an earlier `forward` again, bit for bit, from those it kept.

        The last projection is left out: the backward pass needs h of its input, which was kept, and
        its output only where a norm follows.
        """
        delta = self._attend(kept.r1, None, shared, None, True, kept)
        self._gate(kept.r1, delta, shared, kept)
        del delta
        if self.norms.behind_mlp is not None:
            self._project(self.mlp.inner(kept), shared, kept)
        return kept

    def _attend(
        self,
        x: Tensor,
        delta: Tensor | None,
        shared: Shared,
        slot: Slot | None,
        has_backward: bool,
        kept: Activations,
    ) -> Tensor:  # (M, D)
        """Compute what attention adds to the residual stream."""
        qkv, o, seed = self.self_attn.qkv, self.self_attn.o, shared.dropout_seed
        M, D = x.shape
        y = qkv.empty_input(M, x)
        norm = self.norm_before(self.norms.before_attention)
        _, kept.r1, kept.rstd1 = norm(x, delta, out=y.ext[:, :D], in_8_bits=y.in_8_bits)
        attn, tables, samples = self.self_attn, shared.tables[self.table], shared.samples
        heads = attn.project(y, seed).unflatten(0, tuple(shared.positions.shape))
        kept.heads = attn.normalize_heads(heads)
        # the rotation overwrites heads, which nothing else holds
        query, key, value = rope(
            heads, shared.positions, tables, *attn.counts[:2], head_dim=attn.head_dim
        )
        if slot is not None:
            slot.store(self.index, key, value)
        kept.mixed = attention(query, key, value, self.scores, has_backward, samples, attn.sinks)
        output, mixed_ext = o.forward_from(_rows_of(kept.mixed.output), seed)
        kept.h_o = own(mixed_ext[:, o.in_features :])
        delta, kept.output_o = self._normalize_behind(self.norms.behind_attention, output)
        kept.h_qkv = own(y.ext[:, D:])
        return delta

    def _gate(self, r1: Tensor, delta: Tensor, shared: Shared, kept: Activations) -> Tensor:
        """Compute gate | up, and r2, (M, D)."""
        kept.balance = shared.balance
        norm = self.norm_before(self.norms.before_mlp)
        M, D = r1.shape
        y = self.mlp.empty_input(M, r1)
        if self.is_parallel:
            norm(r1, out=y.ext[:, :D], in_8_bits=y.in_8_bits)
            r2 = r1 + delta
        else:
            _, r2, kept.rstd2 = norm(delta, r1, out=y.ext[:, :D], in_8_bits=y.in_8_bits)
            kept.r2 = r2
        self.mlp.project_in(y, shared.dropout_seed, kept)
        return r2

    def _project(self, inner: Rows, shared: Shared, kept: Activations) -> Tensor:  # (M, D)
        """Compute what the MLP adds to the residual stream."""
        output = self.mlp.project_out(inner, shared.dropout_seed, kept)
        delta, kept.output_down = self._normalize_behind(self.norms.behind_mlp, output)
        return delta

    def _normalize_behind(
        self, name: str | None, output: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Normalize the output of o or down in families that do; and what the backward pass needs
        for that."""
        if name is None:
            return output, None
        delta, _, rstd = self.norm(name)(output)
        return delta, (output, rstd)

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

        down' and o' are of norm'(...) where a norm is behind them. Where the MLP has attention's
        input,

            grad_r1  = grad + norm'(gate_up'(activation'(down'(grad)))
                                    + qkv'(rotation'(attention'(o'(grad)))))

        Adds the gradients of the low-rank updates to those of the parameters.

        Args:
            kept: of the same pass, and used up.
            needs_grad_x: False for the first layer, whose input is frozen.
        """
        attn, mlp = self.self_attn, self.mlp
        qkv, o = attn.qkv, attn.o
        norms, seed = self.norms, shared.dropout_seed
        M, D = kept.r1.shape
        B, T = shared.positions.shape
        grad = grad_ext[:, :D]
        if self.layer_scalar is not None:
            grad.mul_(self.layer_scalar)

        grad_out = self._behind_backward(norms.behind_mlp, grad_ext, kept.output_down, mlp.tail)
        kept.output_down = None
        mlp.inner_backward(grad_out, seed, kept)
        del grad_out
        grad_y = mlp.project_in_backward(seed, kept)
        norm, waiting = self.norm_before(norms.before_mlp), None
        if self.is_parallel:
            # for the gradient of attention's input
            waiting = grad_y
            y, _, _ = norm(kept.r1)
        else:
            y = grad_y
            norm.backward(grad_y, grad, kept.r2, kept.rstd2, out=grad, y=y)
            del kept.r2, kept.rstd2
        mlp.accumulate_grad_A(y, seed, kept)
        del grad_y, y

        grad_out = self._behind_backward(norms.behind_attention, grad_ext, kept.output_o, o.tail)
        grad_mixed = o.backward(grad_out, kept.h_o, seed)
        assert grad_mixed is not None
        o.accumulate_grad_A(grad_out, _rows_of(kept.mixed.output), seed)
        del grad_out
        grad_heads = grad_mixed.view(B, T, attn.counts[0], -1).transpose(1, 2)
        grads = attention_backward(kept.mixed, grad_heads)
        del grad_mixed, grad_heads
        grad_qkv_ext = attn.empty_gradient(M, grad)
        grad_qkv = grad_qkv_ext[:, : attn.width].unflatten(0, (B, T))
        rope_backward(*grads, shared.positions, shared.tables[self.table], out=grad_qkv)
        del grads
        attn.normalize_heads_backward(grad_qkv, kept.heads)
        grad_qkv_ext = attn.project_gradient(grad_qkv_ext)
        grad_y = qkv.backward(grad_qkv_ext, kept.h_qkv, seed, needs_grad_x)
        norm = self.norm_before(norms.before_attention)
        if grad_y is None:
            y, _, _ = norm(kept.r1)
        else:
            y = grad_y if waiting is None else grad_y.add_(waiting)
            norm.backward(grad_y, grad, kept.r1, kept.rstd1, out=grad, y=y)
        qkv.accumulate_grad_A(grad_qkv_ext, y, seed)

    def _behind_backward(
        self,
        name: str | None,
        grad_ext: Tensor,
        kept: tuple[Tensor, Tensor] | None,
        tail: int,
    ) -> Tensor:  # (M, D + tail)
        """Compute the gradient of o's or down's output from that of what was added."""
        M, D = grad_ext.shape[0], self.hidden_size
        if name is None or kept is None:
            return grad_ext[:, : D + tail]
        grad = grad_ext[:, :D]
        grad_out = grad.new_empty(M, D + tail)
        self.norm(name).backward(grad, None, *kept, out=grad_out[:, :D])
        return grad_out


def _rows_of(heads: Tensor) -> Tensor:
    """View (B, H, T, head_dim) as (B T, H head_dim) rows, copying if the heads lie otherwise."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)


def _mlp_of(config: LlamaConfig, index: int) -> MLP | ExpertMLP:
    experts = config.experts
    if experts is None or not experts.has_experts[index]:
        return MLP(config)
    return ExpertMLP(config, experts)
