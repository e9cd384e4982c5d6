"""The model: Llama (Touvron et al. 2023) and its family, in linear groups of projections that share
an input.

Modules have the checkpoint's names, and a group knows those of its members: the group
`model.layers.0.self_attn.qkv` holds `model.layers.0.self_attn.q_proj`. Frozen tensors stay in the
checkpoint's dtype; only the head has the compute dtype, as activations do. Norms, rotations and the
loss work in float32 and round once; transformers rounds a norm before it applies the weight, and
rounds the cosines and sines.

No autograd graph is built here: `step.micro_step` runs the layers forward and backward.

    B batch, T tokens, D hidden_size, V vocab_size
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.masked_attention_mask import Samples
from kernels.rope_tables import RopeTables
from kernels.softcap import softcap_reference
from llama.activations import Shared
from llama.cache import Slot
from llama.config import LlamaConfig
from llama.experts import ExpertProjections
from llama.layer import DecoderLayer
from llama.loss import linear_cross_entropy
from llama.norm import stream_norm
from llama.rope import query_factors, rope_factor, rope_tables, stacked_frequencies
from llama.targets import update_sizes
from lora.config import LoRAConfig
from lora.frozen_group import FrozenGroup
from lora.linear_group import LinearGroup
from lora.stacked_layout import StackedLayout
from rows.batch import NO_LOSS, Batch

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projections(config: LlamaConfig) -> tuple[str, ...]:
    """The names of a layer's linear projections that may have an update, in the checkpoint and in
    adapters.

    In a mixture of experts those of attention alone: PEFT takes the names of the others for those
    of experts, also in layers that have one MLP. Experts have `parameter_shapes`.
    """
    qkv = ("qkv_proj",) if config.is_fused else PROJECTIONS[:3]
    if config.experts:
        return *qkv, "o_proj"
    gate_up = ("gate_up_proj",) if config.is_mlp_fused else PROJECTIONS[4:6]
    return *qkv, "o_proj", *gate_up, "down_proj"


def projection_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of every projection that may have an update, by its path in the model's
    order."""
    with torch.device("meta"):
        model = Llama(config, torch.float32)
    return {
        prefix + name: (rows, group.in_features)
        for prefix, group in model.groups()
        for name, rows in zip(group.names, group.rows, strict=True)
    }


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, int, int]]:
    """Experts, rows and columns of every tensor of all experts that may have an update, by its path
    in transformers, in the model's order."""
    with torch.device("meta"):
        model = Llama(config, torch.float32)
    return {
        prefix + name: (group.num_experts, group.rows_of_one, group.in_features)
        for prefix, experts in model.experts()
        for name, group in experts.groups().items()
    }


def quantized_layouts(config: LlamaConfig) -> dict[str, StackedLayout | None]:
    """How all weights that NF4 is for lie in checkpoints, experts' too, by their paths in the
    model's order; None: as one matrix."""
    with torch.device("meta"):
        model = Llama(config, torch.float32)
    return {
        prefix + name: None if group.num_stacked is None else group.layout
        for prefix, group in model.frozen_groups()
        for name in group.names
    }


class Decoder(nn.Module):
    """Embeddings, layers and the last norm: `model.` in a checkpoint."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        # drawing values takes nn.Embedding a second on the meta device: it imports a compiler
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=True)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = stream_norm(config)


class Tower(nn.Module):
    """The place of a language model beside an encoder of images, which is not here: `model.` in a
    checkpoint of both."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.language_model = Decoder(config)


