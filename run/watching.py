"""Charts, trackers and model cards: they only watch a run, and the run goes on if they fail."""

from collections.abc import Callable
from types import TracebackType

from foreign.terminal import first_line, one_line


def _is_spared(error: BaseException) -> bool:
    return False


class Watching:
    """Turns any failure inside the block into one line of text.

    A library for charts may raise any error, and may even exit; a result that took hours is worth
    more than its chart. A generator as context manager would keep the tensors of the failed block
    alive: from Python 3.12 on, contextlib's frame and the error hold each other.
    """

    def __init__(
        self,
        what: str,
        say: Callable[[str], None],
        is_spared: Callable[[BaseException], bool] = _is_spared,
        *,
        is_last: bool = False,
    ) -> None:
        """Args:
        what: the name of the thing that may fail, such as "loss.png", for the line.
        is_spared: tells whether an error must pass through to the caller.
        is_last: nothing is left to save, so Ctrl-C ends this block and not the run.
        """
        self._what, self._say = what, say
        self._is_spared, self._is_last = is_spared, is_last

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if self._is_last and isinstance(error, KeyboardInterrupt):
            self._say(f"{self._what} is left out: interrupted")
            return True
        if not isinstance(error, (Exception, SystemExit)) or self._is_spared(error):
            return False
        why = first_line(error) or type(error).__name__
        self._say(one_line(f"{self._what} has failed, the run goes on without it: {why}"))
        return True
