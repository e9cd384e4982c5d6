"""The end of a run before its last step: the message, and the checkpoint to go on from."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from foreign.terminal import first_line, printable
from prepare.job import Job
from run.checkpoint import RunState, list_checkpoints
from run.ranks import RankError
from run.shortage import is_device_failure, is_lost, is_shortage


class CannotGoOn(RuntimeError):
    """A run stops before its last step; the message says why, and how to go on."""


def is_of_device(error: BaseException) -> bool:
    """Tell whether an error means that the device failed or ran out of memory."""
    return is_shortage(error) or is_device_failure(error)


@contextmanager
def naming_device_failure(job: Job, state: RunState) -> Iterator[None]:
    """Turn a failure of the device into a message that names the step and the last checkpoint.

    Raises:
        CannotGoOn: the device failed inside the block.
    """
    try:
        yield
    except (CannotGoOn, RankError):
        raise
    except RuntimeError as error:
        if not is_of_device(error):
            raise
        raise CannotGoOn(
            f"the GPU must go on working: it failed in step {state.step + 1}: "
            f"{first_line(error)}; {last_checkpoint(job)}"
        ) from None


def cannot_save(job: Job, error: OSError) -> CannotGoOn:
    """Say where a run can go on whose results the disk refused."""
    return CannotGoOn(
        f"{job.output} must take the results: got {error}; {last_checkpoint(job)}; make room, or "
        "move the folder to another disk and give its place as --output, with --resume"
    )


def last_checkpoint(job: Job) -> str:
    """Say which checkpoint a run can go on from."""
    found = list_checkpoints(job.output)
    return (
        f"{found[-1]} is the last checkpoint, for --resume" if found else "no checkpoint is there"
    )


def end(error: Exception) -> NoReturn:
    """Print an error on stderr, a line for each complaint, and end the process with exit code 1.

    Where the GPU is lost the process ends at once: torch calls the GPU at a normal exit.
    """
    print(f"error: {printable(error)}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # a GPU that waits for a rank that has ended would not answer
    if not isinstance(error, RankError) and is_lost(torch.device("cuda")):
        os._exit(1)
    sys.exit(1)
