"""Llama (Touvron et al. 2023) as a checkpoint has it, with a linear group wherever projections
share an input.

Modules bear the checkpoint's names; a group adds its members' (`model.layers.0.self_attn.qkv` holds
`model.layers.0.self_attn.q_proj`). Frozen tensors stay in the checkpoint's dtype; activations have
the compute dtype; norms, rotations and the loss work in float32 and round once, where transformers
rounds a norm before its weight is applied and rounds the cosines and sines.

    B batch, T tokens, D hidden_size, H heads, V vocab_size
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu
from llama.config import LlamaConfig
from llama.loss import linear_cross_entropy
from llama.rope import rope_frequencies, rope_tables
from lora.config import LoRAConfig, resolve_target_modules
from lora.linear_group import LinearGroup

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Rotations(NamedTuple):
    """How far each token is rotated: its row in tables of cosines and sines."""

    positions: Tensor  # (B, T)
    cos: Tensor  # (T_max, head_dim / 2) float32
    sin: Tensor


@dataclass
class KeyValueCache:
    """Keys and values of the tokens seen so far, one (B, H_kv, T, head_dim) pair per layer."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

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
    """Residual addition and root mean square normalization (Zhang and Sennrich 2019).

        r = x + residual                              x itself where there is no residual
        y = weight * r / sqrt(mean(r^2) + eps)

    In float32, rounded once to x's dtype. transformers rounds r / sqrt(...) first, so in 16 bits it
    differs by up to one rounding.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)
        self.eps = config.rms_norm_eps

    def forward(
        self,
        x: Tensor,  # (..., D)
        residual: Tensor | None = None,  # (..., D)
    ) -> tuple[Tensor, Tensor]:  # y and r, (..., D) each
        return rms_norm(x, self.weight, self.eps, residual)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        q_rows = config.num_attention_heads * config.head_dim
        kv_rows = config.num_key_value_heads * config.head_dim
        self.qkv = LinearGroup(
            ("q_proj", "k_proj", "v_proj"),
            (q_rows, kv_rows, kv_rows),
            config.hidden_size,
            config.attention_bias,
        )
        self.o = LinearGroup(("o_proj",), (config.hidden_size,), q_rows, config.attention_bias)

    def forward(
        self, x: Tensor, rotations: Rotations, cache: KeyValueCache | None
    ) -> Tensor:  # (B, T, D)
        batch, tokens, _ = x.shape
        # the rotation overwrites what it is given, which nothing else holds
        query, key, value = rope(
            self.qkv.multiply(x), *rotations, self.num_heads, self.num_kv_heads
        )
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        # one new token sees everything before it; several see a triangle, and start an empty cache
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=tokens > 1, enable_gqa=True
        )
        return self.o.multiply(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        rows = config.intermediate_size
        self.gate_up = LinearGroup(
            ("gate_proj", "up_proj"), (rows, rows), config.hidden_size, config.mlp_bias
        )
        self.down = LinearGroup(("down_proj",), (config.hidden_size,), rows, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        # nothing else holds the buffer, so its gradient may take its place
        return self.down.multiply(swiglu(self.gate_up.multiply(x), overwrites=True))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotations: Rotations, cache: KeyValueCache | None) -> Tensor:
        y, x = self.input_layernorm(x)
        y, x = self.post_attention_layernorm(self.self_attn(y, rotations, cache), x)
        # added here and not in the next layer's norm, so that a layer has one input: recomputing
        # it keeps one tensor
        return x + self.mlp(y)


class Decoder(nn.Module):
    """Embeddings, layers and the last norm: `model.` in a checkpoint."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.requires_grad_(False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config)


