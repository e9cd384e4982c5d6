"""Where each tensor of a checkpoint goes in a model, by the checkpoint's name for it."""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from checkpoint.shard_reader import FLOATS
from llama.config import LlamaConfig
from llama.model import Llama
from lora.frozen_group import FrozenGroup
from nf4.mxfp4 import BLOCK, BLOCKS, SCALES, expand
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
        stored: the names in the files: tied embeddings may be stored as the head alone, and weights
            in MXFP4 as blocks and scales.
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

    def add_mxfp4(prefix: str, group: FrozenGroup, member: str) -> None:
        name = prefix + member
        shapes = mxfp4_shapes(group, member.removesuffix(".weight"))
        scales: list[Tensor] = []

        def take_scales(tensor: Tensor) -> Tensor:
            # the memory that it lies in is the next tensor's
            scales.append(tensor.clone())
            return torch.zeros(1, device=tensor.device)

        def place_blocks(tensor: Tensor) -> Tensor:
            experts = zip(tensor, scales.pop(), strict=True)
            return group.place(member, (expand(*each).mT for each in experts), name)

        for suffix, place in ((SCALES, take_scales), (BLOCKS, place_blocks)):
            slots[name + suffix] = Slot(shapes[suffix], (torch.uint8,), _no_home, place)

    def add_stored(name: str, suffix: str, like: Tensor, group: FrozenGroup, member: str) -> None:
        def home(dtype: torch.dtype, device: torch.device) -> Tensor:
            return stored_buffers(group.member(member))[suffix]

        slots[name + suffix] = Slot(tuple(like.shape), (like.dtype,), home, _never)

    for name, parameter in model.named_parameters():
        add_parameter(name, tuple(parameter.shape))
    for prefix, group in model.frozen_groups():
        for name, shape in group.shapes().items():
            if f"{prefix}{name}.weight{BLOCKS}" in stored:
                add_mxfp4(prefix, group, f"{name}.weight")
            elif (state := states.get(f"{prefix}{name}.weight")) is None:
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


def mxfp4_shapes(group: FrozenGroup, member: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that stand for a stack of matrices in MXFP4, by their suffixes.

    The rows of a matrix, gate's and up's in turn, lie by rows there, where those in 16 bits lie by
    columns.
    """
    count, columns, rows = group.shapes()[member]
    num_blocks = columns // BLOCK
    return {
        SCALES: (count, rows, num_blocks),
        BLOCKS: (count, rows, num_blocks, BLOCK // 2),
    }


def _no_home(dtype: torch.dtype, device: torch.device) -> None:
    """There is no memory of a checkpoint's own bytes."""


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
