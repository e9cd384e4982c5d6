"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors, float32.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   (r, in_features)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   (out_features, r)

Never pickle. PEFT warns about an unknown field or a missing tensor and goes on; here both are
errors, because with either the adapter computes something else than what was trained.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreign.json_text import read_object
from foreign.reading import Reading
from hub.fetch import find_folder, parse_hub_id
from lora.adapter_fields import AdapterFields, is_integer, is_number
from lora.config import LoRAConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# of the base: PEFT saves them too where the vocabulary was resized (save_embedding_layers), and
# loads them over the base's
_VOCABULARY = (".embed_tokens.weight", ".lm_head.weight")
# metadata of the weights' file: PEFT does not read it, and would warn of a new field in its config
_BASE = "base_identity"

_PICKLED_NAME = "adapter_model.bin"

# fields of PEFT 0.21's LoraConfig that this program reads, or that do not change the update of a
# saved adapter; any other one that is set asks for something else than a plain LoRA
_READ = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "use_rslora",
}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # only with its init_lora_weights, as the next ones
    "eva_config",
    "fan_in_fan_out",  # for weights stored transposed: PEFT ignores it for a linear layer
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",  # only with megatron_config
    "peft_version",
    "qalora_group_size",  # only with use_qalora
    "revision",
    "runtime_config",
    "task_type",
}
# how A and B may have begun; every other way takes their product from the base weights, which PEFT
# does again whenever it loads the adapter
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def save_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    base_model: str,
    base_identity: str = "",
) -> None:
    """Write an adapter's two files into a folder, made if needed; PEFT loads it.

    Args:
        tensors: by the model's names ("model.layers.0.self_attn.q_proj.lora_A.weight").
        base_model: path or hub id from which PEFT loads the base model, with @revision if there is
            one.
        base_identity: of the base model in 16 or 32 bits; empty where it is not known.

    Note:
        The files are written one after the other; a caller that may be killed writes into a
        temporary folder and renames it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {_PREFIX + name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS_NAME,
        metadata={"format": "pt"} | ({_BASE: base_identity} if base_identity else {}),
    )
    _sort_metadata(folder / WEIGHTS_NAME)
    targets, excluded = config.target_modules, config.exclude_modules
    layers = config.layers_to_transform
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **_base_fields(base_model),
        "r": config.r,
        "lora_alpha": _integer_if_whole(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "exclude_modules": (excluded if isinstance(excluded, str) else list(excluded)) or None,
        "layers_to_transform": None if layers is None else list(layers),
        "layers_pattern": list(config.layers_pattern) or None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {
            pattern: _integer_if_whole(alpha) for pattern, alpha in config.alpha_pattern.items()
        },
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if config.target_parameters:
        fields["target_parameters"] = list(config.target_parameters)
    (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n")


def _base_fields(base_model: str) -> dict[str, str | None]:
    hub_id = None if Path(base_model).exists() else parse_hub_id(base_model)
    return {
        "base_model_name_or_path": hub_id.repository if hub_id else base_model,
        "revision": hub_id.revision if hub_id else None,
    }


def rename_base(folder: Path, base_model: str) -> None:
    """Write another path or hub id of the base model into an adapter.

    Args:
        base_model: as `save_adapter`.
    """
    path = folder / CONFIG_NAME
    fields = json.loads(path.read_bytes()) | _base_fields(base_model)
    path.write_text(json.dumps(fields, indent=2) + "\n")


def _sort_metadata(path: Path) -> None:
    """Write the metadata of a safetensors file in one order, so that equal adapters have equal
    bytes: safetensors 0.8 writes several entries in another order each time."""
    with path.open("r+b") as file:
        num_header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(num_header_bytes))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(num_header_bytes)
        assert len(text) == num_header_bytes, "safetensors writes its header as json.dumps does"
        file.seek(8)
        file.write(text)


def _integer_if_whole(alpha: float) -> float:
    # PEFT and vLLM declare an integer
    return int(alpha) if float(alpha).is_integer() else alpha


def find_adapter(adapter: str, flag: str) -> Path:
    """Find the folder of an adapter: a local path, or a hub id whose two files are fetched.

    Args:
        flag: such as "--adapter", for messages.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `hub.fetch.find_folder`.
        ValueError: the repository has no adapter in safetensors.
    """

    def choose(names: Collection[str], get: Callable[[str], Path]) -> list[str]:
        if not {CONFIG_NAME, WEIGHTS_NAME} <= set(names):
            pickled = f"; {_PICKLED_NAME} is pickled, which is never read: save it as safetensors"
            raise ValueError(
                f"{flag} must hold {CONFIG_NAME} and {WEIGHTS_NAME}: {adapter} has "
                f"{', '.join(sorted(names)[:5]) or 'no file'}"
                f"{pickled if _PICKLED_NAME in names else ''}"
            )
        return [CONFIG_NAME, WEIGHTS_NAME]

    return find_folder(adapter, flag, "model", choose)


def read_adapter_config(folder: Path) -> LoRAConfig:
    """Read the part of adapter_config.json that decides the update.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the file is not a plain LoRA's, or a field is not what PEFT writes.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"an adapter folder must hold {CONFIG_NAME} and {WEIGHTS_NAME}: none in {folder}"
        )
    with Reading(path):
        return _checked(path, read_object(path))


