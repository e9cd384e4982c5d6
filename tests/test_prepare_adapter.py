"""prepare/adapter.py: the adapter to start from decides what no flag was given for."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from llama.model import PROJECTIONS
from llama.targets import update_sizes
from lora.adapter_file import read_adapter_config
from lora.config import LoRAConfig
from prepare.adapter import follow_adapter, lora_config
from run.config import TrainConfig

PATHS = [f"model.layers.{layer}.x.{name}" for layer in (0, 1) for name in PROJECTIONS]
FIELDS = {"peft_type": "LORA", "r": 9, "lora_alpha": 6, "target_modules": ["v_proj", "q_proj"]}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(FIELDS | changes))
    return folder


def follow(folder: Path, given: dict[str, Any]) -> TrainConfig:
    config, lora = follow_adapter(TrainConfig(**given), given, folder, PROJECTIONS, PATHS)
    assert asdict(lora) == asdict(read_adapter_config(folder)) | {"lora_dropout": 0.0}
    return config


def shape_of(config: TrainConfig) -> tuple[int, float, bool, str]:
    return config.lora_r, config.lora_alpha, config.use_rslora, config.target_modules


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (9, 6.0, False, "q_proj,v_proj")),
        ({"use_rslora": True}, (9, 6.0, True, "q_proj,v_proj")),
        ({"target_modules": r".*\.(up|down)_proj"}, (9, 6.0, False, "up_proj,down_proj")),
        ({"target_modules": ["layers.1.x.k_proj"]}, (9, 6.0, False, "k_proj")),
        ({"target_modules": "all-linear"}, (9, 6.0, False, "all-linear")),
        ({"target_modules": sorted(PROJECTIONS)}, (9, 6.0, False, "all-linear")),
    ],
)
def test_without_flags_the_adapters_shape_is_taken(
    tmp_path: Path, changes: dict[str, Any], shape: tuple[int, float, bool, str]
) -> None:
    config = follow(write(tmp_path, **changes), {})
    assert shape_of(config) == shape
    # what the run then writes down is what it asks for
    assert follow(tmp_path, asdict(config)) == config


@pytest.mark.parametrize(
    "given",
    [
        {"lora_r": 9},
        {"lora_alpha": 6.0},
        {"use_rslora": False},
        {"target_modules": "v_proj, q_proj"},
        # 2 / sqrt(9) = 6 / 9
        {"use_rslora": True, "lora_alpha": 2.0},
    ],
    ids=lambda given: " ".join(given),
)
def test_flags_that_say_the_same_are_kept(tmp_path: Path, given: dict[str, Any]) -> None:
    config = follow(write(tmp_path), given)
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # the default, but given
        ({"lora_r": 16}, "--lora-r must be as in .* has 9, the settings have 16; leave"),
        ({"lora_alpha": 32.0}, r"--lora-alpha must be .* has 6\.0, the settings have 32\.0;"),
        ({"use_rslora": True}, "--use-rslora must be .* has False, the settings have True;"),
        ({"target_modules": "all-linear"}, "--target-modules must be .* has q_proj,v_proj, the"),
        ({"target_modules": "q_proj"}, "--target-modules must be"),
        (
            {"lora_r": 8, "lora_alpha": 6.0, "target_modules": "q_proj"},
            "--lora-r and --target-modules must be .* has 9 and q_proj,v_proj, .* have 8 and q",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_flags_that_contradict_the_adapter_are_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        follow(write(tmp_path), given)


def test_the_dropout_is_the_flags(tmp_path: Path) -> None:
    write(tmp_path, lora_dropout=0.5)
    config = TrainConfig(lora_dropout=0.25)
    _, lora = follow_adapter(config, (), tmp_path, PROJECTIONS, PATHS)
    assert lora.lora_dropout == 0.25


TENSORS = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]


def follow_mixture(folder: Path, given: dict[str, Any]) -> tuple[TrainConfig, LoRAConfig]:
    names = PROJECTIONS[:4]
    paths = [f"model.layers.0.self_attn.{name}" for name in names]
    return follow_adapter(TrainConfig(**given), given, folder, names, paths, TENSORS)


@pytest.mark.parametrize("modules", [["q_proj"], []], ids=["", "experts alone"])
def test_tensors_of_experts_are_taken_over(tmp_path: Path, modules: list[str]) -> None:
    write(tmp_path, target_modules=modules, target_parameters=["mlp.experts.down_proj"])
    config, lora = follow_mixture(tmp_path, {})
    assert (config.target_modules, config.target_parameters) == (",".join(modules), "down_proj")
    assert lora.target_parameters == ("mlp.experts.down_proj",)
    assert follow_mixture(tmp_path, asdict(config))[0] == config
    with pytest.raises(ValueError, match=r"--target-parameters must be .* has down_proj, the sett"):
        follow_mixture(tmp_path, {"target_parameters": "gate_up_proj,down_proj"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_parameters": "up_proj"}, "all experts, .* has down_proj, gate_up_proj: got 'up"),
        ({"target_parameters": "down_proj", "lora_dropout": 0.1}, "--lora-dropout must be 0 with"),
    ],
    ids=["unknown", "dropout"],
)
def test_flags_that_no_experts_have_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        update_sizes(lora_config(TrainConfig(**given), PROJECTIONS[:4]), [], TENSORS)


def test_a_dense_model_has_no_tensors_of_experts() -> None:
    lora = lora_config(TrainConfig(target_parameters="down_proj"), PROJECTIONS)
    with pytest.raises(
        ValueError, match="is for mixtures of experts: got target_parameters 'down_proj'"
    ):
        update_sizes(lora, PATHS)
