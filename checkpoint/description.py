"""What a checkpoint is, without a weight read: its model, and where each of its tensors goes.

Shapes and dtypes that contradict config.json are found from the headers. So are tensors that are
missing, and tensors that nobody knows.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint.files import INDEX_NAME, SINGLE_NAME, first_few, stored_tensors
from checkpoint.shard_reader import FLOATS, StoredTensor, read_tensor
from checkpoint.stored_nf4 import (
    StoredNF4,
    as_bytes,
    check_stored_nf4,
    describe_quantization,
    leftover_format,
    read_stored_nf4,
)
from llama.config import CONFIG_NAME, read_config
from llama.model import Llama
from lora.linear_group import LinearGroup
from nf4.serialized import WeightState, stored_buffers
from nf4.weight import Quantization, empty_weight

META = torch.device("meta")
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# parts of the names of tensors that the text model does not need: rotary frequencies and their
# cosines, which follow from config.json, and what sees or hears in front of the embeddings
_BESIDE_THE_MODEL = frozenset(
    {
        "audio_tower",
        "image_newline",
        "mm_projector",
        "multi_modal_projector",
        "rotary_emb",
        "vision_embed_tokens",
        "vision_model",
        "vision_tower",
        "visual",
    }
)


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint tensor goes, and the shape it must have.

    Attributes:
        dtypes: it may be stored as.
        home: finds, or makes, what holds the tensor's own bytes; None where it is quantized.
        quantize: takes a tensor without home, and returns scales that tell whether it is finite.
        settle: takes what has come home as bytes, and returns what is kept of it.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    home: Callable[[torch.dtype, torch.device], Tensor | None]
    quantize: Callable[[Tensor], Tensor]
    settle: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Description:
    """What is known of a checkpoint from its headers, checked.

    Attributes:
        model: without tensors.
        slots: where its tensors go.
        stored: what the files hold.
        nf4: what of it is in NF4.
        left_alone: names of tensors that the model does not need.
        leftover: what a quantization_config asks for that the weights are no more quantized with.
    """

    folder: Path
    model: Llama
    slots: dict[str, Slot]
    stored: dict[str, StoredTensor]
    nf4: StoredNF4
    left_alone: frozenset[str]
    leftover: str

    @property
    def embeddings(self) -> StoredTensor:
        """What holds the embeddings: of tied ones it may be the head alone."""
        return self.stored[EMBEDDINGS if EMBEDDINGS in self.stored else HEAD]

    @property
    def remarks(self) -> list[str]:
        """Lines about what the folder has and the model does not take."""
        lines = []
        if (self.folder / SINGLE_NAME).is_file() and (self.folder / INDEX_NAME).is_file():
            lines.append(
                f"{self.folder} has both {SINGLE_NAME} and {INDEX_NAME}: the first is read, as "
                "transformers does"
            )
        if self.left_alone:
            lines.append(
                f"{self.folder} has tensors that the model does not need; left alone: "
                f"{first_few(self.left_alone)}"
            )
        if self.leftover:
            lines.append(
                f"{self.folder / CONFIG_NAME} has a quantization_config ({self.leftover}), and no "
                "weight is quantized: it is left over from another form, and ignored"
            )
        return lines

    def quantization(
        self, prefix: str, group: LinearGroup, wanted: Quantization | None
    ) -> Quantization | None:
        """Of a group's weight once it is loaded: as stored where anything is in NF4 already."""
        if not self.nf4.states:
            return wanted
        state = self.nf4.states.get(f"{prefix}{group.names[0]}.weight")
        return state.quantization if state else None

    def needed(self) -> list[StoredTensor]:
        """List the tensors that a model is loaded from, in the files' order: each is read front to
        back."""
        return [tensor for name, tensor in self.stored.items() if name in self.slots]

    def vocabulary(self) -> dict[str, StoredTensor]:
        """Find embeddings and head; where one is stored for both, it is both."""
        return {name: self.stored.get(name, self.embeddings) for name in (EMBEDDINGS, HEAD)}

    def vocabulary_tensors(self) -> dict[str, Tensor]:
        """Read embeddings and head as they are stored."""
        return {name: read_tensor(stored) for name, stored in self.vocabulary().items()}

    def check_tied_head(self) -> None:
        """Refuse a head that config.json ties to the embeddings, and that differs from them as they
        are stored.

        Raises:
            ValueError: it does.
        """
        if not self.model.config.tie_word_embeddings or HEAD not in self.left_alone:
            return
        values = self.vocabulary_tensors()
        if not torch.equal(values[HEAD].to(values[EMBEDDINGS]), values[EMBEDDINGS]):
            raise ValueError(
                f"{self.folder}: config.json ties the head to the embeddings, so {HEAD} must "
                f"equal {EMBEDDINGS}: they differ; set tie_word_embeddings to false"
            )


