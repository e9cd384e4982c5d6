"""Trackers that show a run's figures: TensorBoard, Weights & Biases, trackio.

Each is an optional extra, imported only if --report-to names it.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from run.checkpoint import RunState
from run.config import TrainConfig
from run.flags import OutputFlags
from run.metrics import Row
from run.watching import Watching

PROJECT = "quatrain"
TENSORBOARD_FOLDER = "tensorboard"


class Tracker(Protocol):
    """A library that shows the figures of a run."""

    def log(self, figures: Mapping[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class _TensorBoard:
    """Event files in the run's folder; events after the resumed step are purged."""

    def __init__(self, config: TrainConfig, state: RunState) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = Path(config.output) / TENSORBOARD_FOLDER
        self._writer = SummaryWriter(str(folder), purge_step=state.step + 1 if state.step else None)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def run_name(config: TrainConfig, state: RunState) -> str:
    """A name of this run and no other, which stays the same when the run is resumed."""
    # absolute: `.` has no name
    folder = Path(config.output).absolute().name
    return f"{folder}-{state.started[:19].replace(':', '')}"


class _Wandb:
    def __init__(self, config: TrainConfig, state: RunState) -> None:
        name = run_name(config, state)
        self._run: Any = importlib.import_module("wandb").init(
            project=PROJECT,
            name=name,
            id=name,
            resume="allow",
            dir=config.output,
            config=asdict(config),
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, config: TrainConfig, state: RunState) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        self._trackio.init(
            project=PROJECT,
            name=run_name(config, state),
            resume="allow",
            config=asdict(config),
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(figures), step=step)

    def finish(self) -> None:
        self._trackio.finish()


_TRACKERS: dict[str, Callable[[TrainConfig, RunState], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def tracker_names(config: OutputFlags) -> list[str]:
    """The trackers of --report-to.

    Raises:
        ValueError: there is no such tracker, or its package is not installed.
    """
    names = [name.strip() for name in config.report_to.split(",") if name.strip()]
    for name in names:
        if name not in _TRACKERS:
            raise ValueError(f"--report-to must name {', '.join(_TRACKERS)} only: got {name}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--report-to {name} must find the package {name}: it is not installed; "
                f"pip install -e '.[{name}]', or leave it out"
            )
    return names


class Trackers:
    """The trackers of --report-to. One that fails is reported, and left out from then on."""

    def __init__(self, config: TrainConfig, state: RunState, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}
        for name in tracker_names(config):
            with self._watching(name):
                self._open[name] = _TRACKERS[name](config, state)

    def log(self, row: Row) -> None:
        """Send a row of metrics, each figure under its name in metrics.jsonl."""
        figures = {n: v for n, v in row.items() if n != "step" and math.isfinite(v)}
        for name in list(self._open):
            tracker = self._open.pop(name)
            with self._watching(name):
                tracker.log(figures, int(row["step"]))
                self._open[name] = tracker

    def finish(self) -> None:
        for name, tracker in self._open.items():
            with self._watching(name, is_last=True):
                tracker.finish()

    def _watching(self, name: str, is_last: bool = False) -> Watching:
        return Watching(f"--report-to {name}", self._say, is_last=is_last)
