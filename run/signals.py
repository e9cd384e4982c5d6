"""SIGTERM, SIGINT and SIGHUP as a request to stop, which the training loop reads between steps.

A spot machine sends SIGTERM some seconds before it is taken away, a person presses Ctrl-C, a
terminal sends SIGHUP when it is closed. In each case the run has time for a checkpoint.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Remembers the first signal that asks to stop; a second signal ends the process at once.

    Attributes:
        number: the signal's number; 0 until a signal comes.

    Note:
        Python takes signals in its main thread only.
    """

    def __init__(self, *, says: bool = True) -> None:
        """Args:
        says: whether to tell the user that the signal was understood.
        """
        self.number = 0
        self._says = says
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        # nohup, and a shell that starts a job in the background, let a process ignore some signals
        taken = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._take) for number in taken}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self.number = number
        if not self._says:
            return
        name = signal.Signals(number).name
        text = f"{name}: stopping after this step, with a checkpoint; again stops at once\n"
        # the terminal may be gone
        with suppress(OSError):
            # not print: the signal may have interrupted a print
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let the block ask whether Ctrl-C was pressed in it; a second one ends the block.

    Yields a function that tells it.

    Raises:
        KeyboardInterrupt: at the second Ctrl-C.
    """
    before, is_pressed = signal.getsignal(signal.SIGINT), False

    def take(number: int, frame: FrameType | None) -> None:
        nonlocal is_pressed
        is_pressed = True
        signal.signal(signal.SIGINT, before)

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, take)
    try:
        yield lambda: is_pressed
    finally:
        signal.signal(signal.SIGINT, before)


def end_at_once() -> None:
    """Let Ctrl-C end the process at once from now on, without a traceback from libraries that are
    at work at the exit."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
