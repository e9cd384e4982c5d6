"""What the command line asks for: flags that are resolved, the base's checkpoint, the adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import find_checkpoint, find_description
from checkpoint.implied import has_weights, implied_checkpoint
from checkpoint.opening import Checkpoint, open_checkpoint
from llama.attention import check_heads
from llama.model import parameter_shapes, projection_shapes, projections
from llama.targets import update_sizes
from lora.adapter_file import find_adapter
from lora.config import LoRAConfig
from lora.readers import plain
from prepare.adapter import follow_adapter, lora_config
from prepare.base_compute import check_base_compute
from prepare.quantization import follow_checkpoint
from run.config import TrainConfig, make_config, read_given
from run.machine import Capability, configure_torch
from run.ranks import Ranks
from run.resolve import resolve
from step.gpus import Gpu, find_gpu, unnamed_gpu


@dataclass(frozen=True)
class Asked:
    """What was asked for, before data are looked at.

    Attributes:
        checkpoint: the base model's folder, opened.
        lora: the shape of the adapter that is trained.
        start: the adapter to begin with, if any.
        gpu: the GPU that a plan is for, where that is not this machine's.
        undecided: the fields that were left to the machine and the model, as they were asked for:
            device auto, and the like.
    """

    config: TrainConfig
    checkpoint: Checkpoint
    lora: LoRAConfig
    start: Path | None
    gpu: Gpu | None
    undecided: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)


def ask(arguments: Sequence[str], without_model: Mapping[str, Any], ranks: Ranks) -> Asked:
    """Read the command line, open the base model's checkpoint, and set torch up for the device.

    Args:
        without_model: the fields of a run that names neither a model nor data.

    Raises:
        FileNotFoundError, ValueError: a flag or the checkpoint is not as it must be.
    """
    given = read_given(arguments)
    config = make_config(given, dict(without_model))
    gpu = _planned_gpu(config)
    checkpoint = _open(config)
    llama_config = checkpoint.config
    names, paths = projections(llama_config), projection_shapes(llama_config)
    parameters = parameter_shapes(llama_config)
    start = find_adapter(config.init_adapter, "--init-adapter") if config.init_adapter else None
    if start:
        config, lora = follow_adapter(config, given, start, names, paths, parameters)
    else:
        lora = lora_config(config, names)
    followed = follow_checkpoint(config, checkpoint)
    config = resolve(
        followed,
        llama_config.max_position_embeddings,
        llama_config.short_length,
        ranks.local_rank,
        gpu.facts.capability if gpu else None,
    )
    local_rank = 0 if gpu else ranks.local_rank
    device = torch.device(config.device)
    configure_torch(device, local_rank, config.deterministic)
    check_heads(llama_config, getattr(torch, config.dtype), device, gpu.facts if gpu else None)
    if config.router_aux_loss_coef and llama_config.experts is None:
        raise ValueError(
            "--router-aux-loss-coef must be given for a mixture of experts alone: no layer of "
            f"{config.model} has experts, got {config.router_aux_loss_coef:g}"
        )
    check_base_compute(config, _capability(config, gpu, local_rank))
    undecided = {
        name: value for name, value in asdict(followed).items() if getattr(config, name) != value
    }
    lora = plain(lora, update_sizes(lora, paths, parameters))
    return Asked(config, checkpoint, lora, start, gpu, undecided)


def _planned_gpu(config: TrainConfig) -> Gpu | None:
    """Find the GPU that a plan is for, where that is not this machine's."""
    if config.gpu:
        return find_gpu(config.gpu)
    is_elsewhere = config.device == "auto" and not torch.cuda.is_available()
    if config.plan and config.max_memory_bytes and is_elsewhere:
        return unnamed_gpu(config.max_memory_bytes)
    return None


def _capability(config: TrainConfig, gpu: Gpu | None, local_rank: int) -> Capability | None:
    """Find the compute capability of the run's GPU; None on a CPU."""
    if gpu:
        return gpu.facts.capability
    return torch.cuda.get_device_capability(local_rank) if config.device == "cuda" else None


def _open(config: TrainConfig) -> Checkpoint:
    """Open the base model's checkpoint; for a plan, what config.json says of it is enough."""
    if not config.plan:
        return open_checkpoint(find_checkpoint(config.model))
    folder = find_description(config.model, has_tokenizer=bool(config.data))
    # the hub's cache may have some of a repository's weights
    is_local = folder == Path(config.model)
    if is_local and has_weights(folder):
        return open_checkpoint(folder)
    return implied_checkpoint(folder, config.block_size)
