"""Which projections get a low-rank update, and how large it is. Field names are PEFT's.

A projection is known by its path, "model.layers.0.self_attn.q_proj". Command lines name projections
only; adapters that PEFT made may pick paths by patterns and give each another size.
"""

import difflib
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

ALL_LINEAR = "all-linear"
_LONGEST_PATTERN = 10_000
# larger than any dimension of a matrix today
_MOST_RANK = 1 << 16


class UpdateSize(NamedTuple):
    """Rank and factor of one projection's update."""

    rank: int
    scaling: float


def _ends_with(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _look_up(pattern_values: Mapping[str, float], path: str, default: float) -> float:
    """Find the value of the first pattern that fits a path or its end."""
    for pattern, value in pattern_values.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


@dataclass(frozen=True)
class LoRAConfig:
    """The low-rank update of every target projection: W + scaling * B A.

    Raises:
        ValueError: a rank, an alpha or lora_dropout is out of range, or a pattern is no regular
            expression.

    Attributes:
        target_modules: projections by name, by path or by the end of a path; or one text: a regular
            expression for whole paths, or "all-linear".
        exclude_modules: projections without an update, given as target_modules are.
        target_parameters: tensors of all experts of a layer, by name or by the end of a path.
        layers_to_transform: the layers whose projections get an update, if targets are names.
        layers_pattern: regular expressions for the name of the list of layers; none: any name.
        rank_pattern: r by regular expressions for the end of a path; the first that fits counts.
        alpha_pattern: lora_alpha by the same rule.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...] | str
    use_rslora: bool = False
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for rank in (self.r, *self.rank_pattern.values()):
            if rank < 1:
                raise ValueError(f"--lora-r must be at least 1: got {rank}")
            if rank > _MOST_RANK:
                raise ValueError(f"--lora-r must be at most {_MOST_RANK:,}: got {str(rank)[:20]}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not 0 < alpha <= sys.float_info.max:
                raise ValueError(f"--lora-alpha must be positive: got {alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora-dropout must be in [0, 1): got {self.lora_dropout}")
        if self.target_parameters and self.lora_dropout:
            raise ValueError(
                "--lora-dropout must be 0 with --target-parameters, as PEFT wants it: "
                f"got {self.lora_dropout}"
            )
        has_layers = self.layers_to_transform is not None or bool(self.layers_pattern)
        if has_layers and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform and layers_pattern must come with a list of target_modules: "
                f"got {self.target_modules!r}"
            )
        for pattern in self._patterns():
            if len(pattern) > _LONGEST_PATTERN:
                raise ValueError(
                    f"a pattern of modules must have at most {_LONGEST_PATTERN:,} characters: got "
                    f"{len(pattern):,}"
                )
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"a pattern of modules must be a regular expression: got {pattern!r}: {error}"
                ) from None

    def _patterns(self) -> list[str]:
        """The regular expressions, "all-linear" among them."""
        modules = (self.target_modules, self.exclude_modules)
        one_text = [text for text in modules if isinstance(text, str)]
        return [*one_text, *self.layers_pattern, *self.rank_pattern, *self.alpha_pattern]

    @property
    def has_patterns(self) -> bool:
        """Whether a regular expression decides about modules."""
        return any(pattern.lower() != ALL_LINEAR for pattern in self._patterns())

    @property
    def scaling(self) -> float:
        """The factor of all updates that no pattern gives another one."""
        return self._scaling(self.lora_alpha, self.r)

    def has_target(self, path: str) -> bool:
        """Tell whether a module gets an update, by the rules of PEFT's check_target_module_exists.

        "all-linear" fits the paths of the layers.
        """
        excluded, targets = self.exclude_modules, self.target_modules
        if isinstance(excluded, str):
            if excluded and re.fullmatch(excluded, path):
                return False
        elif _ends_with(path, excluded):
            return False
        if isinstance(targets, str):
            is_all = targets.lower() == ALL_LINEAR
            return ".layers." in path if is_all else bool(re.fullmatch(targets, path))
        # a whole path is meant, whatever its layer
        return path in targets or (_ends_with(path, targets) and self._is_in_layers(path))

    def beneath(self, path: str) -> "LoRAConfig":
        """Make the configuration of the same updates for a model with modules elsewhere than
        beneath a path, some of which have the names of targets."""
        elsewhere, excluded = rf"(?!{re.escape(path)}\.).*", self.exclude_modules
        if not isinstance(excluded, str):
            excluded = "|".join(rf"(?:.*\.)?{re.escape(name)}" for name in excluded)
        if elsewhere in excluded:
            return self
        return replace(self, exclude_modules="|".join(filter(None, (elsewhere, excluded))))

    def _is_in_layers(self, path: str) -> bool:
        if self.layers_to_transform is None:
            return True
        patterns = [rf"(?:^|.*?\.){name}" for name in self.layers_pattern] or [r".*?\.[^.]*"]
        matches = (re.match(rf"{pattern}\.(?P<index>\d+)\.", path) for pattern in patterns)
        found = next(filter(None, matches), None)
        return found is not None and int(found["index"]) in self.layers_to_transform

    def update_size(self, path: str) -> UpdateSize | None:
        """Find the size of a projection's update; None where it has none."""
        return self._size(path) if self.has_target(path) else None

    def parameter_size(self, path: str) -> UpdateSize | None:
        """Find the size of the updates of a tensor of all experts; None where it has none.

        PEFT's rules: neither what excludes modules nor what picks layers is for tensors.
        """
        return self._size(path) if _ends_with(path, self.target_parameters) else None

    def _size(self, path: str) -> UpdateSize:
        rank = int(_look_up(self.rank_pattern, path, self.r))
        alpha = _look_up(self.alpha_pattern, path, self.lora_alpha)
        return UpdateSize(rank, self._scaling(alpha, rank))

    def _scaling(self, alpha: float, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (Kalajdzievski 2023)."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


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
