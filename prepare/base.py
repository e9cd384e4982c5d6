"""The base model of a run: its identity, and the workload of training it."""

from pathlib import Path

import torch

from checkpoint.identity import Identity, identify
from checkpoint.loading import load_sizes
from checkpoint.opening import Checkpoint
from data.epochs import Epochs
from llama.model import Llama
from lora.adapter_file import read_base_identity
from lora.config import LoRAConfig
from optim.adamw import moment_bytes_per_element
from prepare.base_compute import set_base_compute
from prepare.quantization import quantization_of
from run.checkpoint import ResumePoint
from run.config import TrainConfig
from step.captured_shapes import MAX_GRAPHS
from step.memory_plan import evaluated_rows
from step.micro_step import padded_tokens
from step.workload import Workload


def identify_base(
    config: TrainConfig,
    checkpoint: Checkpoint,
    resumed: ResumePoint | None,
    start: Path | None,  # the adapter to begin with
) -> Identity:
    """Compute the identity of a run's checkpoint, and compare it with that of an earlier start.

    A run has one base from its first step to its last. An adapter may go on with another base, and
    a line says so.

    Raises:
        ValueError: the run to go on with has another base.
    """
    base = identify(checkpoint)
    if resumed is None:
        trained_on = read_base_identity(start) if start else ""
        if trained_on and base.original and trained_on != base.original:
            print(f"--init-adapter was trained on another base than {config.model}: going on")
    elif not resumed.state.base:
        print(f"{resumed.path} does not say what its base was: {config.model} is not checked")
    elif resumed.state.base != base.own:
        raise ValueError(
            f"--resume must go on with the base that the run began with: {config.model} has other "
            "weights or another config.json than it had then; restore its files, or start another "
            f"run from the adapter: --init-adapter {resumed.path}"
        )
    return base


def sized_model(config: TrainConfig, lora: LoRAConfig, checkpoint: Checkpoint) -> Llama:
    """Make the run's model, the adapter beside it, of sizes without values.

    Raises:
        ValueError: as `set_base_compute`.
    """
    model = load_sizes(checkpoint, getattr(torch, config.dtype), quantization_of(config))
    set_base_compute(model, config)
    model.attach_lora(lora, seed=0)
    return model


def workload(
    config: TrainConfig,
    lora: LoRAConfig,
    checkpoint: Checkpoint,
    epochs: Epochs,
    num_ranks: int,
) -> Workload:
    """Size the largest micro-batch of the run."""
    device = torch.device(config.device)
    return Workload(
        model=sized_model(config, lora, checkpoint),
        moment_bytes=moment_bytes_per_element(config.optim == "paged_adamw_8bit"),
        batch=epochs.rows_at_once,
        tokens=padded_tokens(epochs.row_length, device),
        sample_tokens=epochs.packed_sample_tokens,
        has_noise=config.neftune_noise_alpha > 0,
        num_shapes=num_shapes(epochs, device),
        num_ranks=num_ranks,
        device=device,
    )


def num_shapes(epochs: Epochs, device: torch.device) -> int:
    """Count the shapes of batches that CUDA graphs may capture: for each length of rows,
    each number of them."""
    lengths = {padded_tokens(length, device) for length in epochs.row_lengths}
    return min(epochs.most_batch_sizes * len(lengths), MAX_GRAPHS)


def evaluated_at_once(work: Workload, evaluation: Epochs, batch_size: int) -> int:
    """Count the rows that are evaluated together: a batch, or on a GPU as many as take no more
    memory than training."""
    num_rows = min(batch_size, evaluation.num_rows)
    is_limited = work.device.type == "cuda"
    return evaluated_rows(work, num_rows, evaluation.row_length) if is_limited else num_rows
