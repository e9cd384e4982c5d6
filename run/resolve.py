"""The values of `auto` flags and open defaults on this machine and for this checkpoint."""

from dataclasses import replace

from run.config import TrainConfig
from run.machine import Capability, choose_device, choose_dtype, has_bfloat16

DEFAULT_MAX_LENGTH = 2048


def resolve(
    config: TrainConfig,
    positions: int,
    packable: int | None = None,
    local_rank: int = 0,
    planned: Capability | None = None,
) -> TrainConfig:
    """Replace every `auto` and open default by a definite value, except --output.

    Args:
        positions: the number of the model's positions.
        packable: tokens of the longest row that several samples may share; None: of any length.
        local_rank: as in choose_device.
        planned: as in has_bfloat16.

    Raises:
        ValueError: flags that the machine, the model or each other rule out.
    """
    if planned and config.device == "cpu":
        raise ValueError("--device cpu must be given without --gpu, which is planned for: got both")
    device = "cuda" if planned else choose_device(config.device, local_rank)
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
            f"model's RoPE frequencies for short texts are made for: got {max_length:,}"
        )
    packing = config.packing
    if packing is None:
        # without tensor cores, attention in packed rows takes longer than padding
        packing = has_bfloat16(device, planned) and can_pack and not config.group_by_length
    dtype = choose_dtype(config.dtype, device, planned)
    return replace(config, device=device, dtype=dtype, max_length=max_length, packing=packing)
