"""What a run's checkpoint decides, and what it will take of the machine."""

from dataclasses import replace
from pathlib import Path

import torch

from data.epochs import Epochs
from llama.checkpoint import frozen_bytes, settle_quantization
from llama.config import LlamaConfig, LongRopeScaling
from llama.micro_step import padded_tokens
from llama.workload import Workload
from lora.config import LoRAConfig
from optim.adamw import moment_bytes_per_element
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
