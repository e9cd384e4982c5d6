"""Programs that come with a model, in processes that the kernel ends when they take too much.

A chat template is a program, and so are the normalizers and the regular expressions of a tokenizer
and the patterns of an adapter. Whether one comes to an end no look at it can tell, and code in C
that does not is deaf to signals' handlers and to other threads. So these programs run in forked
processes with two limits of the kernel's: seconds of a processor, after which it ends the process,
and bytes of memory, beyond which it gives none. They end with their parent, however that ends.
"""

import fcntl
import multiprocessing
import os
import resource
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# of a processor, for one record of the data or one call; and more for each character of a text
SECONDS = 30.0
SECONDS_A_CHARACTER = 20e-6
# more than the process has when it is confined, and more for each character of a text
NUM_BYTES = 4 << 30
BYTES_A_CHARACTER = 256
# fewer characters than this need no more time and room than any call has
_MANY_CHARACTERS = 100_000

# the bytes that this process may have, where it is confined
_most_bytes: int | None = None


def confine() -> None:
    """Limit the memory of this process, which runs others' programs and nothing else."""
    global _most_bytes
    _most_bytes = _bytes_in_use() + NUM_BYTES
    _limit(resource.RLIMIT_AS, _most_bytes)
    # a process that is ended on purpose leaves nothing behind
    _limit(resource.RLIMIT_CORE, 0)
    _silence()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def _silence() -> None:
    """Keep off the terminal what a library in C or Rust says of its own end: the parent's message
    tells of it, and errors of Python travel to the parent."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _bytes_in_use() -> int:
    """The virtual memory of this process.

    0 where there is no /proc to tell, as on macOS, whose kernel holds no process to a limit of its
    memory either: there the limit of time alone holds.
    """
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0
    return int(status.read_text().split()[0]) * resource.getpagesize()


def allow(num_characters: int = 0) -> None:
    """Give a confined process, from now on, the seconds of a processor that a text may take.

    In another process nothing happens.
    """
    if _most_bytes is None:
        return
    signal.setitimer(signal.ITIMER_PROF, SECONDS + SECONDS_A_CHARACTER * num_characters)
    if num_characters > _MANY_CHARACTERS:
        _limit(resource.RLIMIT_AS, _most_bytes + BYTES_A_CHARACTER * num_characters)


def end_with_parent() -> None:
    """End this process when its parent has, which SIGKILL leaves no time to say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # a pipe that ends with the parent
    sentinel = parent.sentinel
    if hasattr(fcntl, "F_SETSIG"):
        # Linux kills at once, also in the middle of a call that holds Python's lock
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(sentinel, fcntl.F_GETFL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)

    def wait_and_end() -> None:
        wait([sentinel])
        os._exit(1)

    # elsewhere, and where the parent has ended by now
    threading.Thread(target=wait_and_end, daemon=True).start()


def in_guest(work: Callable[[], T], what: str) -> T:
    """Do a piece of work in a forked, confined process, and return its result.

    A process that is confined itself does it at once.

    Args:
        what: comes to an end within the limits, for the message.

    Raises:
        ValueError: the work raised it, or took more than it may.
    """
    if _most_bytes is not None:
        return work()
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    guest = fork.Process(target=_serve, args=(work, theirs), daemon=True)
    guest.start()
    theirs.close()
    try:
        kind, outcome = ours.recv()
    except EOFError:
        guest.join()
        raise ValueError(f"{what} must come to an end: {_why(guest.exitcode)}") from None
    finally:
        guest.kill()
        guest.join()
        ours.close()
    if kind == "refused":
        raise ValueError(outcome)
    if kind == "failed":
        raise RuntimeError(outcome)
    return outcome


def _serve(work: Callable[[], Any], pipe: Connection) -> None:
    confine()
    allow()
    end_with_parent()
    try:
        outcome = "done", work()
    except ValueError as error:
        outcome = "refused", str(error)
    except MemoryError:
        # there is room again for what follows
        os._exit(_NO_MEMORY)
    except BaseException:
        outcome = "failed", traceback.format_exc()
    pipe.send(outcome)


_NO_MEMORY = 77


def _why(exit_code: int | None) -> str:
    """What the end of a confined process says."""
    if exit_code == -signal.SIGPROF:
        return f"it has taken {SECONDS:g} seconds of a processor"
    if exit_code in (_NO_MEMORY, -signal.SIGABRT):
        return f"it has taken {NUM_BYTES >> 20:,} MiB of memory"
    return f"its process has ended with the code {exit_code}"


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
