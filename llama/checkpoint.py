"""From a checkpoint folder to a ready model, one tensor at a time.

    shard's memory map -> device -> quantized there -> its group's buffer

So the peak is the packed model plus one tensor (and the quantizer's bounded temporaries).
Everything that can be wrong with the files' structure (missing, truncated, renamed, pointing
elsewhere, shapes that contradict config.json) is found from the headers, before the first weight is
read; NaN and infinity as each tensor arrives. Pickled weights are never read.
"""

import difflib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llama.config import CONFIG_NAME, GENERATION_CONFIG_NAME, read_config
from llama.model import Llama
from lora.linear_group import LinearGroup

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_HUB_FILES = [
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    INDEX_NAME,
    "model*.safetensors",
]
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class _StoredTensor:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Slot:
    """Where a checkpoint tensor goes: the shape it must have and what takes it."""

    shape: tuple[int, ...]
    load: Callable[[Tensor], None]


def find_checkpoint(model: str) -> Path:
    """Find the folder of a checkpoint: a local path, or a hub id whose files are fetched as far as
    needed.

    Raises:
        FileNotFoundError: neither a folder nor a repository of that name can be had.
    """
    folder = Path(os.path.expanduser(model))
    if model and folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise FileNotFoundError(
            f"--model must be a checkpoint folder or a hub id like owner/name: got {model!r}"
        )
    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise FileNotFoundError(
            f"--model must be a checkpoint folder or a hub id: {model!r} is no folder here, "
            f"and the hub says: {reason}"
        ) from None


def _read_index(index: Path) -> dict[str, str]:
    """Read which file of its folder an index gives for each tensor."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} must be JSON with a weight_map of tensor names to files: {error!r}"
        ) from None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    for file in places.values():
        if Path(file).name != file or file == "..":
            raise ValueError(f"{index} must name files of its own folder only: got {file!r}")
    return places


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The checkpoint's files, each with the tensors that the index places there (None: no
    index).

    A file may be a symbolic link: the hub's cache keeps its blobs outside the folder.
    """
    index = folder / INDEX_NAME
    present = sorted(path.name for path in folder.iterdir())
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file():
            return {folder / SINGLE_NAME: None}
        pickled = [name for name in present if name.endswith(_PICKLED_SUFFIXES)]
        advice = "; "
        advice += (
            f"{pickled[0]} is pickled, which is never read: save the model as safetensors"
            if pickled
            else "download the checkpoint again or restore the name"
        )
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


def _stored_tensors(folder: Path) -> dict[str, _StoredTensor]:
    """Every tensor of a checkpoint, from the files' headers."""
    stored: dict[str, _StoredTensor] = {}
    for path, indexed in _shards(folder).items():
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.offset_keys()}
                headers = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} must be a complete safetensors file: {error}; "
                "it is truncated or damaged, download it again"
            ) from None
        if indexed is not None and headers.keys() != indexed:
            differing = sorted(headers.keys() ^ indexed)
            raise ValueError(
                f"{path} must hold exactly the tensors that {INDEX_NAME} places there: "
                f"{len(differing)} differ, the first is {differing[0]}; download the folder again"
            )
        for name, (dtype, shape) in headers.items():
            if dtype not in _DTYPES:
                raise ValueError(
                    f"{path}: {name} must be stored as {', '.join(_DTYPES)}: got {dtype}"
                )
            stored[name] = _StoredTensor(path, shape, _DTYPES[dtype])
    return stored


