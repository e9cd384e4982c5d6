"""The tensors of a GGUF file: a checkpoint's, each under llama.cpp's name and in its layout.

    q, k of Llama     rows of a head interleaved: of both halves in turn, as llama.cpp rotates them
    norms of Gemma    with the 1 that the checkpoint leaves out
    rotary factors    of Llama 3.1 and LongRoPE: tensors, where config.json has numbers

Matrices are rounded to the file's type. Norms and biases stay in float32, and so does what has one
dimension only. A matrix whose rows are no whole blocks of q8_0 is stored in f16.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from checkpoint.opening import Checkpoint
from checkpoint.shard_reader import read_tensor
from checkpoint.slots import HEAD, embeddings_name
from export.gguf_architecture import Architecture, rope_of
from llama.config import LlamaConfig
from llama.rope import rope_frequencies
from llama.rope_scaling import Llama3RopeScaling, LongRopeScaling


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor on its way into a GGUF file.

    Attributes:
        name: the checkpoint's, or llama.cpp's where the checkpoint has no such tensor.
        read: reads or computes the values, in float32.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def tensors_of(checkpoint: Checkpoint, architecture: Architecture) -> Iterator[ExportedTensor]:
    """List the tensors of a checkpoint's GGUF file, and read none.

    A head that is tied to the embeddings is left out: llama.cpp takes the embeddings for it.
    """
    config = checkpoint.config
    for stored in checkpoint.needed():
        name = stored.name
        if name == HEAD and config.tie_word_embeddings:
            # tied embeddings may be stored as the head alone
            name = embeddings_name(config)
        # a tower is a model of its own in GGUF
        name = name.replace(f"{config.decoder}.", "model.", 1)

        def read(stored=stored, name=name) -> Tensor:
            return _in_layout(name, read_tensor(stored).float(), config, architecture)

        yield ExportedTensor(name, stored.shape, read)
    for name, factors in _rope_factors(config).items():
        yield ExportedTensor(name, tuple(factors.shape), lambda factors=factors: factors)


def _in_layout(
    name: str, values: Tensor, config: LlamaConfig, architecture: Architecture
) -> Tensor:
    if name.endswith("norm.weight"):
        return values + config.norm_offset
    member = name.split(".")[-2]
    if architecture.is_interleaved and member in ("q_proj", "k_proj"):
        return interleaved(values, values.shape[0] // config.head_dim)
    return values


def interleaved(rows: Tensor, num_heads: int) -> Tensor:  # (num_heads * head_dim, ...)
    """Reorder the rows of each head: 0, half, 1, half + 1, ..."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _rope_factors(config: LlamaConfig) -> dict[str, Tensor]:
    """What llama.cpp divides rotary frequencies by, where it depends on the dimension."""
    rope = rope_of(config)
    scaling = rope.scaling
    if isinstance(scaling, Llama3RopeScaling):
        plain = rope_frequencies(replace(rope, scaling=None), config.rotary_dim)
        return {"rope_freqs.weight": plain / rope_frequencies(rope, config.rotary_dim)}
    if isinstance(scaling, LongRopeScaling):
        return {
            "rope_factors_long.weight": torch.tensor(scaling.long_factor),
            "rope_factors_short.weight": torch.tensor(scaling.short_factor),
        }
    return {}
