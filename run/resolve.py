"""A run's flags made definite: what `auto` and a default mean on this machine and checkpoint."""

from dataclasses import replace

from run.config import TrainConfig
from run.machine import choose_device, choose_dtype, has_bfloat16

DEFAULT_MAX_LENGTH = 2048


def resolve(
    config: TrainConfig, positions: int, packable: int | None = None, local_rank: int = 0
) -> TrainConfig:
    """Replace every `auto` and default by what it means here, --output excepted.

    Args:
        positions: of the model.
        packable: tokens of the longest row that several samples may share; None: the longest.
        local_rank: as choose_device.

    Raises:
        ValueError: a device that is not there, a residency without one, or a length beyond the
            model's positions.
    """
    device = choose_device(config.device, local_rank)
    if device == "cpu" and config.optimizer_residency != "auto":
        raise ValueError(
            "--optimizer-residency must be auto on a CPU, where moments do not move: "
            f"got {config.optimizer_residency}"
        )
    if device == "cpu" and (config.activations == "offload" or config.max_memory):
        raise ValueError(
            "--activations offload and --max-memory must be given for a GPU: the device is the CPU"
        )
    max_length = config.max_length or min(DEFAULT_MAX_LENGTH, positions)
    if max_length > positions:
        raise ValueError(
            f"--max-length must be at most the model's {positions:,} positions: got {max_length:,}"
        )
    has_evaluation = bool(config.eval_data or config.eval_fraction)
    if config.early_stopping_patience and not (has_evaluation and config.eval_steps):
        raise ValueError(
            "--early-stopping-patience must be given with --eval-steps, and --eval-data or "
            f"--eval-fraction: got no {'--eval-steps' if has_evaluation else '--eval-data'}"
        )
    if config.max_steps == 0 and not has_evaluation:
        raise ValueError(
            "--max-steps 0 evaluates only and must be given --eval-data or --eval-fraction: got "
            "none"
        )
    can_pack = packable is None or max_length <= packable
    if config.packing and not can_pack:
        raise ValueError(
            f"--packing must be given with a --max-length of at most {packable:,}, which this "
            f"model's first frequencies are for: got {max_length:,}"
        )
    packing = config.packing
    if packing is None:
        # where attention in shared rows has no tensor cores it takes longer than padding
        packing = has_bfloat16(device) and can_pack and not config.group_by_length
    dtype = choose_dtype(config.dtype, device)
    return replace(config, device=device, dtype=dtype, max_length=max_length, packing=packing)
