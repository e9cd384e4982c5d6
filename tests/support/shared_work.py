"""Work of which several tests want the result, done once a run of pytest.

With pytest-xdist the tests that want it are in several processes: the first that asks does it, and
the others find it done. One that would have to wait does another piece of the work meanwhile.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

Work = Callable[[Path], None]  # what fills a folder


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of pytest have."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def done_once(folder: Path, name: str, works: Mapping[str, Work]) -> Path:
    """Find the folder that a piece of work has filled, of all the pieces that lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / name
    while not _is_done(found):
        if _do(found, works[name], waits=False):
            break
        # another process is at it: do another piece, or wait
        others = (folder / other for other in works if other != name)
        if not any(_do(other, works[other.name], waits=False) for other in others):
            _do(found, works[name], waits=True)
    return found


def _mark(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.done")


def _is_done(folder: Path) -> bool:
    return _mark(folder).exists()


def _do(folder: Path, work: Work, waits: bool) -> bool:
    """Do a piece, unless it is done or another process is at it."""
    if _is_done(folder):
        return False
    with _lock(folder.with_name(f"{folder.name}.lock"), waits) as is_ours:
        if not is_ours or _is_done(folder):
            return False
        # of an attempt that failed
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        work(folder)
        _mark(folder).touch()
    return True


@contextmanager
def _lock(path: Path, waits: bool) -> Iterator[bool]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
