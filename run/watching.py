"""What only watches a run, such as charts, trackers and cards: where it fails, the run goes on."""

from collections.abc import Callable
from types import TracebackType

from foreign.terminal import one_line


def _is_spared(error: BaseException) -> bool:
    return False


class Watching:
    """Ends what fails inside it with one line, whatever the failure is.

    A library that only looks on may raise anything, and may even exit; a result that took hours is
    worth more than its chart. A generator as context manager would keep what failed alive: from
    Python 3.12 on, contextlib's frame and the error hold each other.
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
        what: such as "loss.png", for the line.
        is_spared: whether a failure is somebody else's to handle, and passes.
        is_last: there is nothing left to save: Ctrl-C ends this alone.
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
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        self._say(one_line(f"{self._what} has failed, the run goes on without it: {why}"))
        return True
