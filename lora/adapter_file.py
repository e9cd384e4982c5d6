"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors, float32.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   (r, in_features)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   (out_features, r)

Never pickle. PEFT warns about a field it does not know or a tensor it does not find and goes on;
here both are errors, because either means another function than the one that was trained.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hub.fetch import parse_hub_id
from lora.config import LoRAConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# fields of PEFT 0.21's LoraConfig that this program reads, or that do not change the update of a
# saved adapter; any other one that is set asks for something else than a plain LoRA
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias"}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # how A and B began, as eva_config and lora_ga_config
    "eva_config",
    "exclude_modules",  # the tensors' names tell
    "fan_in_fan_out",  # for weights stored transposed: PEFT ignores it for a linear layer
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",  # only with layers_to_transform
    "loftq_config",
    "lora_ga_config",
    "megatron_core",  # only with megatron_config
    "peft_version",
    "qalora_group_size",  # only with use_qalora
    "revision",
    "runtime_config",
    "task_type",
}


def save_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: LoRAConfig, base_model: str
) -> None:
    """Write an adapter's two files into a folder, made if needed; PEFT loads it.

    Args:
        tensors: by the model's names ("model.layers.0.self_attn.q_proj.lora_A.weight").
        base_model: what PEFT shall load the base model from, a path or a hub id, with @revision if
            there is one.

    Note:
        The files are written one after the other; a caller that may be killed writes into a
        temporary folder and renames it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {_PREFIX + name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    alpha = config.lora_alpha
    hub_id = None if Path(base_model).exists() else parse_hub_id(base_model)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_id.repository if hub_id else base_model,
        "revision": hub_id.revision if hub_id else None,
        "r": config.r,
        # PEFT and vLLM declare an integer
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n")


def _number(fields: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be a number: got {value!r}")
    return value


def read_adapter_config(folder: Path) -> LoRAConfig:
    """Read the part of adapter_config.json that decides the update.

    PEFT may list target modules by their full paths; the projections' names are returned, each
    once. `load_adapter` then sees whether every layer has them.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the file is not a plain LoRA's, or its target modules are not a list of names.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"an adapter folder must hold {CONFIG_NAME} and {WEIGHTS_NAME}: none in {folder}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        found = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"{path} must describe a LORA adapter: got peft_type {found!r}")
    for key, value in fields.items():
        if value and key not in _READ | _WITHOUT_EFFECT:
            raise ValueError(
                f"{path} must describe a plain LoRA: {key} is {value!r}, which is not supported"
            )
    if fields.get("bias", "none") != "none":
        raise ValueError(f"{path} must have bias none: got {fields['bias']!r}")
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"{path} must list target_modules by name: got {targets!r}")
    rank, use_rslora = fields.get("r"), fields.get("use_rslora", False)
    if type(rank) is not int or not isinstance(use_rslora, bool):
        raise ValueError(
            f"{path} must give r as an integer and use_rslora as true or false: "
            f"got {rank!r} and {use_rslora!r}"
        )
    try:
        return LoRAConfig(
            r=rank,
            lora_alpha=_number(fields, "lora_alpha"),
            lora_dropout=_number(fields, "lora_dropout", 0.0),
            # a set's order differs from run to run, and PEFT's list comes from one
            target_modules=tuple(sorted({name.rpartition(".")[2] for name in targets})),
            use_rslora=use_rslora,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_adapter(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy an adapter's values into the model's adapter tensors, in place.

    Raises:
        FileNotFoundError: the folder has no adapter_model.safetensors.
        ValueError: the file is damaged, its names or shapes are not exactly the model's, or it
            holds a NaN or an infinity; nothing was copied then.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"an adapter folder must hold {WEIGHTS_NAME}: none in {folder}")
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a complete safetensors file: {error}") from None
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
