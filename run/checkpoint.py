"""Checkpoints of a run, from which it resumes: folders `checkpoint-N`, in safetensors and JSON.

A model's checkpoint, which a run begins with, is the room `checkpoint/`.

    checkpoint-N/   the adapter, as lora/ writes it
                    optimizer.safetensors     the moments: float32, or codes and their scales
                    best.safetensors          the adapter with the lowest eval_loss, if kept
                    state.json                counters, loss scale, time of the first start
                    sha256.json               the hash of every other file

Nothing is pickled, unlike transformers' optimizer.pt and rng_state.pth. No random state is kept:
every step derives its seeds from the run's seed and from its own number. The folder gets its name
when all its files are on the disk, so a killed process leaves no half checkpoint; the hashes find
damage that the disk does later. A file that cannot be read, or a state that this version does not
know, does not count as damage: the folder stays as it is, and the message says so.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreign.json_text import read_object
from foreign.reading import Reading
from run.atomic import new_folder, remove_folder

OPTIMIZER_FILE = "optimizer.safetensors"
BEST_FILE = "best.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "sha256.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpoint(ValueError):
    """A checkpoint with a missing file, or with a file that differs from its hash."""


@dataclass
class RunState:
    """Everything that a resumed run needs besides the adapter and the moments."""

    started: str  # ISO time of the first start; chat templates may print the date
    step: int = 0  # optimizer steps done, skipped ones included
    num_updates: int = 0  # steps that changed the parameters
    num_skipped: int = 0  # steps whose gradients were not finite
    num_skipped_in_a_row: int = 0
    tokens: int = 0  # seen so far, padding left out
    target_tokens: int = 0  # learned so far
    loss_scale: float = 1.0
    num_good_steps: int = 0  # since the loss scale last changed
    best_eval_loss: float | None = None
    best_step: int = 0
    num_evaluations_since_best: int = 0
    # the row of metrics that waits for its eval_loss: a signal stopped the evaluation
    unevaluated: dict[str, Any] = field(default_factory=dict)
    num_ranks: int = 1
    base: str = ""  # identity of the model's checkpoint; empty where version 0.1 wrote the state

    def count(self, is_skipped: bool) -> None:
        """Count a step, once it is known whether its gradients were finite."""
        self.num_updates += not is_skipped
        self.num_skipped += is_skipped
        self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if is_skipped else 0

    def note_evaluation(self, eval_loss: float) -> bool:
        """Record an evaluation; return whether its loss is the lowest so far. A NaN never is."""
        is_best = eval_loss < (math.inf if self.best_eval_loss is None else self.best_eval_loss)
        if is_best:
            self.best_eval_loss, self.best_step = eval_loss, self.step
        self.num_evaluations_since_best = 0 if is_best else self.num_evaluations_since_best + 1
        return is_best


@dataclass(frozen=True)
class ResumePoint:
    """A whole checkpoint, read from the disk except for its adapter, which lora/ reads."""

    path: Path
    state: RunState
    moments: dict[str, Tensor]
    best: dict[str, Tensor]  # the best adapter's tensors; empty if it is not kept


def checkpoint_name(state: RunState) -> str:
    return f"checkpoint-{state.step}"


def save_checkpoint(
    path: Path,
    state: RunState,
    moments: Mapping[str, Tensor],
    write_adapter: Callable[[Path], None],
    best: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        OSError: the disk refused; no part of the checkpoint is left.
    """
    with new_folder(path) as partial:
        write_adapter(partial)
        save_file({name: t.cpu() for name, t in moments.items()}, partial / OPTIMIZER_FILE)
        if best:
            save_file(dict(best), partial / BEST_FILE)
        (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        hashes = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST_FILE).write_text(json.dumps(hashes, indent=2) + "\n")


def remove_old_checkpoints(folder: Path, num_kept: int) -> None:
    """Remove all checkpoints except the last `num_kept`."""
    for path in list_checkpoints(folder)[:-num_kept]:
        remove_folder(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """List a run's checkpoints in the order of their steps."""
    numbered = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()
    }
    return [numbered[step] for step in sorted(numbered)]


