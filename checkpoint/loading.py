"""From a checkpoint folder to a ready model, one tensor at a time.

    on a GPU, three things at once:
    threads    | read 2         | read 3 ...       shard -> pinned ring (checkpoint/shard_reader.py)
    copies     | copy 1         | copy 2 ...       ring -> staging, or home if it is kept as it is
    kernels    | quantize 0     | quantize 1 ...   staging -> its group's buffer

    on the CPU: shard -> home, or memory of its own -> quantized -> its group's buffer

    what is NF4 in the file already is kept as it is: its codes and scales go home

So the peak is the packed model plus one tensor on the CPU and two on a GPU, where a tensor is the
largest that is quantized here, in the checkpoint's dtype; and the quantizer's bounded temporaries.
Embeddings, norms and what else is kept as it is go to their home directly. A GPU's load also holds
128 MiB of pinned host memory.

Everything that can be wrong with the files' structure (missing, truncated, renamed, pointing
elsewhere, shapes that contradict config.json) is found from the headers, before the first weight is
read. NaN and infinity are found as each tensor arrives; a GPU takes note of them and is asked once,
at the end. Pickled weights are never read.

A folder may hold two checkpoints: one file, and an index with shards that another save has left.
The one file is read, as transformers does (`_get_resolved_checkpoint_files` in modeling_utils.py),
and a line says so.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from checkpoint.shard_reader import (
    FLOATS,
    StoredTensor,
    make_ring,
    read_header,
    read_tensor,
    stream,
)
from checkpoint.stored_nf4 import (
    StoredNF4,
    as_bytes,
    check_stored_nf4,
    describe_quantization,
    leftover_format,
    read_stored_nf4,
)
from foreign.json_text import read_object
from hub.fetch import find_folder
from llama.config import CONFIG_NAME, GENERATION_CONFIG_NAME, read_config
from llama.model import Llama
from lora.linear_group import LinearGroup
from nf4.serialized import WeightState, restore_state, stored_buffers
from nf4.weight import Quantization, empty_weight, non_finite_weights

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# beside config.json and the weights, as patterns
COMPANIONS = (
    GENERATION_CONFIG_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth")
META, CPU = torch.device("meta"), torch.device("cpu")
EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
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


Report = Callable[[int, int], None]


@dataclass(frozen=True)
class _Slot:
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


def find_checkpoint(model: str) -> Path:
    """Find the folder of a checkpoint: a local path, or a hub id whose files are fetched as far as
    needed.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `hub.fetch.find_folder`.
        ValueError: the repository has no weights in safetensors.
    """
    return find_folder(model, "--model", "model", partial(_needed_files, model))


def _needed_files(model: str, names: Collection[str], get: Callable[[str], Path]) -> set[str]:
    """Choose from a repository's files those that a checkpoint is read from."""
    patterns = (CONFIG_NAME, *COMPANIONS)
    needed = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if SINGLE_NAME in names:
        return needed | {SINGLE_NAME}
    if INDEX_NAME in names:
        return needed | {INDEX_NAME, *_read_index(get(INDEX_NAME)).values()}
    raise ValueError(
        f"--model must have {SINGLE_NAME} or {INDEX_NAME}: {model} has "
        f"{_some(names)}{_about_pickled(names)}"
    )


def _about_pickled(names: Iterable[str]) -> str:
    pickled = sorted(name for name in names if name.endswith(_PICKLED_SUFFIXES))
    if not pickled:
        return ""
    return f"; {pickled[0]} is pickled, which is never read: save the model as safetensors"