def describe(folder: Path, compute_dtype: torch.dtype) -> Description:
    """Find out what a checkpoint is, without reading a weight.

    Raises:
        FileNotFoundError: config.json, an index or a shard is missing.
        ValueError: the files contradict each other or config.json, or are in another format.
    """
    config = read_config(folder)
    with META:
        model = Llama(config, compute_dtype)
    stored = stored_tensors(folder)
    nf4 = read_stored_nf4(folder, stored)
    check_stored_nf4(folder, model, nf4)
    stored |= {name: as_bytes(stored[name]) for name in nf4.states if name in stored}
    slots = _slots(model, nf4.states)
    is_tied = config.tie_word_embeddings
    if is_tied and HEAD in stored and EMBEDDINGS not in stored:
        slots[HEAD] = slots.pop(EMBEDDINGS)
    others = stored.keys() - slots.keys()
    left_alone = frozenset(name for name in others if _is_left_alone(name, is_tied))
    taken = {name: tensor for name, tensor in stored.items() if name not in left_alone}
    leftover = leftover_format(folder, taken, slots.keys(), nf4)
    _check(folder, stored, slots, nf4.read | left_alone, is_tied)
    return Description(folder, model, slots, stored, nf4, left_alone, leftover)


def stored_quantization(folder: Path) -> Quantization | None:
    """Find how a checkpoint's weights are quantized that are in NF4 already; None: they are not.

    Raises:
        FileNotFoundError: config.json, an index or a shard is missing.
        ValueError: the files contradict each other or config.json, or are in another format.
    """
    return describe(folder, torch.float32).nf4.quantization


def settle_quantization(
    folder: Path, asked: Quantization | None, default: Quantization
) -> Quantization | None:
    """Settle the quantization to load a checkpoint with: the stored one where there is one, else
    what is asked for.

    Args:
        default: what counts as not asked for.

    Raises:
        FileNotFoundError: config.json, an index or a shard is missing.
        ValueError: something else is asked for than what is stored, or the files contradict each
            other or config.json, or are in another format.
    """
    stored = stored_quantization(folder)
    if stored is None:
        return asked
    if asked is None or any(
        value not in choices for value, *choices in zip(asked, stored, default, strict=True)
    ):
        raise ValueError(
            "--quant, --block-size and --double-quant must be those of a checkpoint that is in NF4 "
            f"already: {folder} has {describe_quantization(stored)}, the flags say "
            f"{describe_quantization(asked)}; leave them out, or give the checkpoint that it was "
            "made from"
        )
    return stored


def describe_loading(folder: Path, compute_dtype: torch.dtype) -> list[str]:
    """Say in lines what of a checkpoint is not taken as it is stored, or not at all.

    Raises:
        FileNotFoundError: config.json, an index or a shard is missing.
        ValueError: the files contradict each other or config.json, or are in another format.
    """
    found = describe(folder, compute_dtype)
    converted = {"embeddings": (EMBEDDINGS, found.embeddings)}
    if not found.model.config.tie_word_embeddings:
        converted["head"] = (HEAD, found.stored[HEAD])
    lines = found.remarks
    for what, (name, tensor) in converted.items():
        kept = kept_dtype(found.model, name, tensor.dtype)
        if kept != tensor.dtype:
            lines.append(f"{what}: stored in {tensor.dtype}, kept in {kept}, the compute dtype")
    return lines


