"""What --resume goes on from: the last whole checkpoint of a run that has not ended."""

from pathlib import Path

from foreign.terminal import one_line
from lora.adapter_file import WEIGHTS_NAME
from run.checkpoint import ResumePoint
from run.config import TrainConfig
from run.folder import is_finished, resume_point
from run.metrics import METRICS_FILE, last_step


def finished_lines(config: TrainConfig) -> list[str]:
    """Say that the run to go on with has ended, and how to train its adapter further; no lines
    where it has not."""
    folder = Path(config.output)
    has_ended = config.resume and is_finished(folder) and (folder / WEIGHTS_NAME).is_file()
    if not has_ended:
        return []
    step = last_step(folder / METRICS_FILE)
    since = "" if step is None else f" since step {step:,}"
    return [
        f"{folder} is finished{since}, its adapter is there: nothing to resume",
        f"to train it further, start a new run with --init-adapter {folder}",
    ]


def find_checkpoint_to_resume(
    config: TrainConfig, num_ranks: int
) -> tuple[ResumePoint | None, dict[Path, str]]:
    """Read the checkpoint to go on from, and say in a line which one that is.

    Returns:
        As `resume_point`.

    Raises:
        ValueError: as `resume_point`, or the run has its adapter and no checkpoint.
        OSError: a checkpoint cannot be read.
    """
    resumed, damaged = resume_point(config, num_ranks)
    for complaint in damaged.values():
        print(one_line(f"{complaint}; going back to the one before it"))
    if resumed:
        print(f"resumed from {resumed.path}: {resumed.state.step:,} steps done")
    elif config.resume and (Path(config.output) / WEIGHTS_NAME).is_file():
        raise ValueError(
            "--resume must go on with a run that has not ended, or that kept a checkpoint: "
            f"{config.output} has its adapter and no checkpoint; to train that further, start a "
            f"new run with --init-adapter {config.output}"
        )
    elif config.resume:
        print(f"nothing to resume in {config.output}: starting from the first step")
    return resumed, damaged
