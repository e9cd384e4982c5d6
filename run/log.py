"""The log of a run: figures for the terminal, metrics.jsonl, loss.png and trackers; and answers."""

import time
from pathlib import Path
from types import TracebackType

import torch

from run.checkpoint import RunState
from run.config import TrainConfig
from run.loss_chart import CHART_FILE, can_draw, draw_losses
from run.metrics import (
    ANSWERS_FILE,
    METRICS_FILE,
    Progress,
    Row,
    StepRows,
    has_answer,
    peak_memory_bytes,
)
from run.privacy import READABLE
from run.trackers import Trackers
from run.watching import Watching


class RunLog:
    """Sends every row of metrics to the terminal, to metrics.jsonl and to the trackers.

    Attributes:
        rows: the rows of metrics.jsonl from the run's first step on, whichever process wrote them.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: RunState,
        num_steps: int,
        *,
        data_mode: int = READABLE,
        is_resumed: bool = False,
        writes: bool = True,
    ) -> None:
        """Open the log after the steps that are done.

        Rows of later steps are removed from its files: the run takes those steps again.

        Args:
            data_mode: permissions of files that hold text of the data.
            writes: False on all ranks but the first, whose log writes nothing.
        """
        self._device = torch.device(config.device)
        self._prompt = config.sample_prompt
        self._patience, self._state = config.early_stopping_patience, state
        self._output = Path(config.output)
        self._writes = writes
        # a run that starts from its first step drops rows of an earlier start that saved nothing
        last = state.step if is_resumed else -1
        # the row of the last step is logged later if it still waits for its evaluation
        last_row = last - bool(state.unevaluated)
        self._metrics = StepRows(self._output / METRICS_FILE if writes else None, last_row)
        answers_path = self._output / ANSWERS_FILE if writes else None
        self._answers = StepRows(answers_path, last, has_answer, data_mode)
        self._progress = Progress(num_steps, state.step, is_shown=writes)
        self._trackers = Trackers(config, state, self.say) if writes else None
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
        # after a second Ctrl-C nothing more is written
        if kind is None or issubclass(kind, Exception):
            if self._trackers:
                self._trackers.finish()
            if self._writes and len(self.rows) > 1:
                with Watching(CHART_FILE, self.say, is_last=True):
                    self._draw()

    def _draw(self) -> None:
        if not can_draw():
            self.say(f"no {CHART_FILE} without matplotlib: pip install -e '.[report]'")
            return
        # where the run may end early, the adapter of the best evaluation is taken
        is_chosen = self._patience and self._state.best_eval_loss is not None
        best_step = self._state.best_step if is_chosen else None
        draw_losses(self.rows, self._output / CHART_FILE, best_step)

    def advance(self) -> None:
        """Count a step."""
        self._progress.advance()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.say(text)

    def row(self, state: RunState, epoch: float, figures: Row | None = None) -> Row:
        """Compose a row of metrics, with the speed since the last one was added.

        Args:
            figures: of the last step; None before the first step.
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
        self._append(self._metrics, METRICS_FILE, row)
        if self._trackers:
            self._trackers.log(row)
        self._since, self._tokens_then = time.perf_counter(), int(row["tokens"])

    def answers(self) -> list[str]:
        """All answers to --sample-prompt so far, of this process and of earlier ones."""
        return [row["answer"] for row in self._answers.rows if row["prompt"] == self._prompt]

    def add_answer(self, step: int, answer: str) -> None:
        """Write down the answer to --sample-prompt after a step."""
        row = {"step": step, "prompt": self._prompt, "answer": answer}
        self._append(self._answers, ANSWERS_FILE, row)

    def flush(self) -> None:
        """Wait until rows and answers are on the disk.

        After a loss of power, a checkpoint on the disk must not lack the rows of its steps.
        """
        for file, name in ((self._metrics, METRICS_FILE), (self._answers, ANSWERS_FILE)):
            try:
                file.flush()
            except OSError as error:
                self.say(f"{name} may not be on the disk yet: {error}")

    def _append(self, file: StepRows, name: str, row: Row) -> None:
        try:
            file.append(row)
        except OSError as error:
            self.say(f"{name} cannot be written: {error}; its rows wait for the next one")
