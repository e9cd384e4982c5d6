"""The output folder of a run, new or resumed.

No run overwrites another, and no two processes write into one folder.
"""

import itertools
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from run.atomic import clean, flush, is_partial, make_folder, new_folder, write_text
from run.checkpoint import (
    ResumePoint,
    list_checkpoints,
    load_newest_checkpoint,
    remove_old_checkpoints,
    set_aside,
)
from run.config import (
    CONFIG_FILE,
    OLD_CONFIG_FILE,
    TrainConfig,
    differences,
    find_config,
    read_asked,
    to_json,
)
from run.lock import LOCK_FILE, check_unlocked, locked
from run.model_card import CARD_FILE
from run.room import check_room

DEFAULT_PARENT = Path("out")


def check_output(config: TrainConfig) -> None:
    """Refuse an output folder of another run, of the same run under other flags, or in use.

    Raises:
        ValueError: --output is a file; or a folder that is not empty, without --resume; or a
            folder of another run; or another process writes into it.
    """
    # without --output the run makes a new folder, and nothing can be wrong with it
    if not config.output:
        return
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output must be a folder: got the file {folder}")
    check_unlocked(folder / LOCK_FILE, f"--output {folder}")
    _check_contents(config, folder)


def _check_contents(config: TrainConfig, folder: Path) -> None:
    paths = folder.iterdir() if folder.is_dir() else []
    # a fresh run must not take a half-written file for its own and remove it
    present = sorted(
        path.name
        for path in paths
        if path.name != LOCK_FILE and not (config.resume and is_partial(path))
    )
    if not config.resume:
        if present:
            raise ValueError(
                f"--output must be a new or empty folder: {folder} holds {', '.join(present[:5])}; "
                "choose another one, or go on with that run with --resume"
            )
        return
    if not present:
        return
    path = find_config(folder)
    if path is None:
        raise ValueError(
            f"--resume must be given the folder of a run: {folder} has no {CONFIG_FILE}"
        )
    if changed := differences(config, path):
        further = f", with --init-adapter {folder}" if is_finished(folder) else ""
        raise ValueError(
            f"--resume must keep the flags that decide the result: {'; '.join(changed)}; "
            f"give the same flags, or start a new run in another --output{further}"
        )


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end: the model card is the last of its results."""
    return (folder / CARD_FILE).is_file()


def check_new_folder(folder: Path, num_bytes: int) -> None:
    """Refuse a folder that is not empty, or that lies on a disk without room for its files.

    Raises:
        ValueError: the folder is a file or not empty, or the disk has less than `num_bytes` free.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output must be a folder: got the file {folder}")
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if present:
        raise ValueError(
            f"--output must be a new or empty folder: {folder} holds {', '.join(present[:5])}; "
            "choose another one"
        )
    if folder.is_dir():
        _check_replaceable(folder.resolve())
    check_writable(folder)
    check_room(folder, num_bytes)


def _check_replaceable(folder: Path) -> None:
    """Check that a new folder can take the place of an empty one."""
    advice = f"give a folder inside it, such as {folder / 'model'}"
    if folder == Path.cwd():
        raise ValueError(f"--output must be another folder than the one you are in; {advice}")
    mode = folder.stat().st_mode & 0o7777
    try:
        # a mount point cannot be removed; for some, nothing else shows that they are mount points
        folder.rmdir()
        folder.mkdir()
        folder.chmod(mode)
    except OSError as error:
        raise ValueError(
            f"--output must be a folder that can be replaced: {folder}: {error.strerror}; {advice}"
        ) from None


def check_writable(folder: Path) -> None:
    """Check that files can be made in a folder, which need not exist yet.

    Raises:
        ValueError: files cannot be made there.
    """
    there = _first_that_is(folder)
    if not there.is_dir():
        raise ValueError(f"--output must be in a folder: got {folder}, and {there} is a file")
    try:
        # on Linux this file has no name, so nobody sees it
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(
            f"--output must be writable: {there}: {error.strerror}; choose another one"
        ) from None


def _first_that_is(folder: Path) -> Path:
    """The folder, or the nearest folder around it that exists."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def resume_point(
    config: TrainConfig, num_ranks: int = 1
) -> tuple[ResumePoint | None, dict[Path, str]]:
    """Read the checkpoint that a run resumes from.

    Returns:
        The checkpoint, or None where the run starts from its first step; and for each later,
        damaged checkpoint what is wrong with it.

    Raises:
        ValueError: there are checkpoints and none is whole; another version wrote one; or the run
            was begun with another number of processes.
        OSError: a checkpoint cannot be read.
    """
    if not config.resume:
        return None, {}
    found, damaged = load_newest_checkpoint(Path(config.output))
    if found and found.state.num_ranks != num_ranks:
        has = found.state.num_ranks
        raise ValueError(
            f"--resume must go on with as many processes as the run has, {has}: got {num_ranks}, "
            f"which would make its steps of another size; torchrun --nproc-per-node {has} train.py"
        )
    return found, damaged


@contextmanager
def open_output(
    config: TrainConfig,
    resumed: ResumePoint | None = None,
    damaged: Collection[Path] = (),
    asked: Mapping[str, Any] | None = None,
) -> Iterator[TrainConfig]:
    """Lock the output folder for this process, write run.json into it, and tidy it up.

    Yields the config with the folder's place: without --output the next free out/run-N.

    Args:
        resumed: the checkpoint to go on from, which must still be the newest.
        damaged: later checkpoints; they are renamed, because the run will write checkpoints of the
            same steps.
        asked: the fields that were left to the machine, as they were asked for. A resumed run keeps
            those of its first start.

    Raises:
        ValueError: another process writes into the folder, or has done so since `check_output`.
    """
    config = _make_folder(config)
    folder = Path(config.output)
    with locked(folder / LOCK_FILE, f"--output {folder}"):
        _check_contents(config, folder)
        found = [path for path in list_checkpoints(folder) if path not in damaged]
        if found[-1:] != ([resumed.path] if resumed else []):
            raise ValueError(
                f"--output must stay as it is while a run begins: another process has written in "
                f"{folder}; start again"
            )
        for path in damaged:
            print(f"{path} is set aside as {set_aside(path).name}")
        # one checkpoint too many is left where a run was killed after a save, before the removal
        if config.save_total_limit:
            remove_old_checkpoints(folder, config.save_total_limit)
        clean(folder)
        if find_config(folder) == folder / OLD_CONFIG_FILE:
            # one rename: at no moment are the settings lost, or there twice
            (folder / OLD_CONFIG_FILE).replace(folder / CONFIG_FILE)
            flush(folder)
        path = folder / CONFIG_FILE
        write_text(path, to_json(config, read_asked(path) if path.is_file() else asked))
        yield config


def _make_folder(config: TrainConfig) -> TrainConfig:
    if config.output:
        # resolved: the target of a link need not exist yet
        make_folder(Path(config.output).resolve())
        return config
    make_folder(DEFAULT_PARENT)
    for number in itertools.count(1):
        folder = DEFAULT_PARENT / f"run-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        flush(DEFAULT_PARENT)
        return replace(config, output=str(folder))
    raise AssertionError("numbers do not end")


@contextmanager
def new_output(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` at the end of the block, as `new_folder` does it.

    Where `folder` is a link, its target is written. A lock keeps other processes out.

    Raises:
        ValueError: another process writes the same folder.
        OSError: the folder is there already and not empty, or the disk refused.
    """
    folder = folder.resolve()
    make_folder(folder.parent)
    lock = folder.with_name(folder.name + LOCK_FILE)
    with locked(lock, f"--output {folder}"), new_folder(folder) as partial:
        yield partial
