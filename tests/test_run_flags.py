"""run/flags.py: each group of flags checks its own values, alone and in a TrainConfig."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from run.config import GROUPS, TrainConfig
from run.flags import (
    AdapterFlags,
    DataFlags,
    MemoryFlags,
    ModelFlags,
    OutputFlags,
    TrainingFlags,
)

# a group, a value out of its range, and the complaint: of the group itself, or of all groups
OUT_OF_RANGE: list[tuple[type, dict[str, Any], str]] = [
    (DataFlags, {"eval_fraction": 1.0}, r"--eval-fraction must be in \[0, 1\): got 1.0"),
    (DataFlags, {"eval_fraction": 0.1, "eval_data": "e"}, "--eval-fraction must be 0 where"),
    (DataFlags, {"split": "train[:9]"}, "--split must be the name of a split, not a slice"),
    (DataFlags, {"train_on": "none"}, "--train-on must be one of"),
    (AdapterFlags, {"lora_alpha": float("inf")}, "--lora-alpha must be finite"),
    (TrainingFlags, {"loraplus_lr_ratio": 0.0}, "--loraplus-lr-ratio must be positive"),
    (TrainingFlags, {"adam_beta1": -0.1}, r"--adam-beta1 must be in \[0, 0.9999\]: got -0.1"),
    (TrainingFlags, {"adam_beta2": 1.0}, r"--adam-beta2 must be in \[0, 0.9999\]: got 1.0"),
    (TrainingFlags, {"optim": "adam"}, "--optim must be one of"),
    (TrainingFlags, {"optim": "adamw", "optimizer_residency": "host"}, "auto with --optim adamw"),
    (OutputFlags, {"logging_steps": 0}, "--logging-steps must be at least 1: got 0"),
    (OutputFlags, {"save_steps": 1 << 63}, r"--save-steps must be less than 2\^63"),
    (MemoryFlags, {"max_memory": "24g"}, "--max-memory must be a size such as 24GiB"),
    (ModelFlags, {"dtype": "fp8"}, "--dtype must be one of"),
]


@pytest.mark.parametrize(("group", "values", "complaint"), OUT_OF_RANGE)
def test_a_group_refuses_a_value_alone_and_in_a_config(
    group: Callable[..., Any], values: dict[str, Any], complaint: str
) -> None:
    for flags in (group, TrainConfig):
        with pytest.raises(ValueError, match=complaint):
            flags(**values)


def test_a_config_has_the_fields_of_the_groups_in_the_order_of_help() -> None:
    grouped = [f.name for group in GROUPS.values() for f in fields(group)]
    assert [f.name for f in fields(TrainConfig)] == grouped
