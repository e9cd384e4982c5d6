"""What a run's checkpoint decides, and what it will take of the machine."""

from dataclasses import replace
from pathlib import Path

import torch

from data.epochs import Epochs
from llama.checkpoint import describe, frozen_bytes, settle_quantization
from llama.config import LlamaConfig, LongRopeScaling
from llama.identity import Identity, identify
from llama.micro_step import padded_tokens
from llama.workload import Workload
from lora.adapter_file import read_base_identity
from lora.config import LoRAConfig
from optim.adamw import moment_bytes_per_element
from run.checkpoint import Checkpoint
from run.config import TrainConfig


def quantization_of(config: TrainConfig) -> tuple[int, bool] | None:
    return (config.block_size, config.double_quant) if config.quant == "nf4" else None


def follow_checkpoint(config: TrainConfig, folder: Path) -> TrainConfig:
    """Take the quantization of a checkpoint that is in NF4 already.

    Raises:
        ValueError: the flags ask for another one.
    """
    default = (TrainConfig.block_size, TrainConfig.double_quant)
    settled = settle_quantization(folder, quantization_of(config), default)
    if settled is None:
        return config
    block_size, double_quant = settled
    return replace(config, block_size=block_size, double_quant=double_quant)


def identify_base(
    config: TrainConfig, folder: Path, resumed: Checkpoint | None, start: Path | None
) -> Identity:
    """Find out which checkpoint this is, and hold it against the one that was trained on before.

    A run has one base from its first step to its last. An adapter may go on with another one, and
    that is said.

    Args:
        start: the adapter to begin with, if any.

    Raises:
        ValueError: the run to go on with has another one.
    """
    base = identify(describe(folder, torch.float32))
    if resumed is None:
        trained_on = read_base_identity(start) if start else ""
        if trained_on and base.original and trained_on != base.original:
            print(f"--init-adapter was trained on another base: it goes on with {config.model}")
    elif not resumed.state.base:
        print(f"{resumed.path} does not say what its base was: {config.model} is not checked")
    elif resumed.state.base != base.own:
        raise ValueError(
            f"--resume must go on with the base that the run began with: {config.model} has other "
            "weights or another config.json than it had then; give it back its files, or start "
            f"another run from the adapter: --init-adapter {resumed.path}"
        )
    return base


def packable_length(llama: LlamaConfig) -> int | None:
    """Tokens of the longest row that samples can share, where that is not any length.

    In longer rows LongRoPE's frequencies would depend on how long each sample is.
    """
    scaling = llama.rope_scaling
    is_long = isinstance(scaling, LongRopeScaling)
    return scaling.original_max_position_embeddings if is_long else None


def workload(
    config: TrainConfig,
    lora: LoRAConfig,
    llama: LlamaConfig,
    folder: Path,
    epochs: Epochs,
) -> Workload:
    """Size the largest micro-batch of the run."""
    on_device = config.device == "cpu" or config.optimizer_residency != "host"
    return Workload(
        config=llama,
        lora=lora,
        frozen_bytes=frozen_bytes(folder, quantization_of(config)),
        moment_bytes=moment_bytes_per_element(config.optim == "paged_adamw_8bit") * on_device,
        batch=min(config.batch_size, epochs.num_rows),
        tokens=padded_tokens(epochs.row_length, torch.device(config.device)),
        dtype=getattr(torch, config.dtype),
        sample_tokens=epochs.packed_sample_tokens,
    )
