"""The processes that tokenize, confined, and the record that each of them is at.

A record runs the model's programs: its chat template and its tokenizer. Where a program takes too
much, the kernel ends its process at once (foreign/guest.py). The record that the process was at
stands in memory that it shares with its parent.
"""

import multiprocessing
import os
import signal
from multiprocessing.process import BaseProcess

from foreign import guest

# of a process's number and a location: the longest path that Linux takes, and a number behind it
_PLACE_BYTES = 1 << 13

_FORK = multiprocessing.get_context("fork")


class TakesTooMuch(ValueError):
    """A record that took more time or memory than a record may.

    Attributes:
        location: the record's.
    """

    def __init__(self, location: str, limit: str) -> None:
        self.location = location
        super().__init__(
            f"{location}: a record must be tokenized within {limit}: this one was not; its text, "
            "the model's chat template (--chat-template) or its tokenizer takes too much; correct "
            "or delete it (--skip-bad-lines leaves out such a line)"
        )


class Confinement:
    """The record that each of some processes is at; made before the processes are forked."""

    def __init__(self, num_processes: int) -> None:
        self._places = [_FORK.RawArray("c", _PLACE_BYTES) for _ in range(num_processes)]
        self._next = _FORK.Value("i", 0)
        self._processes: dict[int | None, BaseProcess] = {}

    def enter(self) -> None:
        """Confine this process, which is one of them."""
        global _place
        with self._next.get_lock():
            _place = self._places[self._next.value]
            self._next.value += 1
        end_record()
        guest.confine()

    def watch(self) -> None:
        """Remember the processes while they live, to read their exit codes when they have ended."""
        self._processes |= {each.pid: each for each in multiprocessing.active_children()}

    def explain(self) -> TakesTooMuch | ChildProcessError:
        """The error to raise once all processes have ended and one of them ended too early."""
        for place in self._places:
            number, _, location = place.value.decode(errors="surrogateescape").partition(" ")
            process = self._processes.get(int(number or 0))
            # the others are ended by SIGTERM
            if process is None or process.exitcode in (0, -signal.SIGTERM):
                continue
            limit = _LIMITS.get(process.exitcode or 0)
            if location and limit:
                return TakesTooMuch(location, limit())
            break
        else:
            location = ""
        return ChildProcessError(
            "the processes that tokenize must live to the end: one was killed, perhaps for lack of "
            f"memory{location and f', at about {location}'}; run again with fewer of them "
            "(--dataset-num-proc 1)"
        )


# what a process has exceeded, by the code that it ends with: the kernel's signal where its time is
# over, and that of a library in Rust which is given no more memory
_LIMITS = {
    -signal.SIGPROF: lambda: f"{guest.SECONDS:g} seconds of a processor",
    -signal.SIGABRT: lambda: f"{guest.NUM_BYTES >> 20:,} MiB of memory",
}

# of this process, where it is confined
_place = None


def begin_record(location: str) -> None:
    """Give this process, where it is confined, the time for a record."""
    _note(location)
    guest.allow()


def end_record() -> None:
    """Note that this process is at no record."""
    _note("")


def _note(location: str) -> None:
    if _place is not None:
        text = f"{os.getpid()} {location}".encode(errors="surrogateescape")
        _place.value = text[: _PLACE_BYTES - 1]