class Llama(nn.Module):
    """A Llama causal language model: frozen linear groups with low-rank updates, tied or separate
    head."""

    # (number of distinct turns, 2, most pairs of dimensions) float32, for sequences of the usual
    # length and for long ones; computed from the config
    frequencies: Tensor

    def __init__(self, config: LlamaConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.model = Tower(config) if config.is_tower else Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.lm_head.requires_grad_(False)
        # of embeddings as the residual stream has them
        self.embedding_multiplier = (config.embedding_multiplier or 1.0) / (
            config.residual_multiplier or 1.0
        )
        # rounded as transformers rounds it
        rounded = torch.tensor(config.embedding_scale, dtype=compute_dtype, device="cpu")
        self.embedding_scale = float(rounded) * self.embedding_multiplier
        self.register_buffer(
            "frequencies", stacked_frequencies(config.distinct_turns), persistent=False
        )

    @property
    def decoder(self) -> Decoder:
        return self.model.language_model if isinstance(self.model, Tower) else self.model

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    def move_constants(self, device: torch.device) -> None:
        """Bring what is computed from the config, and not loaded, to the model's device."""
        for module in self.modules():
            for name, constant in module.named_buffers(recurse=False):
                setattr(module, name, constant.to(device))

    @property
    def layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.decoder.layers if isinstance(layer, DecoderLayer)]

    @property
    def head(self) -> Tensor:  # (V, D)
        return (
            self.decoder.embed_tokens.weight
            if self.config.tie_word_embeddings
            else self.lm_head.weight
        )

    def frozen_groups(self) -> Iterator[tuple[str, FrozenGroup]]:
        """The groups of frozen matrices, each with the prefix of its members' names.

        A prefix is "model.layers.0.self_attn.", with the dot.
        """
        for name, module in self.named_modules():
            if isinstance(module, FrozenGroup):
                yield name.rpartition(".")[0] + ".", module

    def groups(self) -> Iterator[tuple[str, LinearGroup]]:
        """The linear groups that may have updates."""
        names = projections(self.config)
        for prefix, group in self.frozen_groups():
            if isinstance(group, LinearGroup) and group.names[0] in names:
                yield prefix, group

    def experts(self) -> Iterator[tuple[str, ExpertProjections]]:
        """The projections of experts, each with the prefix of its tensors' names in transformers.

        A prefix is "model.layers.0.mlp.experts.", with the dot.
        """
        for name, module in self.named_modules():
            if isinstance(module, ExpertProjections):
                yield name.replace(".mlp.", f".{module.block}.") + ".", module

    def attach_lora(self, config: LoRAConfig, seed: int) -> None:
        """Give every target a low-rank update, drawn from `seed`.

        Raises:
            ValueError: nothing is a target, or the head, the embeddings or single experts are.
        """
        groups = list(self.groups())
        of_experts = {
            prefix + name: group
            for prefix, experts in self.experts()
            for name, group in experts.groups().items()
        }
        paths = [prefix + name for prefix, g in groups for name in g.names]
        sizes = update_sizes(config, paths, of_experts)
        generator = torch.Generator().manual_seed(seed)
        for site, (prefix, group) in enumerate(groups):
            own = {name: sizes[prefix + name] for name in group.names if prefix + name in sizes}
            group.attach(own, config.lora_dropout, self.device, generator, site)
        for path, group in of_experts.items():
            if path in sizes:
                group.attach(sizes[path], self.device, generator)

    def make_tables(self) -> None:
        """Copy the tables that kernels read to the device, before the first pass."""
        for _, group in self.frozen_groups():
            group.make_tables(self.compute_dtype)

    def multiply_in_8_bits(self, forward: torch.dtype | None) -> None:
        """Let the base products of projections in NF4 be of 8 bits, before the first pass.

        Attention's stay as they are forward: they are a fifth of the products, and make more than
        half of what that costs in the loss (docs/fp8.md).

        Args:
            forward: E4M3 or INT8 for the MLP's products of the forward pass; None leaves them as
                they are. Those of the backward pass are in E4M3.
        """
        for prefix, group in self.groups():
            group.multiply_in_8_bits(None if prefix.endswith(".self_attn.") else forward)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """All low-rank updates as views of the parameters, by their projection's name.

        A name is "model.layers.0.self_attn.q_proj.lora_A.weight".
        """
        return {
            prefix + name: tensor
            for prefix, adapted in (*self.groups(), *self.experts())
            for name, tensor in adapted.adapter_tensors()
        }

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The stacked low-rank updates of every linear group, in the model's order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def frozen_tensors(self) -> Iterator[Tensor]:
        """The tensors on the device that do not train."""
        yield from (parameter for parameter in self.parameters() if not parameter.requires_grad)
        yield from self.buffers()
        for _, group in self.frozen_groups():
            yield from group.frozen_tensors()

    def expanded_tensors(self) -> Iterator[Tensor]:
        """The weights that stay expanded from pass to pass, where they are copies."""
        for _, group in self.frozen_groups():
            yield from group.expanded_tensors()

    def num_parameters(self) -> tuple[int, int]:
        """Count the trainable and all parameters, a shared head once and a 4-bit weight as one."""
        # the parameters may have room for more
        trainable = sum(tensor.numel() for tensor in self.adapter_tensors().values())
        frozen = sum(p.numel() for p in self.parameters() if not p.requires_grad)
        frozen += sum(group.num_frozen for _, group in self.frozen_groups())
        return trainable, trainable + frozen

    def embed(self, input_ids: Tensor) -> Tensor:  # (B, T) on the device -> (B T, D)
        """Look up the embeddings of tokens, scaled where the family scales them."""
        embedded = self.decoder.embed_tokens(input_ids).to(self.compute_dtype).flatten(0, 1)
        return embedded if self.embedding_scale == 1 else embedded * self.embedding_scale

    def shared(
        self,
        input_ids: Tensor,  # (B, T) on the device
        dropout_seed: Tensor | None = None,
        samples: Samples | None = None,  # where rows hold several
    ) -> Shared:
        """Compute what all layers of one pass over these tokens share.

        Raises:
            ValueError: the rows hold several samples and are so long that the model's frequencies
                depend on how long each of them is.
        """
        rows = torch.arange(input_ids.shape[1], device=input_ids.device)
        is_long = self.config.is_long(input_ids.shape[1])
        if is_long and samples is not None:
            raise ValueError(
                "rows of several samples must not be longer than this model's frequencies are for, "
                f"{self.config.short_length:,} tokens: got {input_ids.shape[1]:,}; "
                "lower --max-length or use --no-packing"
            )
        tables = self._tables(rows, is_long)
        positions = rows.expand_as(input_ids) if samples is None else samples.positions.long()
        return Shared(positions, tables, dropout_seed, samples)

    def _tables(self, positions: Tensor, is_long: bool) -> list[RopeTables]:
        tables = []
        for turn, frequencies in zip(self.config.distinct_turns, self.frequencies, strict=True):
            rope, own = turn.rope, frequencies[int(is_long), : turn.rotary_dim // 2]
            cos, sin = rope_tables(own, positions, rope_factor(rope))
            factors = query_factors(rope, positions)
            tables.append(RopeTables(cos, sin, self.config.is_interleaved, factors))
        return tables

    def rotary_tables(self, num_positions: int) -> list[RopeTables]:
        """Compute cosines and sines of so many positions, twice: by the frequencies for sequences
        of the usual length, and below by those for long ones."""
        positions = torch.arange(num_positions, device=self.device)
        lengths = (self._tables(positions, is_long) for is_long in (False, True))
        return [short.followed_by(long) for short, long in zip(*lengths, strict=True)]

    def starts_anew(self, num_tokens: int, num_more: int) -> bool:
        """Tell whether rotary frequencies change when a sequence grows between two lengths."""
        return not self.config.is_long(num_tokens) and self.config.is_long(num_more)

    @torch.no_grad()
    def hidden_states(
        self,
        input_ids: Tensor,
        slot: Slot | None = None,
        samples: Samples | None = None,
        out: Tensor | None = None,  # (B T, D)
    ) -> Tensor:
        """Run the decoder: token ids (B, T) to normalized hidden states (B, T, D).

        Attention is causal, so padding on the right changes no real token. There is no dropout.

        Args:
            slot: takes the keys and values of the only row.
            samples: where rows hold several.
        """
        assert slot is None or len(input_ids) == 1
        shared = self.shared(input_ids, samples=samples)
        x, delta = self.embed(input_ids), None
        for layer in self.layers:
            x, delta, _ = layer(x, delta, shared, slot)
        y, _, _ = self.decoder.norm(x, delta, out=out)
        return y.unflatten(0, tuple(input_ids.shape))

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Compute next-token logits, (B, T, V) float32; for small batches only."""
        return self.project(self.hidden_states(input_ids))

    @torch.no_grad()
    def project(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., V) float32
        """Compute the logits of normalized hidden states."""
        logits = (hidden @ self.head.T).float()
        scale, cap = self.config.logit_scale, self.config.final_logit_softcapping
        logits = logits if scale is None else scale * logits
        return logits if cap is None else softcap_reference(logits, cap)

    @torch.no_grad()
    def loss(
        self,
        batch: Batch,
    ) -> Tensor:  # () float32
        """Sum the cross-entropy of every label given the tokens before it.

            loss = - sum_(b, t) log p(labels[b, t] | input_ids[b, :t])

        over t > 0 with labels[b, t] != -100. No gradient, no dropout: `step.micro_step` trains.
        """
        rows, targets = target_rows(batch.labels)
        samples = None
        if batch.positions is not None:
            places = (place.to(self.device) for place in samples_of(batch.positions))
            samples = Samples(*places)
        ids = batch.input_ids.to(self.device, non_blocking=True)
        hidden = self.hidden_states(ids, samples=samples).flatten(0, 1)
        picked = hidden[rows.to(self.device, non_blocking=True)]
        targets = targets.to(self.device, non_blocking=True)
        scale, cap = self.config.logit_scale, self.config.final_logit_softcapping
        return linear_cross_entropy(picked, self.head, targets, scale=scale, cap=cap)


def samples_of(positions: Tensor) -> Samples:  # (B, T) int64
    """Count how many tokens of its sample follow each token, from the positions in the samples.

    A sample begins at each position 0.
    """
    T = positions.shape[1]
    starts = torch.where(positions == 0, torch.arange(T, device=positions.device), T)
    # the first start behind each token
    behind = F.pad(starts, (0, 1), value=T)[:, 1:].flip(1).cummin(dim=1).values.flip(1)
    remaining = behind - 1 - torch.arange(T, device=positions.device)
    return Samples(positions.int(), remaining.int())


def target_rows(labels: Tensor) -> tuple[Tensor, Tensor]:  # (B, T) on the CPU
    """Find the rows of the (B T, D) hidden states that predict a label, and their labels.

    The labels are still on the CPU, so nothing waits for the device.
    """
    next_labels = F.pad(labels[:, 1:], (0, 1), value=NO_LOSS).reshape(-1)
    rows = (next_labels != NO_LOSS).nonzero().squeeze(1)
    return rows, next_labels[rows]
