"""prepare/first_lines.py: what a run uses and where it writes, in a line or two."""

from dataclasses import replace
from pathlib import Path

import pytest

import prepare.first_lines
from checkpoint.opening import open_checkpoint
from llama.model import projection_shapes, projections
from prepare.adapter import lora_config
from prepare.first_lines import first_lines, near, packed, rounded
from prepare.job import BUNDLED
from run.config import TrainConfig

CONFIG = TrainConfig(
    model=str(BUNDLED / "model"), data=str(BUNDLED / "data.jsonl"), device="cpu", dtype="float32"
)


def lines_of(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, device: str) -> list[str]:
    monkeypatch.setattr(prepare.first_lines, "describe_device", lambda name: device)
    checkpoint = open_checkpoint(BUNDLED / "model")
    return first_lines(config, lora_config(config, projections(checkpoint.config)), checkpoint)


def test_two_lines_say_what_a_run_uses_and_where_it_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(BUNDLED.parent)
    # the bundled model's numbers: 16 rows and columns beside each of its projections
    shapes = projection_shapes(open_checkpoint(BUNDLED / "model").config).values()
    assert 16 * sum(map(sum, shapes)) == 143_360
    assert lines_of(CONFIG, monkeypatch, "CPU (no NVIDIA GPU)") == [
        "CPU (no NVIDIA GPU), float32; bundled/model: 931K parameters, 143K trained",
        "data bundled/data.jsonl; output a new folder in out",
    ]
    given = replace(CONFIG, model="owner/base", data="owner/data", output="/far/away", lora_r=8)
    assert lines_of(given, monkeypatch, "NVIDIA H200, 139.8 GiB") == [
        "NVIDIA H200, 139.8 GiB, float32; owner/base: 859K parameters, 71.7K trained",
        "data owner/data; output /far/away",
    ]


def test_a_part_that_would_not_fit_begins_a_line() -> None:
    assert packed(["a" * 40, "b" * 38, "c", "d" * 90, "e"]) == [
        f"{'a' * 40}; {'b' * 38}",
        "c",
        "d" * 90,
        "e",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (8_030_261_248, "8.03B"),
        (70_553_706_496, "70.6B"),
        (134_515_008, "135M"),
        (41_943_040, "41.9M"),
        (999_600_000, "1B"),
        (999_400_000, "999M"),
        (143_360, "143K"),
        (999, "999"),
    ],
)
def test_parameters_are_counted_in_three_digits(number: int, text: str) -> None:
    assert rounded(number) == text


def test_a_place_is_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert near(str(tmp_path / "a" / "b")) == "a/b"
    assert near("owner/name") == "owner/name"
    assert near("/elsewhere/x") == "/elsewhere/x"
