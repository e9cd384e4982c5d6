"""Files and folders that appear whole or not at all, even if the process is killed.

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

# the end of the name of a file or folder that is not whole yet. Nobody else ends a name so, and
# `clean` may remove whatever has such a name: a killed process left it
_SUFFIX = ".quatrain.partial"


def half_written(path: Path) -> Path:
    """The temporary name of a file or folder until it is whole."""
    return path.with_name(path.name + _SUFFIX)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the list of a folder's entries, is on the disk."""
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
    """Make a folder, and the missing folders around it."""
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
        # safetensors has an error of its own for a disk that is full
        raise OSError(f"{path} must be written: got {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _finish_files(folder: Path) -> None:
    """Flush a folder's files, and make them readable for everyone who may read the folder.

    safetensors writes files that only their owner may read, whatever the umask is.
    """
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
        mode: the file's permissions, before the umask takes some of them away.
    """
    partial = half_written(path)
    # a file that is there already would keep its permissions
    partial.unlink(missing_ok=True)
    with open(partial, "w", encoding="utf-8", opener=opener(mode)) as file:
        file.write(text)
    flush(partial)
    partial.replace(path)
    flush(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder for files; at the end of the block it becomes `path`.

    If the block raises, the folder and its files are removed.

    Raises:
        OSError: `path` is a folder that is not empty, or the disk refused.
    """
    with _partial_folder(path) as partial:
        yield partial
        _finish_files(partial)
        partial.rename(path)
        flush(path.parent)


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder for files; at the end of the block they move into `folder`.

    Files in subfolders move with their subfolder's name. A file of the same name is replaced in one
    rename. If the block raises, `folder` stays as it was.
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
    """Remove a folder so that no reader sees it with only some of its files."""
    partial = half_written(path)
    path.rename(partial)
    flush(path.parent)
    shutil.rmtree(partial)


def is_partial(path: Path) -> bool:
    """Whether a file or folder is half-written: being written, or left by a killed process."""
    return path.name.endswith(_SUFFIX)


def clean(folder: Path) -> None:
    """Remove the half-written files and folders that a killed process left."""
    for path in filter(is_partial, list(folder.iterdir())):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
