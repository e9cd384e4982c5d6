"""What may come from anywhere in a command and is no fault of its code: the machine's refusals.

Memory ends wherever some is taken, and libraries ask for the home folder when they please. The
message is enough then. Every other error is a fault of this program, and shows its traceback.
"""

from types import TracebackType

from foreign.reading import is_panic

# as torch's allocator and pathlib say it, neither with an exception of its own
_NO_MEMORY = "can't allocate memory"
_NO_HOME = "Could not determine home directory"


class LastDoor:
    """Turns what the machine refuses into an OSError that says so."""

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
    """What to say of an error, nothing of one that is not the machine's."""
    first_line = str(error).strip().partition("\n")[0]
    is_torchs = isinstance(error, RuntimeError)
    if isinstance(error, MemoryError) or (is_torchs and _NO_MEMORY in first_line):
        return (
            f"the machine's memory must suffice: it has ended{first_line and f' ({first_line})'}; "
            "give it more, or a smaller model or file"
        )
    if is_torchs and _NO_HOME in first_line:
        return (
            "there must be a home folder: HOME is not set, and the user has none; set HOME to a "
            "folder that can be written to"
        )
    if is_panic(error):
        return f"a library must not fail on what it is given: it has ({first_line:.200})"
    return ""