def load_newest_checkpoint(folder: Path) -> tuple[ResumePoint | None, dict[Path, str]]:
    """Read the last whole checkpoint of a folder.

    Returns:
        The checkpoint, or None if the folder has none at all; and for each later, damaged
        checkpoint what is wrong with it.

    Raises:
        ValueError: there are checkpoints and none is whole, or another version wrote one.
        OSError: a checkpoint cannot be read.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path), damaged
        except DamagedCheckpoint as error:
            damaged[path] = str(error)
    if damaged:
        raise ValueError(
            f"one of the checkpoints in {folder} must be whole: {'; '.join(damaged.values())}; "
            "move them away to start from the first step"
        )
    return None, damaged


def load_checkpoint(path: Path) -> ResumePoint:
    """Read a checkpoint's state and moments.

    Raises:
        DamagedCheckpoint: a file is missing, or differs from its hash.
        ValueError: the checkpoint is whole, and another version wrote it.
        OSError: a file cannot be read, which says nothing about its content.
    """
    unchanged = (
        f"{path} is left as it is; move it away by hand to go on from the checkpoint before it"
    )
    try:
        _check_hashes(path)
        state = read_state(path / STATE_FILE)
        best = path / BEST_FILE
        return ResumePoint(
            path,
            state,
            moments=load_file(path / OPTIMIZER_FILE),
            best=load_file(best) if best.is_file() else {},
        )
    except DamagedCheckpoint:
        raise
    except OSError as error:
        raise OSError(f"{path} must be readable: got {error}; try again; {unchanged}") from error
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{path} must be a checkpoint of this version: got {error}, with the hashes that it "
            f"was written with; go on with the version that wrote it; {unchanged}"
        ) from error


def read_state(path: Path) -> RunState:
    """Read the state.json of a checkpoint.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has other fields than RunState, or a value that no run can have.
    """
    with Reading(path):
        state = RunState(**read_object(path))
        for f in fields(RunState):
            _check_value(path, f.name, getattr(state, f.name))
    if path.parent.name != checkpoint_name(state):
        raise ValueError(f"{path}: step must be that of the folder's name: got {state.step:,}")
    return state


def _check_value(path: Path, name: str, value: Any) -> None:
    """Refuse a value of a state that has the wrong type or is out of range."""
    # a device counts steps in 32 bits
    most = (1 << 63 if name in ("tokens", "target_tokens") else 1 << 31) - 1
    is_integer = type(value) is int and 0 <= value <= most
    is_number = is_integer or (type(value) is float and math.isfinite(value))
    if name == "started":
        what, is_valid = "a date and time", isinstance(value, str) and _is_time(value)
    elif name == "base":
        what, is_valid = "text", isinstance(value, str)
    elif name == "unevaluated":
        what = "a row of metrics"
        is_valid = isinstance(value, dict) and all(map(_is_figure, value.values()))
    elif name == "best_eval_loss":
        what, is_valid = "a finite number or null", value is None or is_number
    elif name == "loss_scale":
        what, is_valid = "a positive number", is_number and value > 0
    else:
        what, is_valid = f"an integer from 0 to {most:,}", is_integer
    if not is_valid:
        raise ValueError(f"{path}: {name} must be {what}: got {value!r:.60}")


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _is_figure(value: object) -> bool:
    return value is None or type(value) in (int, float)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that the run no longer counts it among its own."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    return path.rename(aside)


def _check_hashes(path: Path) -> None:
    """Compare every file of a checkpoint with the hash that was written beside it.

    Raises:
        DamagedCheckpoint: a file is missing, or has another hash.
        OSError: a file cannot be read.
    """
    try:
        hashes = read_object(path / MANIFEST_FILE)
        for name, expected in hashes.items():
            if _sha256(path / name) != expected:
                raise ValueError(f"{name} with another hash than {MANIFEST_FILE} has")
    except (ValueError, FileNotFoundError) as error:
        raise DamagedCheckpoint(f"{path} must be a whole checkpoint: got {error}") from error


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
