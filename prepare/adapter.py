"""The shape of the adapter that a run trains: from the flags, or from --init-adapter."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from llama.model import update_sizes
from lora.adapter_file import read_adapter_config
from lora.config import LoRAConfig, resolve_target_modules
from run.flags import AdapterFlags


def lora_config(config: AdapterFlags, names: Sequence[str]) -> LoRAConfig:
    """Make an adapter's configuration from the flags.

    Args:
        names: the names of the model's projections.

    Raises:
        ValueError: an unknown target module, or a number out of range.
    """
    requested = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    return LoRAConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=resolve_target_modules(requested, names),
        use_rslora=config.use_rslora,
    )


def lora_of_init_adapter(folder: Path, lora: LoRAConfig, paths: Iterable[str]) -> LoRAConfig:
    """Read the configuration of the adapter to start from, whose patterns no flag can express.

    Args:
        lora: the configuration that the flags ask for.
        paths: the paths of the model's projections.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: the adapter is no plain LoRA of this model, or the flags contradict it.
    """
    given = read_adapter_config(folder)
    names = {path.rpartition(".")[2] for path in update_sizes(given, paths)}
    has = (given.r, given.lora_alpha, given.use_rslora, names)
    asked = (lora.r, lora.lora_alpha, lora.use_rslora, set(lora.target_modules))
    if has != asked:
        raise ValueError(
            f"--init-adapter must have the shape that the flags ask for: it has {given}, the "
            f"flags {lora}; give the adapter's --lora-r, --lora-alpha, --target-modules and "
            "--use-rslora"
        )
    return replace(given, lora_dropout=lora.lora_dropout)