def _read_index(index: Path) -> dict[str, str]:
    """Read which file of its folder an index gives for each tensor."""
    places = read_object(index, "download it again").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} must have a weight_map of tensor names to file names")
    for file in places.values():
        if Path(file).name != file or file == ".." or "\0" in file:
            raise ValueError(f"{index} must name files of its own folder only: got {file!r}")
    return places


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The checkpoint's files, each with the tensors that the index places there (None: no
    index).

    A file may be a symbolic link: the hub's cache keeps its blobs outside the folder.
    """
    if (folder / SINGLE_NAME).is_file():
        return {folder / SINGLE_NAME: None}
    index = folder / INDEX_NAME
    present = sorted(path.name for path in folder.iterdir())
    if not index.is_file():
        advice = _about_pickled(present) or "; download the checkpoint again or restore the name"
        raise FileNotFoundError(
            f"a checkpoint folder must hold {SINGLE_NAME} or {INDEX_NAME}: "
            f"{folder} has {', '.join(present[:20])}{advice}"
        )
    places = _read_index(index)
    shards: dict[Path, set[str] | None] = {}
    for file in sorted(set(places.values())):
        if not (folder / file).is_file():
            candidates = [name for name in present if name.endswith(".safetensors")]
            nearest = difflib.get_close_matches(file, candidates, n=2)
            raise FileNotFoundError(
                f"{index} names the shard {file}, which must be in {folder}: it is missing; "
                f"nearest there: {', '.join(nearest) or 'none'}; "
                "download it again or restore its name"
            )
        shards[folder / file] = {name for name, place in places.items() if place == file}
    return shards


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint from the files' headers, in the files' order."""
    stored: dict[str, StoredTensor] = {}
    for path, indexed in sorted(_shards(folder).items()):
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} must be a complete safetensors file: {error}; "
                "it is truncated or damaged, download it again"
            ) from None
        if indexed is not None and names != indexed:
            differing = sorted(names ^ indexed)
            raise ValueError(
                f"{path} must hold exactly the tensors that {INDEX_NAME} places there: "
                f"{len(differing)} differ, the first is {differing[0]}; download the folder again"
            )
        stored |= {tensor.name: tensor for tensor in read_header(path)}
    return stored


def _non_finite_values(name: str) -> ValueError:
    return ValueError(f"{name} must hold finite values only: got NaN or infinity")


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is kept as it is and holds a NaN or an infinity.

    Raises:
        ValueError: it does.
    """
    # two numbers, where isfinite() would make a temporary as large as the embeddings
    if not bool(torch.stack(tensor.aminmax()).isfinite().all()):
        raise _non_finite_values(name)


def _never(tensor: Tensor) -> Tensor:
    raise AssertionError("embeddings, norms and what is quantized already are not quantized")


def _slots(model: Llama, states: Mapping[str, WeightState]) -> dict[str, _Slot]:
    """Every tensor the model needs, by the checkpoint's name for it.

    Args:
        states: of the weights that are in NF4 already.
    """
    slots: dict[str, _Slot] = {}
    floats = tuple(FLOATS.values())

    def add_parameter(name: str, shape: tuple[int, ...]) -> None:
        owner = model.get_submodule(name.rpartition(".")[0])

        def home(dtype: torch.dtype, device: torch.device) -> Tensor:
            weight = torch.empty(shape, dtype=dtype, device=device)
            owner.weight = nn.Parameter(weight, requires_grad=False)
            return weight

        def settle(tensor: Tensor) -> Tensor:
            dtype = _kept_dtype(model, name, tensor.dtype)
            return tensor if dtype == tensor.dtype else home(dtype, tensor.device).copy_(tensor)

        slots[name] = _Slot(shape, floats, home, _never, settle)

    def add_member(prefix: str, group: LinearGroup, member: str, shape: tuple[int, ...]) -> None:
        name = prefix + member
        slots[name] = _Slot(
            shape,
            floats,
            lambda dtype, device: group.home(member),
            lambda tensor: group.quantize(member, tensor, name),
        )

    def add_stored(name: str, suffix: str, like: Tensor, group: LinearGroup, member: str) -> None:
        def home(dtype: torch.dtype, device: torch.device) -> Tensor:
            return stored_buffers(group.member(member))[suffix]

        slots[name + suffix] = _Slot(tuple(like.shape), (like.dtype,), home, _never)

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


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more


def _is_left_alone(name: str, is_tied: bool) -> bool:
    """Whether a checkpoint may hold a tensor that the model does not need."""
    return not _BESIDE_THE_MODEL.isdisjoint(name.split(".")) or (is_tied and name == _HEAD)


def _check(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    slots: Mapping[str, _Slot],
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
            f"missing are {_some(missing)}; unknown are {_some(extra)}"
        )
    shapes = {name: slot.shape for name, slot in slots.items()}
    if is_tied and _HEAD in known:
        shapes[_HEAD] = shapes[EMBEDDINGS]
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


def _shared_dtype(
    folder: Path, stored: dict[str, StoredTensor], names: Iterable[str]
) -> torch.dtype:
    """The one dtype of tensors that share a buffer."""
    names = list(names)
    dtypes = {stored[name].dtype for name in names}
    if len(dtypes) > 1:
        raise ValueError(
            f"{folder}: {', '.join(names)} must share a dtype: "
            f"got {', '.join(sorted(str(dtype) for dtype in dtypes))}"
        )
    return dtypes.pop()


def _load_on_cpu(wanted: list[StoredTensor], slots: dict[str, _Slot], report: Report) -> None:
    """Read one tensor after the other to its home, or quantize it."""
    for done, stored in enumerate(wanted, start=1):
        slot = slots[stored.name]
        home = slot.home(stored.dtype, CPU)
        if home is None:
            matrix = read_tensor(stored)
            if not bool(slot.quantize(matrix).isfinite().all()):
                raise non_finite_weights(matrix, stored.name)
            # gone before the next one is read
            del matrix
        else:
            read_tensor(stored, home)
            check_finite(stored.name, home)
            slot.settle(home)
        report(done, len(wanted))


class _Staging:
    """Device memory for a tensor that is to be quantized."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        # when the last tensor in it had been quantized
        self.vacated = torch.cuda.Event()