class Llama(nn.Module):
    """A Llama causal language model: frozen linear groups with low-rank updates, tied or separate
    head.

    Attributes:
        recompute_activations: keep only each layer's input and run the layer again in the backward
            pass.
    """

    frequencies: Tensor  # (head_dim / 2,) float32, follow from the config

    def __init__(self, config: LlamaConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.recompute_activations = False
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.lm_head.requires_grad_(False)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def head(self) -> Tensor:  # (V, D)
        return (
            self.model.embed_tokens.weight
            if self.config.tie_word_embeddings
            else self.lm_head.weight
        )

    def groups(self) -> Iterator[tuple[str, LinearGroup]]:
        """The linear groups, each with the prefix of its members' names.

        A prefix is "model.layers.0.self_attn.", with the dot.
        """
        for name, module in self.named_modules():
            if isinstance(module, LinearGroup):
                yield name.rpartition(".")[0] + ".", module

    def attach_lora(self, config: LoRAConfig, seed: int) -> None:
        """Give every target projection a low-rank update, drawn from `seed`.

        Raises:
            ValueError: a target is not one of the model's projections.
        """
        resolve_target_modules(config.target_modules, PROJECTIONS)
        generator = torch.Generator().manual_seed(seed)
        for _, group in self.groups():
            group.attach(config, self.device, generator)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """All low-rank updates as views of the parameters, by their projection's name.

        A name is "model.layers.0.self_attn.q_proj.lora_A.weight".
        """
        return {
            prefix + name: tensor
            for prefix, group in self.groups()
            for name, tensor in group.adapter_tensors()
        }

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The stacked updates of every group, in the model's order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def num_parameters(self) -> tuple[int, int]:
        """Count the trainable and all parameters, a shared head once and a 4-bit weight as one."""
        trainable = sum(parameter.numel() for parameter in self.trainable_parameters())
        frozen = sum(p.numel() for p in self.parameters() if not p.requires_grad)
        return trainable, trainable + frozen + sum(group.num_frozen for _, group in self.groups())

    def describe_trainable_parameters(self) -> str:
        """Say how many parameters train, in the words of PEFT's print_trainable_parameters."""
        trainable, total = self.num_parameters()
        return (
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def hidden_states(self, input_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Run the decoder: token ids (B, T) to normalized hidden states (B, T, D).

        Attention is causal, so padding on the right changes no real token. With a cache the ids
        continue what it holds: any number of tokens into an empty one, one token at a time from
        then on.

        Raises:
            ValueError: several tokens are given to a cache that is not empty.
        """
        past = cache.num_tokens if cache else 0
        if past and input_ids.shape[1] > 1:
            raise ValueError(
                f"a cache continues one token at a time: got {input_ids.shape[1]} tokens"
            )
        rows = torch.arange(input_ids.shape[1], device=input_ids.device)
        tables = rope_tables(self.frequencies, rows + past)
        rotations = Rotations(rows.expand_as(input_ids), *tables)
        x = self.model.embed_tokens(input_ids).to(self.compute_dtype)
        for layer in self.model.layers:
            if self.recompute_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotations, cache, use_reentrant=False)
            else:
                x = layer(x, rotations, cache)
        return self.model.norm(x)[0]

    def logits(self, input_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Compute next-token logits, (B, T, V) float32; for generation and small batches only."""
        return (self.hidden_states(input_ids, cache) @ self.head.to(self.compute_dtype).T).float()

    def loss(
        self,
        input_ids: Tensor,  # (B, T) int64, on the CPU
        labels: Tensor,  # (B, T) int64, on the CPU, -100 where nothing is to be predicted
    ) -> Tensor:  # () float32
        """Sum the cross-entropy of every label given the tokens before it.

            loss = - sum_(b, t) log p(labels[b, t] | input_ids[b, :t])

        over t > 0 with labels[b, t] != -100. Labels stay on the CPU until their positions are
        known, so the device is never waited for.
        """
        next_labels = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
        rows = (next_labels != -100).nonzero().squeeze(1)
        hidden = self.hidden_states(input_ids.to(self.device, non_blocking=True))
        picked = hidden.reshape(-1, self.config.hidden_size)[
            rows.to(self.device, non_blocking=True)
        ]
        return linear_cross_entropy(
            picked, self.head, next_labels[rows].to(self.device, non_blocking=True)
        )
