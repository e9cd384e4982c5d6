"""Locks between processes: a file that one process holds until it ends.

The kernel releases `flock` however a process dies, SIGKILL included, so a dead process locks nobody
out. On a file system without such locks nothing is locked, and a message says so.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# in a run's folder; hidden, because it is not a result
LOCK_FILE = ".quatrain.lock"
_UNKNOWN = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the file at its path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Make a lock file and hold it until the end of the block.

    Args:
        what: the name of the locked thing, such as a folder, for messages.

    Raises:
        ValueError: another process holds the lock.
        OSError: the lock file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _take(descriptor, what)
            # the process that held the lock may have removed the file since it was opened here
            if not _is_there(path, descriptor):
                continue
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return
        finally:
            os.close(descriptor)


def check_unlocked(path: Path, what: str) -> None:
    """Check that no process holds a lock file.

    Raises:
        ValueError: a process holds it.
    """
    with suppress(FileNotFoundError), path.open("rb") as file:
        _take(file.fileno(), what, fcntl.LOCK_SH)


def _take(descriptor: int, what: str, kind: int = fcntl.LOCK_EX) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{what} must be written by one process at a time: another one is writing it; wait for "
            "that one, stop it, or give another --output"
        ) from None
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        print(f"{what} has no locks ({error.strerror}): let no second process write it")
