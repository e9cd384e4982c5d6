"""Programs that come with a model, run in processes whose time and memory the kernel limits.

A chat template is a program; so are the normalizers and the regular expressions of a tokenizer and
the patterns of an adapter. Nobody can tell from its text whether a program comes to an end, and an
endless loop in C code can be interrupted neither by signal handlers nor by other threads. So these
programs run in forked processes with two limits of the kernel: seconds of processor time, after
which the kernel ends the process, and bytes of memory. Such a process also ends when its parent
ends, however that happens.
"""

import fcntl
import gc
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

# processor time for one record of the data or one call, and more for each character of a text
SECONDS = 30.0
SECONDS_A_CHARACTER = 20e-6
# memory beyond what the process has when it is confined, and more for each character of a text
NUM_BYTES = 4 << 30
BYTES_A_CHARACTER = 256
# texts with fewer characters need no more memory than any call may have
_MANY_CHARACTERS = 100_000

# Linux tells here how much virtual memory this process has
_STATUS = Path("/proc/self/statm")

# the bytes that this process may have; None if it is not confined
_most_bytes: int | None = None


def confine() -> None:
    """Limit the memory of this process, which from now on runs foreign programs only."""
    global _most_bytes
    _most_bytes = _bytes_in_use() + NUM_BYTES
    _limit_memory(_most_bytes)
    # no core dump of a process that the kernel ends on purpose
    _limit(resource.RLIMIT_CORE, 0)
    _silence()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # to collect what the parent's program holds would be to write to it, and so to copy all of it
    gc.freeze()


def _silence() -> None:
    """Close stderr: a library in C or Rust prints there when it ends the process.

    Nothing is lost: the parent's message says why the process ended, and the parent gets errors of
    Python through the pipe.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _bytes_in_use() -> int:
    """The virtual memory of this process; 0 on a system without /proc, such as macOS."""
    if not _STATUS.exists():
        return 0
    return int(_STATUS.read_text().split()[0]) * resource.getpagesize()


def _limit_memory(num_bytes: int) -> None:
    """Limit the memory of this process; without /proc, only the limit of time holds.

    There nobody knows how much the process has, and a limit below that is refused or ends it.
    """
    if _STATUS.exists():
        _limit(resource.RLIMIT_AS, num_bytes)


def allow(num_characters: int = 0) -> None:
    """Give a confined process, from now on, the time and the memory that a text may take.

    In a process that is not confined nothing happens.
    """
    if _most_bytes is None:
        return
    signal.setitimer(signal.ITIMER_PROF, SECONDS + SECONDS_A_CHARACTER * num_characters)
    if num_characters > _MANY_CHARACTERS:
        _limit_memory(_most_bytes + BYTES_A_CHARACTER * num_characters)


def end_with_parent() -> None:
    """End this process when its parent ends, even by SIGKILL, which the parent cannot announce."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # a pipe that closes when the parent ends
    sentinel = parent.sentinel
    if hasattr(fcntl, "F_SETSIG"):
        # Linux then kills this process at once, even inside a call that holds Python's lock
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(sentinel, fcntl.F_GETFL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)

    def wait_and_end() -> None:
        wait([sentinel])
        os._exit(1)

    # for other systems, and for a parent that has ended already
    threading.Thread(target=wait_and_end, daemon=True).start()


def in_guest(work: Callable[[], T], what: str) -> T:
    """Call a function in a forked, confined process, and return its result.

    A process that is confined itself calls the function directly.

    Args:
        what: the name of the work, for messages.

    Raises:
        ValueError: the work raised it, or went over its time or memory.
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
        # the memory of the failed work is free again, enough for this call
        os._exit(_NO_MEMORY)
    except BaseException:
        outcome = "failed", traceback.format_exc()
    pipe.send(outcome)


_NO_MEMORY = 77


def _why(exit_code: int | None) -> str:
    """Say why a confined process ended."""
    if exit_code == -signal.SIGPROF:
        return f"it used {SECONDS:g} seconds of processor time"
    if exit_code in (_NO_MEMORY, -signal.SIGABRT):
        return f"it used {NUM_BYTES >> 20:,} MiB of memory"
    return f"its process ended with exit code {exit_code}"


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
