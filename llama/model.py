"""Llama (Touvron et al. 2023) and its family as a checkpoint has them, with a linear group wherever
projections share an input.

Modules bear the checkpoint's names; a group adds its members' (`model.layers.0.self_attn.qkv` holds
`model.layers.0.self_attn.q_proj`). Frozen tensors stay in the checkpoint's dtype, but for the head,
which has the compute dtype as activations do; norms, rotations and the loss work in float32 and
round once, where transformers rounds a norm before its weight is applied and rounds the cosines and
sines.

Nothing here has a graph of autograd: `step.micro_step` runs the layers forward and back.

    B batch, T tokens, D hidden_size, V vocab_size
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreign.guest import in_guest
from kernels.masked_attention import Samples
from kernels.softcap import softcap_reference
from llama.config import LlamaConfig
from llama.layer import DecoderLayer, KeyValueCache, RMSNorm, Shared
from llama.loss import linear_cross_entropy
from llama.rope import rope_frequencies, rope_tables
from llama.rope_scaling import LongRopeScaling
from lora.config import LoRAConfig, UpdateSize
from lora.linear_group import LinearGroup

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED_PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def projections(config: LlamaConfig) -> tuple[str, ...]:
    """The names of a layer's linear projections in the checkpoint and in adapters."""
    return FUSED_PROJECTIONS if config.is_fused else PROJECTIONS


def projection_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of every projection of a model, by its path in the model's order."""
    with torch.device("meta"):
        model = Llama(config, torch.float32)
    return {
        prefix + name: (rows, group.in_features)
        for prefix, group in model.groups()
        for name, rows in zip(group.names, group.rows, strict=True)
    }


def update_sizes(lora: LoRAConfig, paths: Iterable[str]) -> dict[str, UpdateSize]:
    """Find which of a model's projections get an update, and its size.

    Raises:
        ValueError: none does, or the head or the embeddings would.
    """
    paths = list(paths)
    # patterns come with an adapter, and may take for ever
    if lora.has_patterns:
        sizes = in_guest(lambda: _find_sizes(lora, paths), "the adapter's patterns of modules")
    else:
        sizes = _find_sizes(lora, paths)
    if not sizes:
        raise ValueError(
            f"target_modules must fit at least one projection of the model, such as {paths[0]}: "
            f"got {lora.target_modules!r}"
        )
    return sizes


def _find_sizes(lora: LoRAConfig, paths: Iterable[str]) -> dict[str, UpdateSize]:
    for path in ("lm_head", "model.embed_tokens"):
        if lora.has_target(path):
            raise ValueError(
                "target_modules must be projections of the layers, head and embeddings stay as "
                f"they are: {lora.target_modules!r} includes {path}"
            )
    return {path: size for path in paths if (size := lora.update_size(path)) is not None}


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
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)