class _DeviceSink:
    """Copies tensors to a GPU on a stream of its own; the current stream quantizes what is whole.

    Attributes:
        homes: what holds each tensor's own bytes; None for one that is quantized.
        extremes: of each tensor or its scales, the least and the largest; they are NaN where one
            value is.
    """

    def __init__(
        self,
        wanted: list[StoredTensor],
        slots: dict[str, _Slot],
        device: torch.device,
        report: Report,
    ) -> None:
        self.extremes: list[Tensor] = []
        self._slots = slots
        self._report = report
        self._num_tensors = len(wanted)
        # before the first copy, so that no copy waits for a kernel that used the memory before
        self.homes = {t.name: slots[t.name].home(t.dtype, device) for t in wanted}
        staged = [tensor.num_bytes for tensor in wanted if self.homes[tensor.name] is None]
        self._staging = [_Staging(max(staged, default=0), device) for _ in range(2)]
        self._target = torch.empty(0)
        self._target_bytes = self._target
        self._kernels = torch.cuda.current_stream(device)
        self._copies = torch.cuda.Stream(device)
        self._copies.wait_stream(self._kernels)

    def begin(self, stored: StoredTensor) -> None:
        home = self.homes[stored.name]
        if home is None:
            self._staging.reverse()
            staging = self._staging[0]
            self._copies.wait_event(staging.vacated)
            home = staging.buffer[: stored.num_bytes].view(stored.dtype).view(stored.shape)
        # copied as bytes, so a shape that is not the home's would go unnoticed
        assert (home.shape, home.dtype) == (stored.shape, stored.dtype)
        self._target, self._target_bytes = home, home.view(-1).view(torch.uint8)

    def copy(self, start: int, piece: Tensor) -> Callable[[], None]:
        with torch.cuda.stream(self._copies):
            self._target_bytes[start : start + len(piece)].copy_(piece, non_blocking=True)
        # the thread that waits sleeps: it has company, and a core may not be its own
        copied = torch.cuda.Event(blocking=True)
        copied.record(self._copies)
        return copied.synchronize

    def finish(self, stored: StoredTensor) -> None:
        self._kernels.wait_stream(self._copies)
        values = self._target
        if self.homes[stored.name] is None:
            values = self._slots[stored.name].quantize(values)
            self._staging[0].vacated.record(self._kernels)
        else:
            self.homes[stored.name] = self._slots[stored.name].settle(values)
        # two numbers, where isfinite() would make a temporary as large as the embeddings
        self.extremes.append(torch.stack(values.aminmax()).float())
        self._report(len(self.extremes), self._num_tensors)

    def settle(self) -> None:
        """Keep whatever runs next on the GPU from memory that is being copied to."""
        self._kernels.wait_stream(self._copies)


