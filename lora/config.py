"""Which projections get a low-rank update, and how large it is. Field names are PEFT's."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig:
    """The low-rank update of every target projection: W + scaling * B A.

    Raises:
        ValueError: r, lora_alpha or lora_dropout is out of range.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]  # projection names, resolved: never "all-linear"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"--lora-r must be at least 1: got {self.r}")
        if not math.isfinite(self.lora_alpha) or self.lora_alpha <= 0:
            raise ValueError(f"--lora-alpha must be positive: got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora-dropout must be in [0, 1): got {self.lora_dropout}")

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (Kalajdzievski 2023)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def resolve_target_modules(requested: Iterable[str], projections: Sequence[str]) -> tuple[str, ...]:
    """Turn the user's target names into projection names, each once and in the model's order.

    Raises:
        ValueError: none is given, or one is not among the model's projections; the message lists
            the nearest.
    """
    requested = tuple(requested)
    if requested == (ALL_LINEAR,):
        return tuple(projections)
    if not requested:
        raise ValueError(
            f"--target-modules must name at least one projection: got none; try {ALL_LINEAR}"
        )
    for name in requested:
        if name not in projections:
            nearest = difflib.get_close_matches(name, projections, n=3, cutoff=0.4) or projections
            raise ValueError(
                f"--target-modules must be {ALL_LINEAR} or names among {', '.join(projections)}: "
                f"got {name!r}; did you mean {' or '.join(nearest)}?"
            )
    return tuple(name for name in projections if name in requested)
