"""Where a run's figures go: metrics.jsonl and the terminal."""

import time
from pathlib import Path
from types import TracebackType

import torch

from run.checkpoint import RunState
from run.config import TrainConfig
from run.metrics import METRICS_FILE, MetricsFile, Progress, Row, peak_memory_bytes


class RunLog:
    """Takes the rows of a run to everywhere they are wanted.

    Attributes:
        rows: of metrics.jsonl from the run's first step on, whichever process logged them.
    """

    def __init__(self, config: TrainConfig, state: RunState, num_steps: int) -> None:
        """Begin after the steps done; what was written past them goes, because it comes again."""
        self._device = torch.device(config.device)
        self._metrics = MetricsFile(Path(config.output), state.step)
        self._progress = Progress(num_steps, state.step)
        self._since, self._tokens_then = time.perf_counter(), state.tokens
        self.rows = self._metrics.rows

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.close()

    def advance(self) -> None:
        """Count a step."""
        self._progress.advance()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.say(text)

    def row(self, state: RunState, epoch: float, figures: Row | None = None) -> Row:
        """Compose a row of metrics, with the speed since the last one was added.

        Args:
            figures: of the last step, None before the first.
        """
        row: Row = {"step": state.step, "epoch": epoch, **(figures or {})}
        row |= {"tokens": state.tokens, "target_tokens": state.target_tokens}
        if figures:
            seconds = time.perf_counter() - self._since
            row["tokens_per_second"] = (state.tokens - self._tokens_then) / seconds
        row["peak_memory_bytes"] = peak_memory_bytes(self._device)
        return row

    def add(self, row: Row) -> None:
        """Log a row. A disk that refuses it does not stop the run."""
        self._progress.show(row)
        try:
            self._metrics.append(row)
        except OSError as error:
            self.say(f"{METRICS_FILE} cannot be written: {error}; its rows wait for the next one")
        self._since, self._tokens_then = time.perf_counter(), int(row["tokens"])