def _load_on_gpu(
    wanted: list[StoredTensor], slots: dict[str, _Slot], device: torch.device, report: Report
) -> None:
    """Load tensors through pinned memory and quantize them there.

    Note:
        Synchronizes with the device once, at the end, to look for values that are not finite.
    """
    sink = _DeviceSink(wanted, slots, device, report)
    try:
        stream(wanted, make_ring(wanted, is_pinned=True), sink)
    finally:
        sink.settle()
    is_finite = torch.stack(sink.extremes).isfinite().all(dim=1).tolist()
    for tensor, is_good in zip(wanted, is_finite, strict=True):
        if is_good:
            continue
        if sink.homes[tensor.name] is not None:
            raise _non_finite_values(tensor.name)
        raise non_finite_weights(read_tensor(tensor), tensor.name)


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
    slots: dict[str, _Slot]
    stored: dict[str, StoredTensor]
    nf4: StoredNF4
    left_alone: frozenset[str]
    leftover: str

    @property
    def embeddings(self) -> StoredTensor:
        """What holds the embeddings: of tied ones it may be the head alone."""
        return self.stored[EMBEDDINGS if EMBEDDINGS in self.stored else _HEAD]

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
                f"{_some(self.left_alone)}"
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
        return {name: self.stored.get(name, self.embeddings) for name in (EMBEDDINGS, _HEAD)}

    def vocabulary_tensors(self) -> dict[str, Tensor]:
        """Read embeddings and head as they are stored."""
        return {name: read_tensor(stored) for name, stored in self.vocabulary().items()}

    def check_tied_head(self) -> None:
        """Refuse a head that config.json ties to the embeddings, and that differs from them as they
        are stored.

        Raises:
            ValueError: it does.
        """
        if not self.model.config.tie_word_embeddings or _HEAD not in self.left_alone:
            return
        values = self.vocabulary_tensors()
        if not torch.equal(values[_HEAD].to(values[EMBEDDINGS]), values[EMBEDDINGS]):
            raise ValueError(
                f"{self.folder}: config.json ties the head to the embeddings, so {_HEAD} must "
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
    stored = _stored_tensors(folder)
    nf4 = read_stored_nf4(folder, stored)
    check_stored_nf4(folder, model, nf4)
    stored |= {name: as_bytes(stored[name]) for name in nf4.states if name in stored}
    slots = _slots(model, nf4.states)
    is_tied = config.tie_word_embeddings
    if is_tied and _HEAD in stored and EMBEDDINGS not in stored:
        slots[_HEAD] = slots.pop(EMBEDDINGS)
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


def load_sizes(
    folder: Path, compute_dtype: torch.dtype, quantization: Quantization | None
) -> Llama:
    """Make on the meta device what `load_model` makes on another: the same tensors, without values.

    Raises:
        As `load_model`, but for what only a tensor's values can tell.
    """
    found = _allocated(folder, META, compute_dtype, quantization)
    for tensor in found.needed():
        dtype = _kept_dtype(found.model, tensor.name, tensor.dtype)
        found.slots[tensor.name].home(dtype, META)
    return found.model.eval()


def load_model(
    folder: Path,
    device: torch.device,
    compute_dtype: torch.dtype,
    quantization: Quantization | None,
    report: Report = lambda done, total: None,
) -> Llama:
    """Load a checkpoint's model, frozen, with the head in the compute dtype.

    Linear groups are quantized while they load. A checkpoint that is in NF4 already is loaded as it
    is stored.

    Args:
        quantization: of the linear groups, None to keep them as stored. Of a checkpoint in NF4 the
            stored one (`settle_quantization` finds it).
        report: called as `report(done, total)` after each tensor.

    Raises:
        FileNotFoundError: config.json, an index or a shard is missing.
        ValueError: the files contradict each other or config.json, are in another format or another
            quantization than asked for, or a tensor holds a NaN or an infinity.
    """
    found = _allocated(folder, device, compute_dtype, quantization)
    model, wanted = found.model, found.needed()
    if device.type == "cpu":
        _load_on_cpu(wanted, found.slots, report)
    else:
        _load_on_gpu(wanted, found.slots, device, report)
    found.check_tied_head()
    return model.eval()


def _allocated(
    folder: Path,
    device: torch.device,
    compute_dtype: torch.dtype,
    quantization: Quantization | None,
) -> Description:
    """Describe a checkpoint, and allocate the model's groups on a device."""
    found = describe(folder, compute_dtype)
    model, stored = found.model, found.stored
    if found.nf4.quantization not in (None, quantization):
        raise ValueError(
            f"{folder} must be loaded as it is stored: it is in NF4 with "
            f"{describe_quantization(found.nf4.quantization)}, asked for is "
            f"{describe_quantization(quantization)}"
        )
    for prefix, group in model.groups():
        form = found.quantization(prefix, group, quantization)
        weights = [f"{prefix}{name}.weight" for name in group.names]
        biases = [f"{prefix}{name}.bias" for name in group.names] if group.has_bias else []
        # quantized members keep no dtype, so theirs may differ
        weight_dtype = None if form else _shared_dtype(folder, stored, weights)
        bias_dtype = _shared_dtype(folder, stored, biases) if biases else None
        group.allocate(device, weight_dtype, bias_dtype, form)
        for name, weight in zip(group.names, weights, strict=True):
            if weight in found.nf4.states:
                restore_state(group.member(name), found.nf4.states[weight])
    model.frequencies = model.frequencies.to(device)
    return found


def _kept_dtype(model: Llama, name: str, stored: torch.dtype) -> torch.dtype:
    """Find the dtype in which one of a model's parameters is kept.

    That of the head is the compute dtype, to which every loss would convert it again; embeddings
    have it too where they are the head, or become smaller. A row that is looked up is rounded as it
    would be behind the look-up.
    """
    compute = model.compute_dtype
    if name == _HEAD or (name == EMBEDDINGS and model.config.tie_word_embeddings):
        return compute
    return compute if name == EMBEDDINGS and compute.itemsize < stored.itemsize else stored


def describe_loading(folder: Path, compute_dtype: torch.dtype) -> list[str]:
    """Say in lines what of a checkpoint is not taken as it is stored, or not at all.

    Raises:
        FileNotFoundError: config.json, an index or a shard is missing.
        ValueError: the files contradict each other or config.json, or are in another format.
    """
    found = describe(folder, compute_dtype)
    converted = {"embeddings": (EMBEDDINGS, found.embeddings)}
    if not found.model.config.tie_word_embeddings:
        converted["head"] = (_HEAD, found.stored[_HEAD])
    lines = found.remarks
    for what, (name, tensor) in converted.items():
        kept = _kept_dtype(found.model, name, tensor.dtype)
        if kept != tensor.dtype:
            lines.append(f"{what}: stored in {tensor.dtype}, kept in {kept}, the compute dtype")
    return lines
