"""run/bars.py: what a terminal of 80 columns shows of a work under way."""

import errno
import fcntl
import io
import os
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from run.bars import Bar, progress_bar, reporting
from run.metrics import Progress
from run.ranks import Ranks
from training.evaluation import evaluate

ROW = {"step": 12345, "loss": 12.3456, "grad_norm": 1.0, "learning_rate": 2e-4}
ROW |= {"tokens_per_second": 123_456.0, "peak_memory_bytes": 123 << 30}
# given the columns of a terminal, makes it stderr; what that returns reads the lines of its screen
MakeScreen = Callable[[int], Callable[[], list[str]]]


@pytest.fixture
def make_screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeScreen]:
    with ExitStack() as opened:

        def make(columns: int) -> Callable[[], list[str]]:
            ours, theirs = os.openpty()
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            stream = opened.enter_context(os.fdopen(theirs, "w", encoding="utf-8"))
            reader = opened.enter_context(os.fdopen(ours, "rb", buffering=0))
            monkeypatch.setattr(sys, "stderr", stream)

            def lines() -> list[str]:
                stream.write("\nend")
                stream.flush()
                shown = b""
                while not shown.endswith(b"\nend"):
                    shown += reader.read(1 << 16)
                text = shown.decode().replace("\x1b[A", "").replace("\r", "\n")
                return [line.rstrip() for line in text.split("\n")[:-1] if line.strip()]

            return lines

        yield make


def train_to(step: int, num_steps: int, row: dict[str, Any]) -> None:
    progress = Progress(num_steps, step - 1)
    # a bar is drawn at most ten times a second
    progress._bar.mininterval = 0
    progress.advance()
    progress.show(row)
    progress.close()


@pytest.mark.parametrize(
    ("step", "num_steps", "row"),
    [
        (38, 468, {**ROW, "loss": 1.2345, "tokens_per_second": 18_021.0}),
        (12_345, 46_800, ROW),
        (12_345, 46_800, {**ROW, "eval_loss": 10.1234}),
    ],
    ids=["usual", "longest", "evaluated"],
)
def test_the_step_the_loss_the_speed_and_what_is_left_fit_80_columns(
    make_screen: MakeScreen,
    capsys: pytest.CaptureFixture[str],
    step: int,
    num_steps: int,
    row: dict[str, Any],
) -> None:
    lines = make_screen(80)
    train_to(step, num_steps, row)
    drawn = lines()
    assert max(map(len, drawn)) <= 80
    last = drawn[-1]
    assert last.startswith("training |")
    assert f"| {step}/{num_steps}, " in last
    assert f" left, loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tok/s  " in last
    assert last.endswith(" GiB")
    # an evaluation is too rare to be shown beside the bar alone
    said = capsys.readouterr().out
    expected = f"step {row['step']}/{num_steps}  eval_loss 10.1234  loss 12.3456  123,456 tok/s"
    assert said.startswith(expected) if "eval_loss" in row else not said


@pytest.mark.parametrize("columns", [80, 40])
def test_loading_and_the_like_fit_the_terminal(make_screen: MakeScreen, columns: int) -> None:
    lines = make_screen(columns)
    with reporting("writing GGUF", "tensors") as report:
        report(0, 99_999)
        report(50_000, 99_999)
    drawn = lines()
    assert max(map(len, drawn)) <= columns
    assert drawn[0].startswith("writing GGUF |")
    assert "| 0/0 tensors, ? left"[: columns - 15] in drawn[0]


def test_the_end_is_seen_as_soon_as_it_is_known(make_screen: MakeScreen) -> None:
    lines = make_screen(80)
    with progress_bar("loading", "tensors", 291, done=123) as bar:
        bar.mininterval = 0
        bar.update(22)
    assert "| 145/291 tensors, 00:0" in lines()[-1]


def test_without_a_known_end_there_is_a_count_and_a_speed(make_screen: MakeScreen) -> None:
    lines = make_screen(80)
    with progress_bar("tokenizing", "records") as bar:
        bar.mininterval = 0
        bar.update(123_456_789)
    drawn = lines()
    assert drawn[0] == "tokenizing 0 records, ? records/s"
    assert drawn[-1].startswith("tokenizing 123,456,789 records, ")
    assert len(drawn[-1]) <= 80


def test_an_evaluation_has_a_bar_under_that_of_the_training(
    make_screen: MakeScreen, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    monkeypatch.setattr(Bar, "update", lambda bar: counted.append(bar.desc))
    lines = make_screen(80)
    run: Any = SimpleNamespace(ranks=Ranks(), micro_step=SimpleNamespace())
    run.job = SimpleNamespace(
        evaluation=SimpleNamespace(
            num_steps=3,
            num_target_tokens=6,
            micro_batches=lambda step: ([step],),
            batch=lambda rows: rows[0],
        )
    )
    run.micro_step.evaluate = lambda batch: torch.tensor(2.0 * batch)
    stop: Any = SimpleNamespace(number=0)
    progress = Progress(10, 5)
    assert evaluate(run, stop) == 1.0
    assert counted == ["evaluating"] * 3
    progress.close()
    drawn = lines()
    assert max(map(len, drawn)) <= 80
    assert any(line.startswith("evaluating |") and "| 0/3 batches, " in line for line in drawn)
    # it goes when it is done
    assert drawn[-1].startswith("training |")


def test_other_ranks_and_files_have_no_bar(
    make_screen: MakeScreen, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("loading", "tensors", 3) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    lines = make_screen(80)
    with reporting("loading", "tensors", is_shown=False) as report:
        report(1, 3)
    assert lines() == []


def test_a_stream_that_refuses_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        is_full = False

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if self.is_full:
                raise OSError(errno.ENOSPC, "no room")
            return super().write(text)

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("loading", "tensors", 3) as bar:
        bar.mininterval = 0
        stream.is_full = True
        bar.update()
        bar.update()
    assert bar.n == 2
    assert "0/3 tensors" in stream.getvalue()
