"""benchmarks/fp8_curves.py: which runs it starts, what it keeps of them, its table and chart."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fp8_curves
from benchmarks.fp8_curves import Case, Course, Data, run, train
from benchmarks.tables import fp8_curves_table

DATA = Data("sums", "train.jsonl", "eval.jsonl")
COURSE = Course("a/model", num_steps=4, eval_steps=2, flags=["--lora-r", "8"])
METRICS: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 2.0},
    {"step": 1, "loss": 1.9},
    {"step": 2, "loss": 1.7, "eval_loss": 1.5},
    {"step": 3, "loss": 1.3},
    {"step": 4, "loss": 1.2, "eval_loss": 1.1234567},
]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let processes of train.py write metrics and nothing else; what each was started with."""
    commands: list[list[str]] = []

    def start(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        output = Path(command[command.index("--output") + 1])
        output.mkdir(parents=True)
        is_evaluation = command[command.index("--max-steps") + 1] == "0"
        rows = [{"step": 0, "eval_loss": 1.13}] if is_evaluation else METRICS
        (output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fp8_curves.subprocess, "run", start)
    return commands


def test_a_run_has_its_losses_by_evaluation(started: list[list[str]], tmp_path: Path) -> None:
    assert run(Case(DATA, "bf16", 3), COURSE, tmp_path) == {
        "data": "sums",
        "kind": "bf16",
        "seed": 3,
        "steps": [0, 2, 4],
        "eval_losses": [2.0, 1.5, 1.12346],
        "train_losses": [1.8, 1.25],
    }
    (command,) = started
    assert command[:2] == [sys.executable, "train.py"]
    text = " ".join(command)
    for given in (
        "--model a/model --data train.jsonl --eval-data eval.jsonl --lora-r 8",
        "--max-steps 4 --eval-steps 2 --seed 3",
        "--dtype bfloat16",
    ):
        assert given in text
    assert "--base-compute" not in text
    assert "--quant" not in text


def test_an_adapter_of_fp8_is_evaluated_by_a_process_in_bf16(
    started: list[list[str]], tmp_path: Path
) -> None:
    row = run(Case(DATA, "fp8", 3), COURSE, tmp_path)
    assert row["served_eval_loss"] == 1.13
    training, evaluation = (" ".join(command) for command in started)
    assert "--base-compute fp8" in training
    assert "--base-compute" not in evaluation
    output = training.partition("--output ")[2]
    assert f"--init-adapter {output} --max-steps 0" in evaluation
    assert not evaluation.endswith(f"--output {output}")


def test_a_base_that_is_not_quantized_is_one_of_the_kinds(
    started: list[list[str]], tmp_path: Path
) -> None:
    run(Case(DATA, "unquantized", 1), COURSE, tmp_path)
    assert "--quant none" in " ".join(started[0])


def test_a_process_that_fails_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"train.py must succeed: .*--no-such-flag"):
        train(["--no-such-flag"], tmp_path / "out")


def test_all_runs_are_recorded_in_order(
    started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    flags = ["--model", "a/model", "--data", *DATA, "--data", "chat", "c/train", "c/eval"]
    flags += ["--seeds", "1", "2", "--parallel", "3", "--commit", "abc", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["fp8_curves", *flags, "--", "--lora-r", "8"])
    assert fp8_curves.main() == 0
    record = json.loads(path.read_text())
    assert [(row["data"], row["kind"], row["seed"]) for row in record["rows"]] == [
        (name, kind, seed)
        for name in ("sums", "chat")
        for kind in ("bf16", "int8", "fp8", "fp8-backward", "unquantized")
        for seed in (1, 2)
    ]
    # those of 8 bits twice
    assert len(started) == 2 * (5 + 3) * 2
    assert record["model"] == "model"
    assert record["files"]["chat"] == ["train", "eval"]
    assert record["flags"][-2:] == ["--lora-r", "8"]


def row(kind: str, seed: int, loss: float, **more: float) -> dict[str, Any]:
    found = {"data": "sums", "kind": kind, "seed": seed, "steps": [0, 4]}
    return found | {"eval_losses": [2.0, loss], "train_losses": [1.5], **more}


ROWS = [
    row("bf16", 1, 0.999),
    row("bf16", 2, 1.001),
    row("fp8", 1, 1.0, served_eval_loss=1.0),
    row("fp8", 2, 1.004, served_eval_loss=1.003),
    row("unquantized", 1, 0.95),
    row("unquantized", 2, 0.95),
]


def test_means_stand_beside_the_spread_of_the_seeds() -> None:
    _, lines = fp8_curves_table(ROWS)
    assert lines == [
        ["sums", "bf16", "2", "1.0000", "0.20%", "-", "-"],
        ["sums", "FP8", "2", "1.0020", "0.40%", "+0.20%", "1.0015"],
        ["sums", "bf16, base not quantized", "2", "0.9500", "0.00%", "-5.00%", "-"],
    ]


def test_the_chart_has_every_run() -> None:
    charts = pytest.importorskip("benchmarks.charts", exc_type=ImportError)
    record = {"rows": ROWS, "files": {"sums": []}, "model": "a model", "device": "a GPU"}
    figure = charts.fp8_curves_figure(record)
    losses, differences = figure.axes
    # a mean a kind; of the others the unquantized base is left out, which is farther away
    assert [list(line.get_ydata()) for line in losses.lines] == [
        [2.0, 1.0], [2.0, 1.002], [2.0, 0.95],
    ]  # fmt: skip
    ends = [line.get_ydata()[-1] for line in differences.lines]
    assert ends == pytest.approx([-0.1, 0.1, 0.0, 0.4])