def _slots(model: Llama) -> dict[str, _Slot]:
    """Every tensor the model needs, by the checkpoint's name for it."""
    slots: dict[str, _Slot] = {}

    def add_parameter(name: str, parameter: nn.Parameter) -> None:
        owner = model.get_submodule(name.rpartition(".")[0])

        def load(tensor: Tensor) -> None:
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} must hold finite values only: got NaN or infinity")
            # on the CPU it is still a view of the whole file, which may change on the disk
            kept = tensor.clone() if tensor.device.type == "cpu" else tensor
            owner.weight = nn.Parameter(kept, requires_grad=False)

        slots[name] = _Slot(tuple(parameter.shape), load)

    def add_member(prefix: str, group: LinearGroup, member: str, shape: tuple[int, ...]) -> None:
        name = prefix + member
        slots[name] = _Slot(shape, lambda tensor: group.load(member, tensor, name))

    for name, parameter in model.named_parameters():
        add_parameter(name, parameter)
    for prefix, group in model.groups():
        for name, rows in zip(group.names, group.rows, strict=True):
            add_member(prefix, group, f"{name}.weight", (rows, group.in_features))
            if group.has_bias:
                add_member(prefix, group, f"{name}.bias", (rows,))
    return slots


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more


def _check(
    folder: Path, stored: dict[str, _StoredTensor], slots: dict[str, _Slot], is_tied: bool
) -> None:
    """Hold what the files contain against what config.json implies."""
    # old exports hold the rotary frequencies, which follow from the config; tied ones may repeat
    # the embeddings as head
    extra = {
        name
        for name in stored.keys() - slots.keys()
        if not name.endswith(".rotary_emb.inv_freq") and not (is_tied and name == _HEAD)
    }
    missing = slots.keys() - stored.keys()
    if missing or extra:
        raise ValueError(
            f"{folder} must hold exactly the tensors that config.json implies: "
            f"missing are {_some(missing)}; unknown are {_some(extra)}"
        )
    shapes = {name: slot.shape for name, slot in slots.items()}
    if is_tied and _HEAD in stored:
        shapes[_HEAD] = shapes[_EMBEDDINGS]
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{stored[name].file}: {name} must have shape {shape} by config.json: "
                f"got {stored[name].shape}"
            )


def _shared_dtype(
    folder: Path, stored: dict[str, _StoredTensor], names: Iterable[str]
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


def _check_tied_head(folder: Path, head: _StoredTensor, embeddings: Tensor) -> None:
    with safe_open(head.file, framework="pt") as file:
        is_equal = torch.equal(file.get_tensor(_HEAD).to(embeddings), embeddings)
    if not is_equal:
        raise ValueError(
            f"{folder}: config.json ties the head to the embeddings, so {_HEAD} must equal "
            f"{_EMBEDDINGS}: they differ; set tie_word_embeddings to false"
        )


def load_model(
    folder: Path,
    device: torch.device,
    compute_dtype: torch.dtype,
    quantization: tuple[int, bool] | None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Llama:
    """Load a checkpoint: frozen, its linear groups in NF4 (block_size, double_quant) or, with None,
    as stored.

    Args:
        report: called as `report(done, total)` after each tensor.

    Raises:
        FileNotFoundError: config.json, an index or a shard is missing.
        ValueError: the files contradict each other or config.json, or a tensor holds a NaN or an
            infinity.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config, compute_dtype)
    slots = _slots(model)
    stored = _stored_tensors(folder)
    _check(folder, stored, slots, config.tie_word_embeddings)
    for prefix, group in model.groups():
        weights = [f"{prefix}{name}.weight" for name in group.names]
        biases = [f"{prefix}{name}.bias" for name in group.names] if group.has_bias else []
        # quantized members keep no dtype, so theirs may differ
        weight_dtype = None if quantization else _shared_dtype(folder, stored, weights)
        bias_dtype = _shared_dtype(folder, stored, biases) if biases else None
        group.allocate(device, weight_dtype, bias_dtype, quantization)
    model.frequencies = model.frequencies.to(device)
    done = 0
    # shard by shard, each read front to back
    for path in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                if name in slots:
                    slots[name].load(file.get_tensor(name).to(device))
                    done += 1
                    report(done, len(slots))
    if config.tie_word_embeddings and _HEAD in stored:
        _check_tied_head(folder, stored[_HEAD], model.head)
    return model.eval()
