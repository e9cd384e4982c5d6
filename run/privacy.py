"""Permissions of files that a run makes from other files.

A copy of private files is private, too. Adapters follow the umask, like any file that a user
writes. Text of the data, which a run writes into its folder, is for those who may read the data.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

READABLE = 0o666
# for the group and for all others: the right to read a file, and all rights
_RIGHTS = ((0o040, 0o070), (0o004, 0o007))


def shared_mode(files: Iterable[Path]) -> int:
    """Find the permissions of a file made from others: all others' rights in common, and its
    owner's."""
    mode = READABLE
    for path in files:
        mode &= path.stat().st_mode
    return mode | 0o600


def opener(mode: int) -> Callable[[str, int], int]:
    """Make an opener for `open` that gives a new file these permissions, less the umask's."""
    return lambda name, flags: os.open(name, flags, mode)


@contextmanager
def as_private_as(files: Iterable[Path]) -> Iterator[None]:
    """Inside the block, new files and folders are only for those who may read all of `files`.

    Note:
        Changes the umask, which holds for the whole process.
    """
    mode = shared_mode(files)
    before = os.umask(0o077)
    os.umask(before | sum(rights for reading, rights in _RIGHTS if not mode & reading))
    try:
        yield
    finally:
        os.umask(before)
