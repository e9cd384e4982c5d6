"""Where a run's figures go: the terminal, metrics.jsonl, loss.png, trackers; and its answers."""

import time
from pathlib import Path
from types import TracebackType

import torch

from run.checkpoint import RunState
from run.config import TrainConfig
from run.loss_chart import CHART_FILE, can_draw, draw_losses
from run.metrics import (
    METRICS_FILE,
    SAMPLES_FILE,
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
    """Takes the rows of a run to everywhere they are wanted.

    Attributes:
        rows: of metrics.jsonl from the run's first step on, whichever process logged them.
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
        """Begin after the steps done; what was written past them goes, because it comes again.

        Args:
            data_mode: permissions of what holds text that was learned.
            writes: anywhere at all, which only one of a run's ranks does.
        """
        self._device = torch.device(config.device)
        self._prompt = config.sample_prompt
        self._output = Path(config.output)
        self._writes = writes
        # a run that begins anew has no rows, whatever one before it that saved nothing has left
        last = state.step if is_resumed else -1
        # the row that waits for its evaluation is of this step
        last_row = last - bool(state.unevaluated)
        self._metrics = StepRows(self._output / METRICS_FILE if writes else None, last_row)
        answers = self._output / SAMPLES_FILE if writes else None
        self._samples = StepRows(answers, last, has_answer, data_mode)
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
        # a second Ctrl-C waits for nobody
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
        draw_losses(self.rows, self._output / CHART_FILE)

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
        self._append(self._metrics, METRICS_FILE, row)
        if self._trackers:
            self._trackers.log(row)
        self._since, self._tokens_then = time.perf_counter(), int(row["tokens"])

    def answers(self) -> list[str]:
        """What --sample-prompt has been answered up to now, in this process or one before it."""
        return [row["answer"] for row in self._samples.rows if row["prompt"] == self._prompt]

    def add_answer(self, step: int, answer: str) -> None:
        """Write down what --sample-prompt is answered after a step."""
        row = {"step": step, "prompt": self._prompt, "answer": answer}
        self._append(self._samples, SAMPLES_FILE, row)

    def flush(self) -> None:
        """Wait until rows and answers are on the disk: a checkpoint that the power's loss leaves
        must not be without the rows of its steps."""
        for file, name in ((self._metrics, METRICS_FILE), (self._samples, SAMPLES_FILE)):
            try:
                file.flush()
            except OSError as error:
                self.say(f"{name} may not be on the disk yet: {error}")

    def _append(self, file: StepRows, name: str, row: Row) -> None:
        try:
            file.append(row)
        except OSError as error:
            self.say(f"{name} cannot be written: {error}; its rows wait for the next one")
