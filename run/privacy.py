"""Permissions: what is made of a file that others may not read is not for others either.

Adapters and models are made under the umask, as whatever a user writes; text of the data, which a
run leaves in its folder, is for those who may read the data.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

READABLE = 0o666
# of the group and of all others: the right to read a file, and all rights
_RIGHTS = ((0o040, 0o070), (0o004, 0o007))


def shared_mode(files: Iterable[Path]) -> int:
    """Find the permissions of a file that is made of others: those that each of them gives, and
    its owner's."""
    mode = READABLE
    for path in files:
        mode &= path.stat().st_mode
    return mode | 0o600


def opener(mode: int) -> Callable[[str, int], int]:
    """What lets `open` make a file with other permissions than the umask leaves."""
    return lambda name, flags: os.open(name, flags, mode)


@contextmanager
def as_private_as(files: Iterable[Path]) -> Iterator[None]:
    """Make files and folders for nobody who may not read all of these.

    Note:
        Changes the umask, which is that of the whole process.
    """
    mode = shared_mode(files)
    before = os.umask(0o077)
    os.umask(before | sum(rights for reading, rights in _RIGHTS if not mode & reading))
    try:
        yield
    finally:
        os.umask(before)