def _slots(model: Llama, states: Mapping[str, WeightState]) -> dict[str, Slot]:
    """Every tensor the model needs, by the checkpoint's name for it.

    Args:
        states: of the weights that are in NF4 already.
    """
    slots: dict[str, Slot] = {}
    floats = tuple(FLOATS.values())

    def add_parameter(name: str, shape: tuple[int, ...]) -> None:
        owner = model.get_submodule(name.rpartition(".")[0])

        def home(dtype: torch.dtype, device: torch.device) -> Tensor:
            weight = torch.empty(shape, dtype=dtype, device=device)
            owner.weight = nn.Parameter(weight, requires_grad=False)
            return weight

        def settle(tensor: Tensor) -> Tensor:
            dtype = kept_dtype(model, name, tensor.dtype)
            return tensor if dtype == tensor.dtype else home(dtype, tensor.device).copy_(tensor)

        slots[name] = Slot(shape, floats, home, _never, settle)

    def add_member(prefix: str, group: LinearGroup, member: str, shape: tuple[int, ...]) -> None:
        name = prefix + member
        slots[name] = Slot(
            shape,
            floats,
            lambda dtype, device: group.home(member),
            lambda tensor: group.quantize(member, tensor, name),
        )

    def add_stored(name: str, suffix: str, like: Tensor, group: LinearGroup, member: str) -> None:
        def home(dtype: torch.dtype, device: torch.device) -> Tensor:
            return stored_buffers(group.member(member))[suffix]

        slots[name + suffix] = Slot(tuple(like.shape), (like.dtype,), home, _never)

    for name, parameter in model.named_parameters():
        add_parameter(name, tuple(parameter.shape))
    for prefix, group in model.groups():
        for name, rows in zip(group.names, group.rows, strict=True):
            shape = (rows, group.in_features)
            if (state := states.get(f"{prefix}{name}.weight")) is None:
                add_member(prefix, group, f"{name}.weight", shape)
            else:
                alone = empty_weight((rows,), group.in_features, *state.quantization, META)
                for suffix, like in stored_buffers(alone).items():
                    add_stored(f"{prefix}{name}.weight", suffix, like, group, name)
            if group.has_bias:
                add_member(prefix, group, f"{name}.bias", (rows,))
    return slots


def _never(tensor: Tensor) -> Tensor:
    raise AssertionError("embeddings, norms and what is quantized already are not quantized")


def kept_dtype(model: Llama, name: str, stored: torch.dtype) -> torch.dtype:
    """Find the dtype in which one of a model's parameters is kept.

    That of the head is the compute dtype, to which every loss would convert it again; embeddings
    have it too where they are the head, or become smaller. A row that is looked up is rounded as it
    would be behind the look-up.
    """
    compute = model.compute_dtype
    if name == HEAD or (name == EMBEDDINGS and model.config.tie_word_embeddings):
        return compute
    return compute if name == EMBEDDINGS and compute.itemsize < stored.itemsize else stored


def _is_left_alone(name: str, is_tied: bool) -> bool:
    """Whether a checkpoint may hold a tensor that the model does not need."""
    return not _BESIDE_THE_MODEL.isdisjoint(name.split(".")) or (is_tied and name == HEAD)


def _check(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    slots: Mapping[str, Slot],
    known: Set[str],
    is_tied: bool,
) -> None:
    """Hold what the files contain against what config.json implies.

    Args:
        known: tensors that are read already, or left alone.
    """
    extra = stored.keys() - slots.keys() - known
    missing = slots.keys() - stored.keys()
    if missing or extra:
        raise ValueError(
            f"{folder} must hold exactly the tensors that config.json implies: "
            f"missing are {first_few(missing)}; unknown are {first_few(extra)}"
        )
    shapes = {name: slot.shape for name, slot in slots.items()}
    if is_tied and HEAD in known:
        shapes[HEAD] = shapes[EMBEDDINGS]
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{stored[name].file}: {name} must have shape {shape} by config.json: "
                f"got {stored[name].shape}"
            )
    for name, slot in slots.items():
        if stored[name].dtype not in slot.dtypes:
            raise ValueError(
                f"{stored[name].file}: {name} must be stored as "
                f"{' or '.join(map(str, slot.dtypes))}: got {stored[name].dtype}"
            )
