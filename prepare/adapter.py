"""The shape of the adapter that a run trains: from the flags, or from --init-adapter."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from llama.targets import update_sizes
from lora.adapter_file import read_adapter_config
from lora.config import ALL_LINEAR, LoRAConfig, resolve_target_modules
from run.config import TrainConfig
from run.flags import AdapterFlags, flag_name


def lora_config(config: AdapterFlags, names: Sequence[str]) -> LoRAConfig:
    """Make an adapter's configuration from the flags.

    Args:
        names: the names of the model's projections.

    Raises:
        ValueError: an unknown target module, or a number out of range.
    """
    requested, tensors = _listed(config.target_modules), _listed(config.target_parameters)
    # experts alone
    has_modules = bool(requested or not tensors)
    return LoRAConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=resolve_target_modules(requested, names) if has_modules else (),
        use_rslora=config.use_rslora,
        # in the order in which an adapter's file has them
        target_parameters=tuple(sorted(set(tensors))),
    )


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def follow_adapter(
    config: TrainConfig,
    given: Collection[str],  # names of the fields that the user gave
    folder: Path,
    names: Sequence[str],  # of the model's projections
    paths: Iterable[str],  # of the model's projections
    parameters: Iterable[str] = (),  # paths of the model's tensors of all experts
) -> tuple[TrainConfig, LoRAConfig]:
    """Take over the shape of the adapter to start from.

    Returns:
        The flags, with the adapter's rank, alpha, targets and rsLoRA where none were given; and the
        adapter's configuration, whose patterns no flag can express.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: the adapter is no plain LoRA of this model, or a flag that was given contradicts
            it.
    """
    found = read_adapter_config(folder)
    paths, parameters = list(paths), list(parameters)
    sizes = update_sizes(found, paths, parameters)
    adapted = {path.rpartition(".")[2] for path in paths if path in sizes}
    targets = tuple(name for name in names if name in adapted)
    tensors = dict.fromkeys(path.rpartition(".")[2] for path in parameters if path in sizes)
    shape = {
        "lora_r": found.r,
        "lora_alpha": float(found.lora_alpha),
        "use_rslora": found.use_rslora,
        "target_modules": ALL_LINEAR if targets == tuple(names) else ",".join(targets),
        "target_parameters": ",".join(tensors),
    }
    config = replace(config, **{name: shape[name] for name in shape if name not in given})
    asked = lora_config(config, names)
    # a run with rsLoRA saves an adapter without it, whose alpha gives the same scaling
    scales_alike = math.isclose(asked.scaling, found.scaling)
    agrees = {
        "lora_r": asked.r == found.r,
        "lora_alpha": scales_alike or asked.lora_alpha == found.lora_alpha,
        "use_rslora": scales_alike or asked.use_rslora == found.use_rslora,
        "target_modules": asked.target_modules == targets,
        "target_parameters": set(asked.target_parameters) == set(tensors),
    }
    if wrong := [name for name, holds in agrees.items() if not holds]:
        has, came = (
            " and ".join(str(values[name]) for name in wrong) for values in (shape, asdict(config))
        )
        raise ValueError(
            f"{' and '.join(map(flag_name, wrong))} must be as in the adapter of --init-adapter: "
            f"{folder} has {has}, the settings have {came}; leave the flags out, or give the "
            "adapter's"
        )
    return config, replace(found, lora_dropout=config.lora_dropout)
