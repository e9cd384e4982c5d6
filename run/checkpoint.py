"""Checkpoints of a run: folders `checkpoint-N`, each whole, in safetensors and JSON.

    checkpoint-N/   the adapter, as its own room writes it
                    optimizer.safetensors     the moments: float32, or codes and their scales
                    state.json                counters, loss scale, time of the first start

Nothing is pickled, unlike transformers' optimizer.pt and rng_state.pth. There is no random state to
keep either: every step seeds itself from the run's seed and its own number.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from run.atomic import new_folder

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class RunState:
    """What a resumed run must know besides the adapter and the moments."""

    started: str  # ISO time of the first start; chat templates may print the date
    step: int = 0  # optimizer steps done, skipped ones included
    num_updates: int = 0  # steps that changed the parameters
    num_skipped: int = 0  # steps whose gradients were not finite
    tokens: int = 0  # seen so far, padding left out
    target_tokens: int = 0  # learned so far
    loss_scale: float = 1.0
    num_good_steps: int = 0  # since the loss scale last changed


def save_checkpoint(
    folder: Path,
    state: RunState,
    optimizer: Mapping[str, Tensor],
    write_adapter: Callable[[Path], None],
) -> Path:
    """Write `checkpoint-{step}` into a run's folder, whole or not at all, and return its path."""
    path = folder / f"checkpoint-{state.step}"
    with new_folder(path) as partial:
        write_adapter(partial)
        save_file({name: t.cpu() for name, t in optimizer.items()}, partial / OPTIMIZER_FILE)
        (partial / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint with the most steps, None if there is none."""
    numbered = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := CHECKPOINT_NAME.fullmatch(path.name)) and path.is_dir()
    }
    return numbered[max(numbered)] if numbered else None


def load_checkpoint(path: Path) -> tuple[RunState, dict[str, Tensor]]:
    """Read a checkpoint's state and moments; the adapter is for its own room to read.

    Raises:
        ValueError: a file is missing, damaged or of another version.
    """
    try:
        state = RunState(**json.loads((path / STATE_FILE).read_text()))
        return state, load_file(path / OPTIMIZER_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{path} must be a whole checkpoint of this version: got {error}; "
            "delete the folder to resume from the one before it"
        ) from error
