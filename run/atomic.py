"""Files and folders that appear whole or not at all, whatever moment the process is killed at.

Everything is written under a temporary name, flushed to the disk and renamed. A rename within a
folder is atomic, so a reader sees the old state or the new one, also after the power was lost.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from run.privacy import READABLE, opener

# ends the name of what is not whole yet, and nobody else gives a file such a name; `clean` removes
# what a killed process left
_SUFFIX = ".quatrain.partial"


def half_written(path: Path) -> Path:
    """What a file or folder is called until it is whole."""
    return path.with_name(path.name + _SUFFIX)


def flush(path: Path) -> None:
    """Wait until a file, or what a folder's entries are, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # CIFS and some FUSE file systems have no such call for folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder, and those around it that are missing."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


@contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    partial = half_written(path)
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial.parent)
    partial.mkdir()
    try:
        yield partial
    except SafetensorError as error:
        # the disk's refusal under another name
        raise OSError(f"{path} must be written: got {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _finish_files(folder: Path) -> None:
    """Flush a folder's files, and let those read them who may read the folder: safetensors makes
    files for their owner alone, whatever the umask."""
    mode = folder.stat().st_mode & READABLE
    for path in folder.rglob("*"):
        # a file system without permissions may refuse to change them
        with suppress(OSError):
            if path.is_file():
                path.chmod(mode)
        flush(path)
    flush(folder)


def write_text(path: Path, text: str, mode: int = READABLE) -> None:
    """Write a file, replacing one of that name at once.

    Args:
        mode: its permissions, of which the umask takes some away.
    """
    partial = half_written(path)
    # one that is there would keep its own
    partial.unlink(missing_ok=True)
    with open(partial, "w", encoding="utf-8", opener=opener(mode)) as file:
        file.write(text)
    flush(partial)
    partial.replace(path)
    flush(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder for files; when the block ends it becomes `path`.

    If the block raises, nothing is left.

    Raises:
        OSError: `path` is there already and not empty, or the disk refused.
    """
    with _partial_folder(path) as partial:
        yield partial
        _finish_files(partial)
        partial.rename(path)
        flush(path.parent)


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; when the block ends, each file in it, or in folders of it, moves into
    `folder`.

    A file of the same name is replaced at once. If the block raises, nothing changes.
    """
    with _partial_folder(folder / "files") as partial:
        yield partial
        _finish_files(partial)
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            place = folder / file.relative_to(partial)
            make_folder(place.parent)
            file.replace(place)
            flush(place.parent)
        flush(folder)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is never seen with a part of its files."""
    partial = half_written(path)
    path.rename(partial)
    flush(path.parent)
    shutil.rmtree(partial)


def is_partial(path: Path) -> bool:
    """Whether a file or folder is half-written: in the making, or left by a killed process."""
    return path.name.endswith(_SUFFIX)


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in filter(is_partial, list(folder.iterdir())):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
