"""Learning-rate schedules: linear warm-up, then constant, linear or cosine decay."""

import math

SCHEDULES = ("cosine", "linear", "constant")


def num_warmup_steps(num_steps: int, warmup_ratio: float, warmup_steps: int = 0) -> int:
    """Steps of warm-up: so many, or else the ratio of all steps, rounded up."""
    return warmup_steps or math.ceil(num_steps * warmup_ratio)


def learning_rate_at(
    step: int, num_steps: int, num_warmup: int, learning_rate: float, schedule: str
) -> float:
    """Compute the learning rate of a step, counted from 0.

        warm-up     lr (step + 1) / num_warmup
        progress    x = (step - num_warmup) / (num_steps - num_warmup), in [0, 1)
        constant    lr
        linear      lr (1 - x)
        cosine      lr (1 + cos(pi x)) / 2

    The schedules are those of transformers, whose warm-up spends its first step at a rate of 0.

    Raises:
        ValueError: an unknown schedule.
    """
    if step < num_warmup:
        return learning_rate * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if schedule == "constant":
        return learning_rate
    if schedule == "linear":
        return learning_rate * (1 - progress)
    if schedule == "cosine":
        return learning_rate * (1 + math.cos(math.pi * progress)) / 2
    raise ValueError(f"--lr-scheduler must be one of {', '.join(SCHEDULES)}: got {schedule!r}")
