"""A last check for files that somebody else wrote: none of them ends a program in a traceback.

Code that reads a file checks every value, and raises a ValueError that says what must hold. Errors
that nobody foresaw, in this code or in a library, end here: in a ValueError that names the file and
the line of code that failed, because there a check is missing.
"""

import traceback
from pathlib import Path
from types import TracebackType

from foreign.terminal import first_line

# errors that values of the wrong type, depth or size cause in Python
_BROUGHT_DOWN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
)


def is_panic(error: BaseException | None) -> bool:
    """Whether an error is a panic of a library in Rust: its class is not an Exception and cannot be
    imported."""
    return type(error).__name__ == "PanicException"


class Reading:
    """Turns an unforeseen error while a file is read into a ValueError that names the file."""

    def __init__(self, what: object, advice: str = "") -> None:
        """Args:
        what: the file that is read, such as its path.
        advice: what to do about a malformed file.
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
            why = first_line(error)
            raise ValueError(
                f"{self._what} must be readable: got {type(error).__name__}"
                f"{why and f' ({why[:200]})'} in {Path(frame.filename).name}:{frame.lineno}"
                + (self._advice and f"; {self._advice}")
            ) from error
