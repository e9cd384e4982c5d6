"""What a process does to the files of a folder, event by event, and its end at one of them.

An event comes before what it is named after: before a file is opened to be written, a name made,
renamed or removed, a file flushed to the disk. In a write the process ends after half of the bytes.
Python's audit hooks tell of names; writing and flushing are wrapped, and so is safetensors' writer,
which is no Python.
"""

import builtins
import io
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from safetensors import serialize_file
from safetensors import torch as safetensors_torch

_NAMES = ("os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class FileEvents:
    """Counts what happens in a folder, and ends the process by SIGKILL at a given event.

    Attributes:
        names: of the events up to now.
        times: of each, in seconds, by the clock that all processes share.
    """

    def __init__(self, folder: Path, last: int = 0, *, loses_power: bool = False) -> None:
        """Args:
        last: the event to end at, counted from 1; 0: none.
        loses_power: what was written and not flushed to the disk is lost at the end. Names are
            kept, as a journal of names alone keeps them.
        """
        self.names: list[str] = []
        self.times: list[float] = []
        self._folder, self._last, self._loses_power = folder, last, loses_power
        # how many bytes of a file are on the disk, where that is not all of them
        self._volatile: dict[tuple[int, int], int] = {}

    def watch(self) -> None:
        """Begin, for the rest of this process's life."""
        self._open, self._fsync = io.open, os.fsync
        self._fallocate, self._sendfile = os.posix_fallocate, os.sendfile
        builtins.open = io.open = self._opened  # pyright: ignore[reportAttributeAccessIssue]
        os.fsync, os.posix_fallocate = self._synced, self._allocated
        os.sendfile = self._sent  # pyright: ignore[reportAttributeAccessIssue]
        setattr(safetensors_torch, serialize_file.__name__, self._serialized)
        sys.addaudithook(self._audit)

    def _happen(self, what: str) -> bool:
        """Note an event; return whether it is the last."""
        self.names.append(what)
        self.times.append(time.monotonic())
        return len(self.names) == self._last

    def _end(self) -> None:
        self._last = 0
        if self._loses_power:
            for path in self._folder.rglob("*"):
                status = path.lstat()
                durable = self._volatile.get(_inode(status), status.st_size)
                if path.is_file() and durable < status.st_size:
                    os.truncate(path, durable)
        os.kill(os.getpid(), signal.SIGKILL)

    def _is_inside(self, path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        return Path(os.fsdecode(path)).absolute().is_relative_to(self._folder)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not flags & _WRITING or not self._is_inside(path):
                return
        elif event in _NAMES:
            path = args[0]
            # shutil.rmtree names what it removes by its place in an open folder
            is_relative = event in ("os.remove", "os.rmdir") and args[1] != -1
            if not is_relative and not self._is_inside(path):
                return
        else:
            return
        if self._happen(f"{event} {os.fsdecode(path)}"):
            self._end()

    def _opened(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = self._open(file, mode, *args, **kwargs)
        if not set("wax+") & set(mode) or not self._is_inside(file):
            return stream
        status = os.fstat(stream.fileno())
        durable = self._volatile.get(_inode(status), status.st_size)
        # the number may have been another file's, which is removed
        self._volatile[_inode(status)] = min(durable, status.st_size)
        write = stream.write

        def written(data: Any) -> int:
            if self._happen(f"write {file}"):
                write(data[: len(data) // 2])
                stream.flush()
                self._end()
            return write(data)

        stream.write = written
        return stream

    def _serialized(self, tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        is_last = self._happen(f"write {filename}")
        serialize_file(tensors, filename, *args, **kwargs)
        status = os.stat(filename)
        self._volatile[_inode(status)] = 0
        if is_last:
            os.truncate(filename, status.st_size // 2)
            self._end()

    def _synced(self, descriptor: int) -> None:
        if self._happen(f"fsync {os.readlink(f'/proc/self/fd/{descriptor}')}"):
            self._end()
        self._fsync(descriptor)
        self._volatile.pop(_inode(os.fstat(descriptor)), None)

    def _allocated(self, descriptor: int, start: int, size: int) -> None:
        if self._happen("fallocate"):
            self._end()
        self._fallocate(descriptor, start, size)

    def _sent(self, target: int, *args: Any) -> int:
        if self._happen("sendfile"):
            self._end()
        return self._sendfile(target, *args)


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
