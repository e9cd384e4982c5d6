"""The output folder of a run: a new one, or one to go on with; never one over another, nor one that
two processes write."""

import itertools
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from run.atomic import clean, flush, is_partial, make_folder, new_folder, write_text
from run.checkpoint import (
    ResumePoint,
    list_checkpoints,
    load_newest_checkpoint,
    remove_old_checkpoints,
    set_aside,
)
from run.config import CONFIG_FILE, TrainConfig, differences, to_json
from run.lock import LOCK_FILE, check_unlocked, locked
from run.room import check_room

DEFAULT_PARENT = Path("out")


def check_output(config: TrainConfig) -> None:
    """Refuse a folder that holds another run, a resumed run under other flags, or a living one.

    Raises:
        ValueError: the folder is a file, not empty without --resume, of another run, or written by
            another process.
    """
    # without --output the run makes a new folder
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
    if present and not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"--resume must be given the folder of a run: {folder} has no {CONFIG_FILE}"
        )
    if present and (changed := differences(config, folder / CONFIG_FILE)):
        raise ValueError(
            f"--resume must keep the flags that decide the result: {'; '.join(changed)}; "
            "give the same flags, or start a new run in another --output"
        )


def check_new_folder(folder: Path, num_bytes: int) -> None:
    """Refuse a folder that is there and not empty, or on a disk that has no room for its files.

    Raises:
        ValueError: the folder is a file or not empty, or the disk has fewer bytes free.
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
    """See that a new folder can take the place of an empty one."""
    advice = f"give a folder inside it, such as {folder / 'model'}"
    if folder == Path.cwd():
        raise ValueError(f"--output must be another folder than the one you are in; {advice}")
    mode = folder.stat().st_mode & 0o7777
    try:
        # the kernel says of some mount points only here that they are ones
        folder.rmdir()
        folder.mkdir()
        folder.chmod(mode)
    except OSError as error:
        raise ValueError(
            f"--output must be a folder that can be replaced: {folder}: {error.strerror}; {advice}"
        ) from None


def check_writable(folder: Path) -> None:
    """See that files can be made in a folder, which need not be there yet.

    Raises:
        ValueError: they cannot.
    """
    there = _first_that_is(folder)
    if not there.is_dir():
        raise ValueError(f"--output must be in a folder: got {folder}, and {there} is a file")
    try:
        # on Linux it has no name, so nobody sees it
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(
            f"--output must be writable: {there}: {error.strerror}; choose another one"
        ) from None


def _first_that_is(folder: Path) -> Path:
    """A folder, or the nearest one around it that there is."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def resume_point(
    config: TrainConfig, num_ranks: int = 1
) -> tuple[ResumePoint | None, dict[Path, str]]:
    """Read the checkpoint to go on from, None at a fresh start.

    Returns:
        It, and what is wrong with each later one.

    Raises:
        ValueError: there are checkpoints, and none is whole; one is of another version; or the run
            has another number of processes.
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
    config: TrainConfig, resumed: ResumePoint | None = None, damaged: Collection[Path] = ()
) -> Iterator[TrainConfig]:
    """Hold the folder for this process alone: write config.json, remove what a killed process left.

    Yields the config with its folder: without --output the next free out/run-N.

    Args:
        resumed: the checkpoint to go on from, which must still be the newest.
        damaged: later checkpoints, set aside because the run will write those steps' again.

    Raises:
        ValueError: another process writes the folder, or has written it since it was looked at.
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
        # a run that was killed between a save and the removal after it has one too many
        if config.save_total_limit:
            remove_old_checkpoints(folder, config.save_total_limit)
        clean(folder)
        write_text(folder / CONFIG_FILE, to_json(config))
        yield config


def _make_folder(config: TrainConfig) -> TrainConfig:
    if config.output:
        # where a link leads to, which need not be there yet
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
    """Yield an empty folder that becomes `folder`, or what a link of that name leads to, as
    `new_folder`; no second process writes the same one.

    Raises:
        ValueError: another process writes it.
        OSError: it is there already and not empty, or the disk refused.
    """
    folder = folder.resolve()
    make_folder(folder.parent)
    lock = folder.with_name(folder.name + LOCK_FILE)
    with locked(lock, f"--output {folder}"), new_folder(folder) as partial:
        yield partial
