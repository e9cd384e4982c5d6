"""The Llama family in plain torch, under autograd: the function that the rest of `llama/` computes.

A layer here has the order and the names of `llama/layer.py`, where forward and backward
passes are written out and kernels do the work. Here every operation is one of torch's, and autograd
finds the gradients. Weights are plain matrices: QLoRA is this module with each projection's frozen
weight read as `nf4.weight.dequantize` expands it, and `lora_A` and `lora_B` alone trained.
`tests/test_llama_reference.py` copies a quantized model into this module like that, and holds the
written-out passes against it in float64; `bundled/` trains the demo's model with it.

    B batch, T tokens, D hidden_size, H heads, V vocab_size
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.glu import Activation, glu_reference
from llama.config import LlamaConfig
from llama.layer_experts import Experts
from llama.rope import query_factors, rope_factor, rope_frequencies, rope_tables
from rows.batch import Batch


class Projection(nn.Linear):
    """A projection, and its low-rank update once it has one.

        y = x W^T + b + s (x A^T) B^T

    LoRA (Hu et al. 2021) section 4.1.
    """

    def attach(self, rank: int, scaling: float) -> None:
        """Add a low-rank update; its values are for the caller to set."""
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.scaling * self.lora_B(self.lora_A(x)) if hasattr(self, "lora_A") else y


class RMSNorm(nn.Module):
    """y = (weight + offset) x / sqrt(mean(x^2) + eps), Zhang and Sennrich 2019.

    Where x is centred before, it is layer normalization without a bias, Ba et al. 2016. Rows may
    hold several times as many numbers as the weight: each part is normalized by itself.
    """

    weight: Tensor

    def __init__(self, width: int, config: LlamaConfig, has_weight: bool = True) -> None:
        super().__init__()
        if has_weight:
            self.weight = nn.Parameter(torch.empty(width))
        else:
            self.register_buffer("weight", torch.ones(width), persistent=False)
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset
        self.is_centred = config.has_centred_norms

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (-1, len(self.weight)))
        if self.is_centred:
            parts = parts - parts.mean(-1, True)
        rstd = (parts.square().mean(-1, True) + self.eps).rsqrt()
        return ((self.weight + self.offset) * parts * rstd).flatten(-2)


class Rotation(NamedTuple):
    """How the heads of tokens turn, and the factor of each query in families that have one."""

    cos: Tensor  # (B, 1, T, r / 2)
    sin: Tensor
    query_factor: Tensor | None  # (B, 1, T, 1)


def rotate(
    heads: Tensor,  # (B, H, T, head_dim)
    cos: Tensor,  # (B, 1, T, r / 2)
    sin: Tensor,
    is_interleaved: bool,
) -> Tensor:
    """Turn dimensions i and i + r / 2 together, or 2 i and 2 i + 1, Su et al. 2021; those behind
    the first r stay."""
    turned, rest = heads[..., : 2 * cos.shape[-1]], heads[..., 2 * cos.shape[-1] :]
    if is_interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    together = torch.stack(pairs, dim=-1 if is_interleaved else -2).flatten(-2)
    return torch.cat((together, rest), dim=-1)


class Attention(nn.Module):
    """softmax(scale q k^T, sink) v of rotated queries and keys, several queries to a key."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.config, self.heads = config, config.heads(index)
        D, head_dim = config.hidden_size, self.heads.head_dim
        self.counts = (config.num_attention_heads, *2 * (self.heads.num_key_value_heads,))
        names = ("q_proj", "k_proj", "v_proj")[: 2 + self.heads.has_values]
        rows = {n: c * head_dim for n, c in zip(names, self.counts, strict=False)}
        self.inputs = {"qkv_proj": sum(rows.values())} if config.is_fused else rows
        for name, num_rows in self.inputs.items():
            self.add_module(name, Projection(D, num_rows, config.qkv_bias))
        self.o_proj = Projection(self.counts[0] * head_dim, D, config.o_bias)
        if config.qk_norm:
            widths = config.qk_norm_widths(index)
            self.q_norm, self.k_norm = (RMSNorm(width, config) for width in widths)
        if config.has_value_norm:
            self.v_norm = RMSNorm(head_dim, config, has_weight=False)
        if config.has_sinks:
            self.sinks = nn.Parameter(torch.empty(self.counts[0]))

    def forward(self, x: Tensor, rotation: Rotation, is_seen: Tensor) -> Tensor:
        qkv = torch.cat([self.get_submodule(name)(x) for name in self.inputs], dim=-1)
        head_dim = self.heads.head_dim
        widths = [count * head_dim for count in self.counts[: 2 + self.heads.has_values]]
        query, key, *values = qkv.split(widths, dim=-1)
        value = values[0] if values else key
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.config.has_value_norm:
            value = self.v_norm(value)
        # (B, H, T, head_dim)
        query, key, value = (
            part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in (query, key, value)
        )
        cos, sin, factor = rotation
        query, key = (rotate(h, cos, sin, self.config.is_interleaved) for h in (query, key))
        query = query if factor is None else factor * query
        num_sharing = self.counts[0] // self.counts[1]
        key, value = (shared.repeat_interleave(num_sharing, dim=1) for shared in (key, value))
        scores = self.config.score_scale * (query @ key.mT)
        if cap := self.config.attn_logit_softcapping:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~is_seen, -math.inf)
        if self.config.has_sinks:
            scores = torch.cat((scores, self.sinks[:, None, None].expand(*scores.shape[:3], 1)), -1)
        mixed = scores.softmax(dim=-1)[..., : key.shape[2]] @ value
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(activation(gate(x)) up(x)), Shazeer 2020."""

    def __init__(self, config: LlamaConfig, width: int) -> None:
        super().__init__()
        D = config.hidden_size
        rows = {"gate_proj": width, "up_proj": width}
        self.inputs = {"gate_up_proj": 2 * width} if config.is_mlp_fused else rows
        for name, num_rows in self.inputs.items():
            self.add_module(name, Projection(D, num_rows, config.mlp_bias))
        self.down_proj = Projection(width, D, config.mlp_bias)
        self.activation: Activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        gate_up = torch.cat([self.get_submodule(name)(x) for name in self.inputs], dim=-1)
        return self.down_proj(glu_reference(gate_up, self.activation))


class ExpertMLP(nn.Module):
    """The MLPs of the experts whose logits are a token's largest, each times its share, Shazeer et
    al. 2017."""

    def __init__(self, config: LlamaConfig, experts: Experts) -> None:
        super().__init__()
        self.num_chosen, self.is_normalized = experts.num_chosen, experts.is_normalized
        self.gate = nn.Linear(config.hidden_size, experts.num_experts, config.mlp_bias)
        self.experts = nn.ModuleList(MLP(config, experts.width) for _ in range(experts.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(dim=-1)
        weights, chosen = shares.topk(self.num_chosen)
        # of the last pass, (B, T, E), for its auxiliary loss
        self.shares = shares
        if self.is_normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        # zero for experts that a token does not have
        weights = torch.zeros_like(shares).scatter(-1, chosen, weights)
        return sum(
            (weights[..., e, None] * expert(x) for e, expert in enumerate(self.experts)),
            start=torch.zeros_like(x),
        )


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); some families normalize what is added too, and
    in some both halves have the first x."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config, config.intermediate_size)
        if config.experts and config.experts.has_experts[index]:
            self.mlp = ExpertMLP(config, config.experts)
        self.norms, self.window = config.norms, config.windows[index]
        self.multiplier, self.is_parallel = config.residual_multiplier or 1.0, config.is_parallel
        for name in filter(None, config.norms):
            self.add_module(name, RMSNorm(config.hidden_size, config))
        self.layer_scalar = nn.Parameter(torch.empty(1)) if config.has_layer_scalar else 1.0

    def norm(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else self.get_submodule(name)(x)

    def forward(self, x: Tensor, rotation: Rotation, distance: Tensor) -> Tensor:
        is_seen = (distance >= 0) & (distance < (self.window or math.inf))
        r1 = x
        delta = self.self_attn(self.norm(self.norms.before_attention, r1), rotation, is_seen)
        r2 = r1 + self.multiplier * self.norm(self.norms.behind_attention, delta)
        delta = self.mlp(self.norm(self.norms.before_mlp, r1 if self.is_parallel else r2))
        r3 = r2 + self.multiplier * self.norm(self.norms.behind_mlp, delta)
        return self.layer_scalar * r3


class Decoder(nn.Module):
    """Embeddings, layers and the last norm: `model.` in a checkpoint."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config)