def _checked(path: Path, values: dict[str, Any]) -> LoRAConfig:
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} must describe a LORA adapter: got peft_type {values.get('peft_type')!r}"
        )
    for key, value in values.items():
        if value and key not in _READ | _WITHOUT_EFFECT:
            raise ValueError(
                f"{path} must describe a plain LoRA: {key} is {value!r}, which is not supported"
            )
    if values.get("bias", "none") != "none":
        raise ValueError(f"{path} must have bias none: got {values['bias']!r}")
    if (beginning := values.get("init_lora_weights")) not in _INITIALIZATIONS:
        raise ValueError(
            f"{path} must describe an update of the base weights as they are: init_lora_weights "
            f"{beginning!r} changes them; save the adapter again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    fields = AdapterFields(values)
    try:
        return LoRAConfig(
            r=fields.integer("r"),
            lora_alpha=fields.number("lora_alpha"),
            lora_dropout=fields.number("lora_dropout", 0.0),
            target_modules=fields.modules("target_modules", None),
            use_rslora=fields.boolean("use_rslora"),
            exclude_modules=fields.modules("exclude_modules", []),
            layers_to_transform=fields.layers(),
            layers_pattern=fields.layers_pattern(),
            rank_pattern=fields.patterns("rank_pattern", "integers", is_integer),
            alpha_pattern=fields.patterns("alpha_pattern", "numbers", is_number),
            target_parameters=fields.names("target_parameters"),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"an adapter folder must hold {WEIGHTS_NAME}: none in {folder}"
            + (
                f"; {_PICKLED_NAME} is pickled, which is never read: load the adapter with PEFT "
                "and save it again with save_pretrained, which writes safetensors"
                if (folder / _PICKLED_NAME).is_file()
                else ""
            )
        )
    return path


def _damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{path} must be a complete safetensors file: {error}")


def read_base_identity(folder: Path) -> str:
    """Read the identity of the base model that an adapter was trained on; empty where the adapter
    does not say, as PEFT's.

    Raises:
        FileNotFoundError: the folder has no adapter_model.safetensors.
        ValueError: the file is damaged.
    """
    path = _weights_file(folder)
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_BASE, "")
    except SafetensorError as error:
        raise _damaged(path, error) from None


def load_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    read_vocabulary: Callable[[], Mapping[str, Tensor]] = dict,
) -> None:
    """Copy an adapter's values into the model's adapter tensors, in place.

    Args:
        read_vocabulary: reads the base's embeddings and head, by their names. Embedding layers of
            the file must equal them; it is not called where there are none.

    Raises:
        FileNotFoundError: the folder has no adapter_model.safetensors.
        ValueError: the file is damaged, its names or shapes are not exactly the model's, or it
            holds a NaN, an infinity or other embeddings than the base; nothing was copied then.
    """
    path = _weights_file(folder)
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from None
    layers = {n.removeprefix(_PREFIX): saved.pop(n) for n in [*saved] if n.endswith(_VOCABULARY)}
    base = read_vocabulary() if layers else {}
    for name, layer in layers.items():
        _check_embedding_layer(path, name, layer, base.get(name))
    targets = {_PREFIX + name: tensor for name, tensor in tensors.items()}
    missing, extra = sorted(targets.keys() - saved.keys()), sorted(saved.keys() - targets.keys())
    if missing or extra:
        raise ValueError(
            f"{path} must hold exactly the adapter of these target modules: "
            f"{len(missing)} tensors are missing (first: {missing[:1]}), "
            f"{len(extra)} unknown (first: {extra[:1]}); "
            "use the target modules the adapter was trained with"
        )
    for name, tensor in targets.items():
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} must have shape {tuple(tensor.shape)}: "
                f"got {tuple(saved[name].shape)}; "
                "the adapter belongs to another base model or another --lora-r"
            )
        if not saved[name].is_floating_point():
            raise ValueError(f"{path}: {name} must hold floats: got {saved[name].dtype}")
        if not bool(saved[name].isfinite().all()):
            raise ValueError(f"{path}: {name} must hold finite values only: got NaN or infinity")
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(saved[name])


def _check_embedding_layer(path: Path, name: str, layer: Tensor, base: Tensor | None) -> None:
    """Refuse an embedding layer that differs from the base model's."""
    same_shape = base is not None and base.shape == layer.shape
    # the base may be kept in fewer bits than either was saved in
    if base is None or not same_shape or not torch.equal(layer.to(base), base):
        found = "there is none to compare with" if base is None else "it differs"
        raise ValueError(
            f"{path}: {name} must equal the base's, which alone is used: {found}; if the base's "
            "embeddings were not trained, save the adapter again with PEFT's "
            "save_embedding_layers=False, otherwise merge it with PEFT"
        )
