"""A pass over one new token of each sequence: read it beside `llama/layer.py`.

    r1 = x + delta
    q | k | v = qkv(norm(r1)), rotated; k and v appended to the cache
    r2 = r1 + o(attention(q, the cache))
    gate | up = gate_up(norm(r2))
    x, delta = r2, down(activation(gate) up)

The function is a layer's forward pass; what differs is what costs. One row a sequence moves hardly
any activations, so a pass takes as long as reading and decoding the weights, and as long as its
launches, ten a layer. Each kernel that makes the input x of a linear group makes h = x A^T of its
updates too, and the product adds h B^T: an adapter costs no launch.

    B sequences, D hidden_size
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.experts import TokenExperts
from generation.linear import TokenLinear
from kernels.glu import Activation, glu
from kernels.rope_tables import RopeTables
from kernels.token_attention import TokenScores, token_attention
from kernels.token_glu import token_glu
from kernels.token_heads import HeadNorms, Places, token_heads
from kernels.token_norm import token_norm
from llama.cache import KeyValueCache
from llama.halves import MLP
from llama.layer import DecoderLayer
from llama.model import Llama
from llama.norm import NoNorm, RMSNorm


class TokenMLP:
    """An MLP, with what its passes over single tokens need."""

    def __init__(self, mlp: MLP, dtype: torch.dtype, num_sequences: int) -> None:
        self._gate_up = TokenLinear(mlp.gate_up, dtype, num_sequences)
        self._down = TokenLinear(mlp.down, dtype, num_sequences)
        self._activation: Activation = mlp.activation
        self.A = self._gate_up.A

    def __call__(self, y: Tensor, h: Tensor | None) -> Tensor:  # (B, D)
        """Compute down(activation(gate) up)."""
        gates_and_ups = self._gate_up(y, h)
        if self._down.A is None:
            return self._down(glu(gates_and_ups, self._activation), None)
        return self._down(*token_glu(gates_and_ups, self._activation, self._down.A))


class TokenLayer:
    """A decoder layer, with what its passes over single tokens need."""

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype, num_sequences: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv, self.o = (
            TokenLinear(group, dtype, num_sequences) for group in (attention.qkv, attention.o)
        )
        if isinstance(mlp, MLP):
            self.mlp = TokenMLP(mlp, dtype, num_sequences)
        else:
            self.mlp = TokenExperts(mlp, dtype, num_sequences)
        self.layer, self.scores = layer, TokenScores(*layer.scores, attention.sinks)
        self.head_norms = None
        # of all heads together, or of values too, they are launches of their own
        self.normalizes_apart = attention.has_joint_norm or len(attention.head_norms) > 2
        if attention.head_norms and not self.normalizes_apart:
            query, key = attention.q_norm, attention.k_norm
            self.head_norms = HeadNorms(query.weight, key.weight, query.eps, query.offset)

    def __call__(
        self,
        x: Tensor,  # (B, D)
        delta: Tensor | None,  # (B, D), still to be added to x
        keys: Tensor,  # (B, H_kv, capacity, head_dim), one row of each sequence is written
        values: Tensor,
        places: Places,
        tables: list[RopeTables],
    ) -> tuple[Tensor, Tensor]:  # x, delta
        """Run the layer."""
        layer, norms = self.layer, self.layer.norms
        y, h, r1 = _normalize(layer.norm_before(norms.before_attention), x, delta, self.qkv.A)
        qkv, attn = self.qkv(y, h), layer.self_attn
        if attn.num_shared:
            # room for the values, which their norm writes
            qkv = F.pad(qkv, (0, attn.num_shared))
        if self.normalizes_apart:
            attn.normalize_heads(qkv[:, None])
        query = token_heads(qkv, keys, values, places, tables[layer.table], self.head_norms)
        mixed, h = token_attention(query, keys, values, places.cache, self.scores, self.o.A)
        delta = self._normalize_behind(norms.behind_attention, self.o(mixed, h))
        norm = layer.norm_before(norms.before_mlp)
        if layer.is_parallel:
            y, h, _ = _normalize(norm, r1, None, self.mlp.A)
            r2 = r1 + delta
        else:
            y, h, r2 = _normalize(norm, r1, delta, self.mlp.A)
        return layer.scaled(r2, self._normalize_behind(norms.behind_mlp, self.mlp(y, h)))

    def _normalize_behind(self, name: str | None, output: Tensor) -> Tensor:
        return output if name is None else self.layer.norm(name)(output)[0]


def _normalize(
    norm: RMSNorm | NoNorm, x: Tensor, delta: Tensor | None, A: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:  # y, h, r
    if A is None or isinstance(norm, NoNorm):
        y, r, _ = norm(x, delta)
        return y, None if A is None else y @ A.T, r
    return token_norm(x, delta, norm.weight, norm.eps, norm.offset, A, norm.is_centred)


class TokenPass:
    """The model, for one new token of each sequence of a cache."""

    def __init__(self, model: Llama, cache: KeyValueCache) -> None:
        self._model, self._cache = model, cache
        self._layers = [
            TokenLayer(layer, model.compute_dtype, cache.num_sequences) for layer in model.layers
        ]
        self._tables = model.rotary_tables(cache.capacity)

    def __call__(self, ids: Tensor, lengths: Tensor, is_long: Tensor) -> Tensor:  # (B, D)
        """Append the tokens to the cache, and find their normalized hidden states.

        Args:
            ids: (B,) int64.
            lengths: (B,) int64, tokens of each sequence that the cache has already.
            is_long: (B,) int64, 1 for a sequence that is rotated by the frequencies for long ones.
        """
        places = Places(lengths, lengths + is_long * self._cache.capacity)
        x, delta = self._model.embed(ids[:, None]), None
        caches = zip(self._layers, self._cache.keys, self._cache.values, strict=True)
        for layer, keys, values in caches:
            x, delta = layer(x, delta, keys, values, places, self._tables)
        return self._model.decoder.norm(x, delta)[0]
