"""The last door for a file that somebody else wrote: no such file ends a program in a traceback.

A reader holds every value against what it must be, and says so in a ValueError. What no reader has
foreseen, and what a library does with a file that its authors have not foreseen, ends here: in a
ValueError that names the file, and the line of code that it has brought down, because there the
check is missing.
"""

import traceback
from pathlib import Path
from types import TracebackType

# what values of the wrong kind, depth or size make Python raise
_BROUGHT_DOWN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
)


def is_panic(error: BaseException | None) -> bool:
    """Whether an error is a panic of a library in Rust, which is no Exception and has no name that
    could be imported."""
    return type(error).__name__ == "PanicException"


class Reading:
    """Turns what a file brings down while it is read into a ValueError that names it."""

    def __init__(self, what: object, advice: str = "") -> None:
        """Args:
        what: is read, such as a path.
        advice: what to do about it.
        """
        self._what, self._advice = what, advice

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, _BROUGHT_DOWN) or is_panic(error):
            assert error is not None
            frame = traceback.extract_tb(trace)[-1]
            why = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{self._what} must be readable: got {type(error).__name__}"
                f"{why and f' ({why[:200]})'} in {Path(frame.filename).name}:{frame.lineno}"
                + (self._advice and f"; {self._advice}")
            ) from error
