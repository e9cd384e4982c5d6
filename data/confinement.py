"""The processes that tokenize, confined, and the record that each of them is at.

A record runs the model's programs: its chat template and its tokenizer. Where one of them takes too
much, the kernel ends the process (foreign/guest.py), which can say nothing any more: what it was at
stands in memory that it shares with its parent.
"""

import multiprocessing
import time

from foreign import guest

# of a location and the time before it
_PLACE_BYTES = 512

_FORK = multiprocessing.get_context("fork")


class Confinement:
    """Where each of so many processes is; made before they are forked."""

    def __init__(self, num_processes: int) -> None:
        self._places = [_FORK.RawArray("c", _PLACE_BYTES) for _ in range(num_processes)]
        self._next = _FORK.Value("i", 0)

    def enter(self) -> None:
        """Confine this process, one of those."""
        global _place
        with self._next.get_lock():
            _place = self._places[self._next.value]
            self._next.value += 1
        guest.confine()

    def explain(self) -> Exception:
        """What to raise when one of the processes has ended before its time."""
        places = [place.value.decode(errors="replace").partition(" ") for place in self._places]
        # the process that has been at its record for the longest
        since, location = min((float(began or "inf"), location) for began, _, location in places)
        if time.monotonic() - since >= guest.SECONDS:
            return ValueError(
                f"{location}: a record must be tokenized within {guest.SECONDS:g} seconds of a "
                "processor: this one was not; its text, the model's chat template "
                "(--chat-template) or its tokenizer takes too long; correct or delete it"
            )
        return ChildProcessError(
            "the processes that tokenize must live to the end: one was killed, perhaps for lack of "
            f"memory{location and f', at about {location}'}; run again with fewer of them "
            "(--dataset-num-proc 1)"
        )


# of this process, where it is confined
_place = None


def begin_record(location: str) -> None:
    """Give this process, where it is confined, the time for a record."""
    if _place is not None:
        text = f"{time.monotonic():.1f} {location}".encode(errors="replace")
        _place.value = text[: _PLACE_BYTES - 1]
    guest.allow()


def end_record() -> None:
    """Note that this process is at no record."""
    if _place is not None:
        _place.value = b""
