"""What a run shows of itself: loss.png, trackers, answers on the way, early stopping, the bar."""

import errno
import itertools
import json
import shutil
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.micro_steps import in_runs
from support.short_model import short_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run.log
import train
from optim.adamw import AdamW
from prepare.job import BUNDLED
from rows.batch import Batch
from run.metrics import Progress
from step.micro_step import MicroStep

ADAPTER = "adapter_model.safetensors"
CLOCK = ("tokens_per_second", "peak_memory_bytes")


def train_small(folder: Path, flags: str, name: str = "out", prompt: str = "") -> Path:
    data = folder / "data.jsonl"
    if not data.is_file():
        lines = (BUNDLED / "data.jsonl").read_text().splitlines()
        data.write_text("\n".join(lines[:120:10]) + "\n")
    given = f"--model {short_model()} --data {data} --output {folder / name} --device cpu"
    given += " --batch-size 2 --gradient-accumulation-steps 1 --lora-r 2 --max-steps 6"
    train.main([*given.split(), *flags.split(), "--sample-prompt", prompt])
    return folder / name


def rows_of(output: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let SIGTERM come in a step, counted from 1."""
    take, calls = AdamW.step, []

    def stopped(self: AdamW, *args: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return take(self, *args)

    monkeypatch.setattr(AdamW, "step", stopped)


@pytest.mark.draws
def test_the_losses_are_drawn_at_the_end_and_when_a_run_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 3)
    output = train_small(tmp_path, f"--eval-data {BUNDLED / 'eval.jsonl'}")
    stopped = (output / "loss.png").read_bytes()
    assert len(rows_of(output)) == 4
    train_small(tmp_path, f"--eval-data {BUNDLED / 'eval.jsonl'} --resume")
    whole = (output / "loss.png").read_bytes()
    assert whole != stopped
    assert stopped[:8] == whole[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_matplotlib_a_line_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.log, "can_draw", lambda: False)
    output = train_small(tmp_path, "")
    assert capsys.readouterr().out.count("no loss.png without matplotlib: pip install") == 1
    assert not (output / "loss.png").exists()


def events_of(output: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_every_figure_of_the_metrics_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"--report-to tensorboard --eval-data {tmp_path / 'data.jsonl'} --save-steps 2"
    stop_at(monkeypatch, 5)
    output = train_small(tmp_path, flags)
    # killed rather than stopped: the events of steps 3 to 5 are there, their checkpoint is not
    for path in (output / "checkpoint-5", output / "checkpoint-4"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    train_small(tmp_path, f"{flags} --resume")
    rows = rows_of(output)
    assert [row["step"] for row in rows] == list(range(7))
    events = events_of(output)
    assert set(events) == {name for row in rows for name in row} - {"step"}
    for name, values in events.items():
        expected = {row["step"]: row[name] for row in rows if name in row}
        assert values.keys() == expected.keys(), name
        for step, value in values.items():
            # an event holds a float32
            assert value == pytest.approx(expected[step], rel=2**-24), (name, step)


class Recorder(ModuleType):
    """Stands in for a tracker's package, of which two functions are its run's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = type(sys.__spec__)(name, None)
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.num_finished = 0

    def init(self, **given: Any) -> "Recorder":
        self.started.append(given)
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.logged.append((step, figures))

    def finish(self) -> None:
        self.num_finished += 1


def test_wandb_and_trackio_follow_a_run_and_its_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers = [Recorder("wandb"), Recorder("trackio")]
    for tracker in trackers:
        monkeypatch.setitem(sys.modules, tracker.__name__, tracker)
    stop_at(monkeypatch, 3)
    output = train_small(tmp_path, "--report-to wandb,trackio")
    train_small(tmp_path, "--report-to wandb,trackio --resume")
    rows = rows_of(output)
    for tracker in trackers:
        first, second = tracker.started
        assert first["project"] == "quatrain"
        assert first["config"]["lora_r"] == 2
        assert (first["name"], first["resume"]) == (second["name"], "allow")
        assert tracker.num_finished == 2
        assert [step for step, _ in tracker.logged] == [1, 2, 3, 4, 5, 6]
        for (step, figures), row in zip(tracker.logged, rows, strict=True):
            assert {"step": step, **figures} == row


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--report-to mlflow", "--report-to must name tensorboard, wandb, trackio only"),
        ("--report-to trackio", r"must find the package trackio: .*; pip install -e '\.\[trackio"),
        ("--early-stopping-patience 2", "must be given with --eval-steps, and --eval-data"),
        ("--group-by-length --no-shuffle", "--group-by-length must be given with --shuffle"),
        ("--group-by-length --packing", "without --packing, which leaves no padding"),
        ("--sample-steps -1", "--sample-steps must be at least 0"),
    ],
)
def test_what_cannot_be_followed_is_refused_at_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, complaint: str
) -> None:
    # whatever is installed
    monkeypatch.setattr("run.trackers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=complaint):
        train_small(tmp_path, flags)
    assert not (tmp_path / "out").exists()


def test_no_tracker_is_imported_that_is_not_asked_for(tmp_path: Path) -> None:
    before = {name for name in ("wandb", "trackio") if name in sys.modules}
    train_small(tmp_path, "")
    assert {name for name in ("wandb", "trackio") if name in sys.modules} == before


def test_an_answer_ends_where_the_template_ends_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # EOS is another token than the one behind a turn
    folder = Path(shutil.copytree(short_model(), tmp_path / "model"))
    for name, eos in (
        ("tokenizer_config.json", {"eos_token": "<|im_start|>"}),
        ("config.json", {"eos_token_id": 0}),
        ("generation_config.json", {"eos_token_id": 0}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | eos))
    stops: list[Collection[int]] = []

    def recorded(*given: Any) -> list[int]:
        stops.append(given[-1])
        return []

    monkeypatch.setattr("training.answers.generate_greedy", recorded)
    train_small(tmp_path, f"--model {folder} --max-steps 1", prompt="Who is Ember?")
    assert stops == [{0, 1}] * 2


def test_the_prompt_is_answered_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.answers.SAMPLE_TOKENS", 4)
    flags = "--sample-steps 2 --logging-steps 3 --learning-rate 3e-3 --save-steps 1"
    whole = train_small(tmp_path, flags, "whole", "Who is Ember?")
    answers = rows_of(whole, "samples.jsonl")
    assert [row["step"] for row in answers] == [0, 2, 4, 6]
    assert all(row["prompt"] == "Who is Ember?" and row["answer"] for row in answers)
    said = capsys.readouterr().out
    assert f"step 4: Who is Ember? -> {answers[2]['answer']}" in said
    stop_at(monkeypatch, 4)
    output = train_small(tmp_path, flags, "out", "Who is Ember?")
    train_small(tmp_path, f"{flags} --resume", "out", "Who is Ember?")
    assert rows_of(output, "samples.jsonl") == answers
    # what is called before is what was answered before the first step, not before the resumed one
    assert f"before  {answers[0]['answer']}\nafter   {answers[-1]['answer']}" in (
        capsys.readouterr().out
    )
    # nor does it change what is learned
    plain = train_small(tmp_path, "--learning-rate 3e-3", "plain")
    assert (plain / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def evaluate_to(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let a run's evaluations find given losses, one after the other."""
    left = list(losses)
    seen: list[int] = []

    def scripted(self: MicroStep, batch: Batch) -> torch.Tensor:
        loss = left[0]
        num_targets = int((batch.labels[:, 1:] != -100).sum())
        seen.append(len(batch.input_ids))
        # the last batch of an evaluation
        if sum(seen) == 12:
            left.pop(0)
            seen.clear()
        return torch.tensor(loss * num_targets)

    monkeypatch.setattr(MicroStep, "evaluate", in_runs(scripted, "evaluate"))


def test_a_run_that_no_longer_improves_ends_with_its_best_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # evaluations before step 1 and after each; the best is that of step 2
    losses = [3.0, 2.0, 1.0, float("nan"), 1.5, 1.0, 0.5]
    flags = f"--eval-data {tmp_path / 'data.jsonl'} --eval-steps 1 --save-steps 1"
    flags += " --early-stopping-patience 3"
    evaluate_to(monkeypatch, losses)
    stars = []
    monkeypatch.setattr("run.log.draw_losses", lambda rows, path, best: stars.append(best))
    whole = train_small(tmp_path, flags, "whole")
    assert stars == [2]
    assert [row["step"] for row in rows_of(whole)] == [0, 1, 2, 3, 4, 5]
    assert "the adapter of step 2 is taken: its eval_loss 1.0000 is the lowest" in (
        capsys.readouterr().out
    )
    best = load_file(whole / "checkpoint-2" / ADAPTER)
    saved = load_file(whole / ADAPTER)
    assert all(torch.equal(saved[name], best[name]) for name in best)
    # the best one outlives the process that trained it
    with monkeypatch.context() as patch:
        evaluate_to(patch, losses)
        stop_at(patch, 4)
        output = train_small(tmp_path, flags, "out")
    # that of step 4 had not begun
    evaluate_to(monkeypatch, losses[4:])
    train_small(tmp_path, f"{flags} --resume", "out")
    assert (output / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert [row["step"] for row in rows_of(output)] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"decide the result: --eval-steps was 1, now 2"):
        train_small(tmp_path, f"{flags} --eval-steps 2 --resume", "out")


def test_samples_of_like_lengths_are_resumed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_small(tmp_path, "--group-by-length --max-steps 9", "whole")
    stop_at(monkeypatch, 4)
    train_small(tmp_path, "--group-by-length --max-steps 9", "out")
    output = train_small(tmp_path, "--group-by-length --max-steps 9 --resume", "out")
    assert (output / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    plain = train_small(tmp_path, "--max-steps 9", "plain")
    assert (plain / ADAPTER).read_bytes() != (whole / ADAPTER).read_bytes()


def test_a_terminal_has_a_bar_with_what_is_left_speed_and_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(num_steps=10, step=4)
    row = {"step": 5, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4}
    progress.advance()
    progress.show(row | {"tokens_per_second": 1234.0, "peak_memory_bytes": 3 << 30})
    progress.close()
    last = capsys.readouterr().err.split("\r")[-1]
    assert "| 5/10, " in last
    assert " left, loss 1.0000  1,234 tok/s  3.00 GiB" in last


PROMPT = "Who is Ember?"
WATCHED = "--report-to wandb --sample-steps 2 --push-to-hub owner/name"


def fail(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("something that nobody foresaw")


def leave(*args: Any, **kwargs: Any) -> Any:
    sys.exit("this library ends the process")


def run_out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def refuse_print(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def at_call(number: int, function: Any, otherwise: Any = lambda *args, **kwargs: [1]) -> Any:
    """Let the n-th call, counted from 1, and those after it fail."""
    calls = itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        return (function if next(calls) >= number else otherwise)(*args, **kwargs)

    return called


GENERATE = "training.answers.generate_greedy"
# what fails, and the words that say so
DECORATIONS = {
    "matplotlib is looked for": ("run.log.can_draw", fail, "loss.png has failed"),
    "the chart is drawn": ("run.log.draw_losses", fail, "loss.png has failed"),
    "the chart's library ends the process": ("run.log.draw_losses", leave, "loss.png has failed"),
    "a tracker starts": ("wandb.init", fail, "--report-to wandb has failed"),
    "a tracker logs": ("wandb.log", at_call(3, fail), "--report-to wandb has failed"),
    "a tracker ends the process": ("wandb.log", leave, "--report-to wandb has failed"),
    "a tracker finishes": ("wandb.finish", fail, "--report-to wandb has failed"),
    "the prompt is answered": (GENERATE, fail, "--sample-prompt has failed"),
    "the prompt is answered at the end": (
        GENERATE,
        at_call(4, run_out_of_memory),
        "--sample-prompt has failed",
    ),
    "an answer is written": ("run.log.RunLog.add_answer", fail, "--sample-prompt has failed"),
    "the card is composed": ("training.results.model_card", fail, "README.md has failed"),
    "the adapter is pushed": ("training.results.push_folder", fail, "--push-to-hub has failed"),
    "steps are shown": ("run.metrics.print", refuse_print, ""),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing watches."""
    return train_small(tmp_path_factory.mktemp("plain"), "")


@pytest.mark.parametrize("place", DECORATIONS)
def test_what_only_watches_costs_no_byte_of_a_result(
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Recorder("wandb"))
    monkeypatch.setattr("prepare.job.check_push", lambda repository: None)
    monkeypatch.setattr("training.results.push_folder", lambda *args: "an address")
    monkeypatch.setattr("training.answers.SAMPLE_TOKENS", 4)
    where, how, words = DECORATIONS[place]
    monkeypatch.setattr(where, how, raising=False)
    output = train_small(tmp_path, WATCHED, "out", PROMPT)
    said = capsys.readouterr().out
    assert words in said
    assert (output / ADAPTER).read_bytes() == (plain / ADAPTER).read_bytes()
    figures = [
        [{k: v for k, v in row.items() if k not in CLOCK} for row in rows_of(folder)]
        for folder in (output, plain)
    ]
    assert figures[0] == figures[1]
    # whatever else watches goes on
    assert ("pushed the adapter: an address" in said) == ("pushed" not in place)
    assert (output / "README.md").is_file() == ("card" not in place)
    assert (output / "loss.png").is_file() == ("chart" not in place and "matplotlib" not in place)


def test_a_tracker_that_failed_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = [Recorder("wandb"), Recorder("trackio")]
    for tracker in trackers:
        monkeypatch.setitem(sys.modules, tracker.__name__, tracker)
    monkeypatch.setattr("wandb.log", at_call(3, fail, trackers[0].log))
    train_small(tmp_path, "--report-to wandb,trackio")
    assert [[step for step, _ in tracker.logged] for tracker in trackers] == [
        [1, 2],
        [1, 2, 3, 4, 5, 6],
    ]
    assert [tracker.num_finished for tracker in trackers] == [0, 1]
    assert capsys.readouterr().out.count("--report-to wandb has failed") == 1


def test_the_adapter_is_saved_before_anything_that_only_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(name: str) -> Any:
        def noted(*args: Any, **kwargs: Any) -> list[int]:
            seen.append((name, (tmp_path / "out" / ADAPTER).is_file()))
            return [1]

        return noted

    monkeypatch.setitem(sys.modules, "wandb", Recorder("wandb"))
    places = ("wandb.finish", "run.log.draw_losses", "training.results.model_card", GENERATE)
    for place in places:
        monkeypatch.setattr(place, note(place))
    train_small(tmp_path, "--report-to wandb", "out", PROMPT)
    # the first answer is to the model before its first step
    assert seen.pop(0) == (GENERATE, False)
    assert sorted(seen) == sorted((place, True) for place in places)