class Llama(nn.Module):
    """A Llama causal language model: frozen linear groups with low-rank updates, tied or separate
    head."""

    # (2, head_dim / 2) float32, for sequences of the usual length and for long ones; they follow
    # from the config
    frequencies: Tensor

    def __init__(self, config: LlamaConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.lm_head.requires_grad_(False)
        # rounded as transformers rounds it
        self.embedding_scale = float(
            torch.tensor(config.embedding_scale, dtype=compute_dtype, device="cpu")
        )
        frequencies = torch.stack([rope_frequencies(config, is_long) for is_long in (False, True)])
        self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]

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
            ValueError: no projection is a target, or the head or the embeddings are.
        """
        groups = list(self.groups())
        sizes = update_sizes(config, [prefix + name for prefix, g in groups for name in g.names])
        generator = torch.Generator().manual_seed(seed)
        for site, (prefix, group) in enumerate(groups):
            own = {name: sizes[prefix + name] for name in group.names if prefix + name in sizes}
            group.attach(own, config.lora_dropout, self.device, generator, site)

    def make_tables(self) -> None:
        """Make what the kernels of every pass look up on the device, before the first pass."""
        for _, group in self.groups():
            group.make_tables(self.compute_dtype)

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

    def frozen_tensors(self) -> Iterator[Tensor]:
        """What a model holds on its device that does not train."""
        yield from (parameter for parameter in self.parameters() if not parameter.requires_grad)
        yield from self.buffers()
        for _, group in self.groups():
            yield from group.frozen_tensors()

    def num_parameters(self) -> tuple[int, int]:
        """Count the trainable and all parameters, a shared head once and a 4-bit weight as one."""
        # the parameters may have room for more
        trainable = sum(tensor.numel() for tensor in self.adapter_tensors().values())
        frozen = sum(p.numel() for p in self.parameters() if not p.requires_grad)
        return trainable, trainable + frozen + sum(group.num_frozen for _, group in self.groups())

    def describe_trainable_parameters(self) -> str:
        """Say how many parameters train, in the words of PEFT's print_trainable_parameters."""
        trainable, total = self.num_parameters()
        return (
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def embed(self, input_ids: Tensor) -> Tensor:  # (B, T) on the device -> (B T, D)
        """Look up the tokens' embeddings."""
        embedded = self.model.embed_tokens(input_ids).to(self.compute_dtype).flatten(0, 1)
        return embedded if self.embedding_scale == 1 else embedded * self.embedding_scale

    def shared(
        self,
        input_ids: Tensor,  # (B, T) on the device
        num_past: int = 0,  # tokens before them
        dropout_seed: Tensor | None = None,
        samples: Samples | None = None,  # where rows hold several
    ) -> Shared:
        """Compute what all layers of one pass over these tokens share.

        Raises:
            ValueError: the rows hold several samples and are so long that the model's frequencies
                depend on how long each of them is.
        """
        rows = torch.arange(input_ids.shape[1], device=input_ids.device)
        scaling = self.config.rope_scaling
        factor = scaling.attention_factor if isinstance(scaling, LongRopeScaling) else 1.0
        is_long = self.starts_anew(0, num_past + input_ids.shape[1])
        if is_long and samples is not None:
            assert isinstance(scaling, LongRopeScaling)
            raise ValueError(
                "rows of several samples must not be longer than this model's frequencies are for, "
                f"{scaling.original_max_position_embeddings:,} tokens: got {input_ids.shape[1]:,}; "
                "lower --max-length or use --no-packing"
            )
        cos, sin = rope_tables(self.frequencies[int(is_long)], rows + num_past, factor)
        positions = rows.expand_as(input_ids) if samples is None else samples.positions.long()
        return Shared(positions, cos, sin, dropout_seed, samples)

    def starts_anew(self, num_tokens: int, num_more: int) -> bool:
        """Whether a sequence that grows from one length to another has other frequencies then."""
        scaling = self.config.rope_scaling
        return (
            isinstance(scaling, LongRopeScaling)
            and num_tokens <= scaling.original_max_position_embeddings < num_more
        )

    @torch.no_grad()
    def hidden_states(
        self,
        input_ids: Tensor,
        cache: KeyValueCache | None = None,
        samples: Samples | None = None,
        out: Tensor | None = None,  # (B T, D)
    ) -> Tensor:
        """Run the decoder: token ids (B, T) to normalized hidden states (B, T, D).

        Attention is causal, so padding on the right changes no real token. With a cache the ids
        continue what it holds: any number of tokens into an empty one, one token at a time from
        then on. Without dropout, whatever mode the model is in.

        Args:
            samples: where rows hold several; not with a cache.

        Raises:
            ValueError: several tokens are given to a cache that is not empty, or the sequence
                outgrows the frequencies that the cache was computed with.
        """
        past = cache.num_tokens if cache else 0
        if past and self.starts_anew(past, past + input_ids.shape[1]):
            raise ValueError(f"a cache of this model starts anew beyond {past} tokens")
        if past and input_ids.shape[1] > 1:
            raise ValueError(
                f"a cache continues one token at a time: got {input_ids.shape[1]} tokens"
            )
        assert cache is None or samples is None
        shared = self.shared(input_ids, past, samples=samples)
        x, delta = self.embed(input_ids), None
        for layer in self.layers:
            x, delta, _ = layer(x, delta, shared, cache)
        y, _, _ = self.model.norm(x, delta, out=out)
        return y.unflatten(0, tuple(input_ids.shape))

    @torch.no_grad()
    def logits(self, input_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Compute next-token logits, (B, T, V) float32; for generation and small batches only."""
        return self.project(self.hidden_states(input_ids, cache))

    @torch.no_grad()
    def project(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., V) float32
        """Compute the logits of normalized hidden states."""
        logits = (hidden @ self.head.T).float()
        cap = self.config.final_logit_softcapping
        return logits if cap is None else softcap_reference(logits, cap)

    @torch.no_grad()
    def loss(
        self,
        input_ids: Tensor,  # (B, T) int64, on the CPU
        labels: Tensor,  # (B, T) int64, on the CPU, -100 where nothing is to be predicted
        positions: Tensor | None = None,  # (B, T) int64, on the CPU
    ) -> Tensor:  # () float32
        """Sum the cross-entropy of every label given the tokens before it.

            loss = - sum_(b, t) log p(labels[b, t] | input_ids[b, :t])

        over t > 0 with labels[b, t] != -100. No gradient, no dropout: `step.micro_step` trains.

        Args:
            positions: of the tokens in their samples, where rows hold several; each begins with a
                token at position 0, which has no label.
        """
        rows, targets = target_rows(labels)
        samples = None
        if positions is not None:
            places = (place.to(self.device) for place in samples_of(positions))
            samples = Samples(*places)
        ids = input_ids.to(self.device, non_blocking=True)
        hidden = self.hidden_states(ids, samples=samples).flatten(0, 1)
        picked = hidden[rows.to(self.device, non_blocking=True)]
        targets = targets.to(self.device, non_blocking=True)
        cap = self.config.final_logit_softcapping
        return linear_cross_entropy(picked, self.head, targets, cap)


def samples_of(positions: Tensor) -> Samples:  # (B, T) int64
    """Tell from every token's position in its sample how many of it remain.

    A sample begins where positions start again.
    """
    T = positions.shape[1]
    starts = torch.where(positions == 0, torch.arange(T, device=positions.device), T)
    # the first start behind each token
    behind = F.pad(starts, (0, 1), value=T)[:, 1:].flip(1).cummin(dim=1).values.flip(1)
    remaining = behind - 1 - torch.arange(T, device=positions.device)
    return Samples(positions.int(), remaining.int())


def target_rows(labels: Tensor) -> tuple[Tensor, Tensor]:  # (B, T) on the CPU
    """Find the rows of (B T, D) hidden states that have something to predict, and what.

    Labels stay on the CPU until then, so the device is never waited for.
    """
    next_labels = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
    rows = (next_labels != -100).nonzero().squeeze(1)
    return rows, next_labels[rows]
