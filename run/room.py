"""Room on the disk: checked before a run begins, and reserved for its last checkpoint."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from run.atomic import half_written
from run.flags import TrainingFlags

MB = 10**6
# bytes of a number of the adapter, which is written in float32
NUMBER_BYTES = 4


def checkpoint_bytes(config: TrainingFlags, num_parameters: int, moment_bytes: float) -> int:
    """Bytes of a checkpoint: the adapter, the best adapter if that is kept, and both moments.

    Args:
        moment_bytes: bytes of both moments of one number of the adapter.
    """
    num_adapters = 2 if config.early_stopping_patience else 1
    return int(num_parameters * (num_adapters * NUMBER_BYTES + moment_bytes))


def num_checkpoints(save_steps: int, limit: int, step: int, num_steps: int) -> int:
    """Count the checkpoints of a run from a step on that are on the disk at the same time.

    It is at least one: a run that is stopped writes a checkpoint.

    Args:
        save_steps: the steps between two checkpoints; 0: there are none.
        limit: the most that are kept; 0: all.
    """
    due = (num_steps - 1) // save_steps - step // save_steps if save_steps else 0
    # the oldest is removed after the new one is whole
    most = limit + 1 if limit else due
    return max(1, min(due, most))


def check_room(folder: Path, num_bytes: int, advice: str = "") -> None:
    """Refuse a disk without room for files in a folder, which need not exist yet.

    Args:
        advice: flags that make the files smaller or fewer.

    Raises:
        ValueError: the disk has fewer bytes free.
    """
    folder = folder.resolve()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise ValueError(
            f"--output must have room for {num_bytes / MB:,.1f} MB: {there} has {free / MB:,.1f}; "
            f"choose another disk, {advice}or make room"
        )


@contextmanager
def reserved(folder: Path, num_bytes: int) -> Iterator[Callable[[], None]]:
    """Reserve room on a folder's disk, and yield a function that gives the room back.

    Raises:
        OSError: the disk has no such room.
    """
    path = half_written(folder / "reserve")

    def give_back() -> None:
        path.unlink(missing_ok=True)

    try:
        with path.open("wb") as file:
            # macOS has no such call
            if num_bytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
        yield give_back
    finally:
        give_back()
