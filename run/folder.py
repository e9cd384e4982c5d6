"""The output folder of a run: a new one, or one to go on with; never one over another."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from run.atomic import clean, is_partial, remove_folder, write_text
from run.checkpoint import Checkpoint, load_newest_checkpoint
from run.config import CONFIG_FILE, TrainConfig, differences, to_json

DEFAULT_PARENT = Path("out")
MB = 10**6


def choose_output(config: TrainConfig) -> TrainConfig:
    """Fill in the output folder where none is given: the next free out/run-N."""
    if config.output:
        return config
    number = 1
    while (DEFAULT_PARENT / f"run-{number}").exists():
        number += 1
    return replace(config, output=str(DEFAULT_PARENT / f"run-{number}"))


def check_output(config: TrainConfig) -> None:
    """Refuse a folder that holds another run, or a resumed run under other flags.

    Raises:
        ValueError: the folder is a file, not empty without --resume, or of another run.
    """
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output must be a folder: got the file {folder}")
    paths = folder.iterdir() if folder.is_dir() else []
    # a fresh run must not take somebody else's half-written file for its own and remove it
    present = sorted(path.name for path in paths if not (config.resume and is_partial(path)))
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
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise ValueError(
            f"--output must have room for {num_bytes / MB:,.1f} MB: {there} has {free / MB:,.1f}; "
            "choose another disk, or make room"
        )


def resume_point(
    config: TrainConfig, num_ranks: int = 1
) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Read the checkpoint to go on from, None at a fresh start.

    Returns:
        It, and what is wrong with each later one.

    Raises:
        ValueError: there are checkpoints, and none is whole; or the run has another number of
            processes.
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


def open_output(config: TrainConfig, damaged: Iterable[Path] = ()) -> None:
    """Make the folder ready: write config.json, remove what a killed process left half-written.

    Args:
        damaged: checkpoints to remove, because the run will write those steps' again.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    for path in damaged:
        remove_folder(path)
    clean(folder)
    write_text(folder / CONFIG_FILE, to_json(config))
