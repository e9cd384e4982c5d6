"""The figures that a run reports: metrics.jsonl, a progress bar or lines, and its peak memory."""

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from foreign.json_text import parse_json
from run.atomic import flush, write_text
from run.bars import UNHEARD, progress_bar
from run.privacy import READABLE, opener

# `tokens` and `target_tokens` count from the run's first step, padding left out
METRICS_FILE = "metrics.jsonl"
ANSWERS_FILE = "samples.jsonl"
GIB = 1 << 30

Row: TypeAlias = dict[str, Any]


def has_figures(row: Row) -> bool:
    """Whether a row belongs into metrics.jsonl: each value is a number, or null if not finite."""
    return all(value is None or type(value) in (int, float) for value in row.values())


def has_answer(row: Row) -> bool:
    """Whether a row belongs into samples.jsonl."""
    return all(isinstance(row.get(name), str) for name in ("prompt", "answer"))


def _parse_row(line: str, is_row: Callable[[Row], bool]) -> Row | None:
    """Read a line as a row with a step; None if it is not one."""
    try:
        row = parse_json(line, "a row")
    except ValueError:
        return None
    has_step = isinstance(row, dict) and type(row.get("step")) is int
    return row if has_step and is_row(row) else None


def last_step(path: Path) -> int | None:
    """Find the last step that a run has written into its metrics.jsonl; None if there is none."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    rows = (_parse_row(line, has_figures) for line in reversed(lines))
    return next((row["step"] for row in rows if row), None)


def _set_aside(path: Path, content: bytes, mode: int) -> Path:
    """Write a copy of a damaged file's content under a name that is free."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    with open(aside, "wb", opener=opener(mode)) as file:
        file.write(content)
    return aside


class StepRows:
    """A file of JSON lines with a step each: metrics.jsonl or samples.jsonl.

    Attributes:
        rows: the rows from the run's first step on, whichever process added them.
    """

    def __init__(
        self,
        path: Path | None,
        step: int,
        is_row: Callable[[Row], bool] = has_figures,
        mode: int = READABLE,
    ) -> None:
        """Open the file and drop the rows after `step`: a resumed run writes them again.

        A damaged line does not stop a run: a copy of the file is kept under another name, and the
        run goes on with the other rows.

        Args:
            path: None to write nothing.
            is_row: tells whether a JSON object with a step is a row of this file.
            mode: the file's permissions, before the umask takes some of them away.
        """
        content = path.read_bytes() if path and path.is_file() else b""
        lines = content.decode(errors="replace").splitlines()
        found = [_parse_row(line, is_row) for line in lines]
        # the last line may be cut off: the process may have been killed while it wrote
        if path and None in found[:-1]:
            number = found.index(None) + 1
            aside = _set_aside(path, content, mode)
            print(
                f"{path}:{number} is not a row that a run has written: {aside} is a copy of the "
                "file, and the run goes on with the other rows"
            )
        pairs = zip(lines, found, strict=True)
        kept = [(line, row) for line, row in pairs if row and row["step"] <= step]
        is_too_open = lines and path and path.stat().st_mode & READABLE & ~mode
        if path and (len(kept) < len(lines) or is_too_open):
            write_text(path, "".join(line + "\n" for line, _ in kept), mode)
        self._path, self._opener = path, opener(mode)
        self._unwritten = ""
        self.rows: list[Row] = [row for _, row in kept]

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, which must have a `step`.

        Raises:
            OSError: the disk refused; the file is unchanged; the next call writes this row, too.
        """
        # JSON has no NaN
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        self.rows.append(clean)
        if self._path is None:
            return
        self._unwritten += json.dumps(clean) + "\n"
        size = self._path.stat().st_size if self._path.is_file() else 0
        try:
            with open(self._path, "a", encoding="utf-8", opener=self._opener) as file:
                file.write(self._unwritten)
        except OSError:
            # a part of the text may be in the file
            if self._path.is_file():
                os.truncate(self._path, size)
            raise
        self._unwritten = ""

    def flush(self) -> None:
        """Wait until the rows are on the disk.

        Raises:
            OSError: the disk refused.
        """
        if self._path and self._path.is_file():
            flush(self._path)
            flush(self._path.parent)


class Progress:
    """A progress bar with the last figures on a terminal; elsewhere a line for each logged step.

    Errors of the terminal do not stop the run.
    """

    def __init__(self, num_steps: int, step: int, *, is_shown: bool = True) -> None:
        self._is_terminal = is_shown and sys.stderr.isatty()
        self._num_steps = num_steps
        self._bar = progress_bar(
            "training", total=num_steps, done=step, is_shown=is_shown, stays=True
        )

    def advance(self) -> None:
        self._bar.update()

    def show(self, row: Row) -> None:
        """Show a row of metrics: beside the bar, or as a line where it would be gone too soon."""
        step, shortly = f"step {row['step']}/{self._num_steps}", describe_shortly(row)
        with suppress(*UNHEARD):
            if not self._is_terminal:
                print(f"{step}  {describe(row)}", flush=True)
                return
            if "eval_loss" in row:
                self.say(f"{step}  eval_loss {row['eval_loss']:.4f}  {shortly}")
            self._bar.set_postfix_str(shortly)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with suppress(*UNHEARD):
            tqdm.write(text)

    def close(self) -> None:
        self._bar.close()


def describe(row: Row) -> str:
    """Write a row of metrics as one line of text."""
    parts = []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "aux_loss" in row:
        parts.append(f"aux_loss {row['aux_loss']:.4f}")
    if "eval_loss" in row:
        parts.append(f"eval_loss {row['eval_loss']:.4f}")
    if "loss" in row:
        parts += [
            f"grad_norm {row['grad_norm']:.3f}",
            f"lr {row['learning_rate']:.2e}",
            f"{row['tokens_per_second']:,.0f} tok/s",
        ]
    parts.append(f"{row['peak_memory_bytes'] / GIB:.2f} GiB")
    return "  ".join(parts)


def describe_shortly(row: Row) -> str:
    """Write the figures of a row of metrics that have a place beside a bar."""
    parts = []
    if "loss" in row:
        parts = [f"loss {row['loss']:.4f}", f"{row['tokens_per_second']:,.0f} tok/s"]
    return "  ".join([*parts, f"{row['peak_memory_bytes'] / GIB:.2f} GiB"])


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that the process has held: reserved by torch on a GPU, or RAM on a CPU.

    Unified memory is not counted: torch does not know of it, and it may lie on the GPU or the host.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes on Linux, bytes on macOS
    return peak if sys.platform == "darwin" else peak * 1024
