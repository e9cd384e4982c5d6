"""What a run's checkpoint decides, and what it will take of the machine."""

from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.description import describe, settle_quantization
from checkpoint.identity import Identity, identify
from checkpoint.loading import load_sizes
from data.epochs import Epochs
from llama.config import LlamaConfig, LongRopeScaling
from lora.adapter_file import read_base_identity
from lora.config import LoRAConfig
from nf4.weight import Quantization
from optim.adamw import moment_bytes_per_element
from run.checkpoint import Checkpoint
from run.config import TrainConfig
from step.memory_plan import evaluated_rows
from step.micro_step import MAX_GRAPHS, padded_tokens
from step.workload import Workload


def quantization_of(config: TrainConfig) -> Quantization | None:
    is_nf4 = config.quant == "nf4"
    return Quantization(config.block_size, config.double_quant) if is_nf4 else None


def follow_checkpoint(config: TrainConfig, folder: Path) -> TrainConfig:
    """Take the quantization of a checkpoint that is in NF4 already.

    Raises:
        ValueError: the flags ask for another one.
    """
    default = Quantization(TrainConfig.block_size, TrainConfig.double_quant)
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
    folder: Path,
    epochs: Epochs,
    num_ranks: int,
) -> Workload:
    """Size the largest micro-batch of the run."""
    device = torch.device(config.device)
    model = load_sizes(folder, getattr(torch, config.dtype), quantization_of(config))
    model.attach_lora(lora, seed=0)
    return Workload(
        model=model,
        moment_bytes=moment_bytes_per_element(config.optim == "paged_adamw_8bit"),
        batch=min(config.batch_size, epochs.num_rows),
        tokens=padded_tokens(epochs.row_length, device),
        sample_tokens=epochs.packed_sample_tokens,
        has_noise=config.neftune_noise_alpha > 0,
        num_shapes=_num_shapes(epochs, device),
        num_ranks=num_ranks,
        device=device,
    )


def _num_shapes(epochs: Epochs, device: torch.device) -> int:
    """Count the shapes of micro-batches that may be captured: of every length, whole or the last
    of an epoch."""
    lengths = {padded_tokens(length, device) for length in epochs.row_lengths}
    return min(2 * len(lengths), MAX_GRAPHS)


def evaluated_at_once(work: Workload, evaluation: Epochs, batch_size: int) -> int:
    """Count the rows that are evaluated together: a batch, or on a GPU fewer where training takes
    less memory."""
    num_rows = min(batch_size, evaluation.num_rows)
    is_limited = work.device.type == "cuda"
    return evaluated_rows(work, num_rows, evaluation.row_length) if is_limited else num_rows
