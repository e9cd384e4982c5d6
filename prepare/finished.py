"""A run that has ended, which --resume does not train again."""

from pathlib import Path

from lora.adapter_file import WEIGHTS_NAME
from run.folder import is_finished
from run.metrics import METRICS_FILE, last_step


def finished_lines(folder: Path) -> list[str]:
    """Say that a folder's run has ended, and how to train its adapter further; no lines where it
    has not."""
    if not is_finished(folder) or not (folder / WEIGHTS_NAME).is_file():
        return []
    step = last_step(folder / METRICS_FILE)
    since = "" if step is None else f" since step {step:,}"
    return [
        f"{folder} is finished{since}, its adapter is there: nothing to resume",
        f"to train it further, start a new run with --init-adapter {folder}",
    ]
