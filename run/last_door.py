"""Errors of the machine that may come from anywhere in a command: no memory, no home folder.

They are not faults of the code, so a message of one line is enough. Every other error is a fault of
this program, and shows its traceback.
"""

from types import TracebackType

from foreign.reading import is_panic
from foreign.terminal import first_line

# the words of torch's allocator and of pathlib, neither of which has an exception of its own
_NO_MEMORY = "can't allocate memory"
_NO_HOME = "Could not determine home directory"


class LastDoor:
    """Turns a refusal of the machine into an OSError that says what to do."""

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if said := _refusal(error):
            raise OSError(said) from error


def _refusal(error: BaseException | None) -> str:
    """The message for a refusal of the machine; empty for any other error."""
    why = "" if error is None else first_line(error)
    is_torchs = isinstance(error, RuntimeError)
    if isinstance(error, MemoryError) or (is_torchs and _NO_MEMORY in why):
        return (
            f"the machine's memory must suffice: none is left{why and f' ({why})'}; "
            "give it more, or a smaller model or file"
        )
    if is_torchs and _NO_HOME in why:
        return (
            "there must be a home folder: HOME is not set, and the user has none; set HOME to a "
            "folder that can be written to"
        )
    if is_panic(error):
        return f"a library must not fail on a file or a text: got {why:.200}"
    return ""
