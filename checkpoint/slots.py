"""Where each tensor of a checkpoint goes in a model, by the checkpoint's name for it."""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from checkpoint.shard_reader import FLOATS
from llama.config import LlamaConfig
from llama.model import Llama
from lora.frozen_group import FrozenGroup
from nf4.serialized import WeightState, stored_buffers
from nf4.weight import empty_weight

META = torch.device("meta")
HEAD = "lm_head.weight"


def embeddings_name(config: LlamaConfig) -> str:
    return f"{config.decoder}.embed_tokens.weight"


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint's tensor goes in a model, and the shape that it must have.

    Attributes:
        dtypes: the dtypes that the tensor may be stored as.
        home: finds, or makes, the memory that holds the tensor's own bytes; None where the tensor
            is quantized, or laid out otherwise.
        place: brings a tensor without home where it belongs, and returns numbers that tell whether
            it is finite.
        settle: turns a tensor that was read into its home into the one that is kept.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    home: Callable[[torch.dtype, torch.device], Tensor | None]
    place: Callable[[Tensor], Tensor]
    settle: Callable[[Tensor], Tensor] = lambda tensor: tensor


def slots_of(
    model: Llama, stored: Container[str], states: Mapping[str, WeightState]
) -> dict[str, Slot]:
    """Find the slot of every tensor that a model needs.

    Args:
        stored: the names in the files: tied embeddings may be stored as the head alone.
        states: what describes the weights that are stored in NF4.
    """
    slots: dict[str, Slot] = {}
    floats = tuple(FLOATS.values())

    def add_parameter(name: str, shape: tuple[int, ...]) -> None:
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)

        def home(dtype: torch.dtype, device: torch.device) -> Tensor:
            weight = torch.empty(shape, dtype=dtype, device=device)
            setattr(owner, attribute, nn.Parameter(weight, requires_grad=False))
            return weight

        def settle(tensor: Tensor) -> Tensor:
            dtype = kept_dtype(model.config, name, tensor.dtype, model.compute_dtype)
            return tensor if dtype == tensor.dtype else home(dtype, tensor.device).copy_(tensor)

        slots[name] = Slot(shape, floats, home, _never, settle)

    def add_member(prefix: str, group: FrozenGroup, member: str, shape: tuple[int, ...]) -> None:
        name = prefix + member

        def stack_of(tensor: Tensor) -> Iterable[Tensor]:
            return (tensor,) if group.num_stacked is None else tensor

        slots[name] = Slot(
            shape,
            floats,
            lambda dtype, device: group.home(member),
            lambda tensor: group.place(member, stack_of(tensor), name),
        )

    def add_stored(name: str, suffix: str, like: Tensor, group: FrozenGroup, member: str) -> None:
        def home(dtype: torch.dtype, device: torch.device) -> Tensor:
            return stored_buffers(group.member(member))[suffix]

        slots[name + suffix] = Slot(tuple(like.shape), (like.dtype,), home, _never)

    for name, parameter in model.named_parameters():
        add_parameter(name, tuple(parameter.shape))
    for prefix, group in model.frozen_groups():
        for name, shape in group.shapes().items():
            if (state := states.get(f"{prefix}{name}.weight")) is None:
                add_member(prefix, group, f"{name}.weight", shape)
            else:
                alone = empty_weight(shape[:1], group.in_features, *state.quantization, META)
                for suffix, like in stored_buffers(alone).items():
                    add_stored(f"{prefix}{name}.weight", suffix, like, group, name)
        for name, shape in group.bias_shapes().items():
            add_member(prefix, group, f"{name}.bias", shape)
    embeddings = embeddings_name(model.config)
    if model.config.tie_word_embeddings and HEAD in stored and embeddings not in stored:
        slots[HEAD] = slots.pop(embeddings)
    return slots


def _never(tensor: Tensor) -> Tensor:
    raise AssertionError("embeddings, norms and what is quantized already are not quantized")


def kept_dtype(
    config: LlamaConfig, name: str, stored: torch.dtype, compute: torch.dtype
) -> torch.dtype:
    """Find the dtype in which one of a model's parameters is kept.

    The head is kept in the compute dtype, to which every loss would convert it again. So are
    embeddings that are the head too, or that become smaller by it: rounding a row before it is
    looked up gives the same numbers as rounding it afterwards.
    """
    is_embeddings = name == embeddings_name(config)
    if name == HEAD or (is_embeddings and config.tie_word_embeddings):
        return compute
    return compute if is_embeddings and compute.itemsize < stored.itemsize else stored
