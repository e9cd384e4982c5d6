"""lora/config.py: the update's size and the names of what gets one."""

import math
import re
from typing import Any

import pytest

from lora.config import ALL_LINEAR, LoRAConfig, UpdateSize, resolve_target_modules

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VALID: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": ("q_proj",),
}


def make(**changes: Any) -> LoRAConfig:
    return LoRAConfig(**{**VALID, **changes})


def size_of(**changes: Any) -> UpdateSize | None:
    return make(**changes).update_size("model.layers.0.self_attn.q_proj")


def test_scaling_is_alpha_over_rank_or_over_its_root() -> None:
    assert size_of() == (16, 2)
    assert size_of(r=8, lora_alpha=10) == (8, 1.25)
    # PEFT gives 5.65685 for these
    assert size_of(r=8, lora_alpha=16, use_rslora=True) == (8, 16 / math.sqrt(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "--lora-r must be at least 1: got 0"),
        ({"r": 10**18}, "--lora-r must be at most 65,536: got 1000000000000000000"),
        ({"rank_pattern": {"q_proj": 10**18}}, "--lora-r must be at most 65,536"),
        ({"lora_alpha": 10**400}, "--lora-alpha must be positive"),
        ({"lora_alpha": 0}, "--lora-alpha must be positive: got 0"),
        ({"lora_alpha": float("nan")}, "--lora-alpha must be positive: got nan"),
        ({"lora_alpha": float("inf")}, "--lora-alpha must be positive: got inf"),
        ({"lora_dropout": 1.0}, "--lora-dropout must be in [0, 1): got 1.0"),
        ({"lora_dropout": -0.1}, "--lora-dropout must be in [0, 1): got -0.1"),
        ({"lora_dropout": float("nan")}, "--lora-dropout must be in [0, 1): got nan"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value)).strip("-") if isinstance(value, dict) else "",
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**changes)


def test_targets_come_once_and_in_the_models_order() -> None:
    assert resolve_target_modules([ALL_LINEAR], PROJECTIONS) == PROJECTIONS
    names = ["v_proj", "q_proj", "v_proj"]
    assert resolve_target_modules(names, PROJECTIONS) == ("q_proj", "v_proj")
    assert resolve_target_modules(iter(names), PROJECTIONS) == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        (["query_proj"], "got 'query_proj'; did you mean"),
        (["qproj"], "got 'qproj'; did you mean q_proj"),
        (["q_proj", "lm_head"], "got 'lm_head'; did you mean"),
        ([ALL_LINEAR, "q_proj"], "got 'all-linear'; did you mean"),
        (["xyz"], "did you mean q_proj or k_proj or v_proj or o_proj"),
        ([], "must name at least one projection: got none; try all-linear"),
    ],
    ids=lambda value: "-".join(value) or "none" if isinstance(value, list) else "",
)
def test_an_unknown_target_gets_the_nearest_names(requested: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        resolve_target_modules(requested, PROJECTIONS)
    assert "--target-modules must" in str(raised.value)


@pytest.mark.parametrize("excluded", [(), ("k_proj",), r".*k_proj"], ids=["none", "names", "text"])
def test_targets_beneath_a_path_are_no_others(excluded: tuple[str, ...] | str) -> None:
    path = "model.language_model"
    config = make(target_modules=("q_proj", "k_proj"), exclude_modules=excluded).beneath(path)
    assert config.has_target(f"{path}.layers.0.self_attn.q_proj")
    assert config.has_target(f"{path}.layers.0.self_attn.k_proj") == (not excluded)
    assert not config.has_target("model.vision_tower.layers.0.self_attn.q_proj")
    assert not config.has_target("model.language_models.layers.0.self_attn.q_proj")
    assert config.beneath(path) == config