class Reference(nn.Module):
    """A causal language model whose parameters have the checkpoint's and PEFT's names."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Compute next-token logits, (B, T) to (B, T, V).

        Args:
            positions: (B, T), of the tokens in their samples, where rows hold several.
        """
        T, config = input_ids.shape[1], self.config
        order = torch.arange(T)
        if positions is None:
            positions = order.expand_as(input_ids)
        # how far token j lies before token i; less than nothing where i must not see it
        sample = (positions == 0).cumsum(1)
        is_same = (sample[:, :, None] == sample[:, None, :])[:, None]
        distance = torch.where(is_same, order[:, None] - order, -1)  # (B, 1, T, T)

        scale = config.embedding_scale * (config.embedding_multiplier or 1.0)
        x = scale * self.model.embed_tokens(input_ids)
        rotations = {}
        for turn in config.distinct_turns:
            rope = turn.rope
            frequencies = rope_frequencies(*turn, config.is_long(T))
            tables = rope_tables(frequencies, positions.flatten(), rope_factor(rope))
            cos, sin = (t.to(x.dtype).unflatten(0, (-1, 1, T)) for t in tables)
            factors = query_factors(rope, positions)
            factors = None if factors is None else factors.to(x.dtype)[:, None, :, None]
            rotations[turn] = Rotation(cos, sin, factors)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, rotations[config.turn(index)], distance)
        head = self.model.embed_tokens if config.tie_word_embeddings else self.lm_head
        logits = (config.logit_scale or 1.0) * self.model.norm(x) @ head.weight.T
        cap = config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(self, batch: Batch) -> Tensor:
        """Sum the cross-entropy of each label (-100: none) given the tokens before it."""
        logits = self(batch.input_ids, batch.positions)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
