"""The run that trained an adapter: its folder, its settings and its tokenizer."""

from pathlib import Path

from data.tokenizer_files import TOKENIZER_FILE
from run.checkpoint import CHECKPOINT_NAME
from run.config import TrainConfig, find_config, read_fields


def run_folder(adapter: Path) -> Path:
    """Find the folder of the run that made an adapter, which may lie in one of its checkpoints."""
    is_checkpoint = CHECKPOINT_NAME.fullmatch(adapter.name) is not None
    return adapter.parent if is_checkpoint else adapter


def settings_of(adapter: Path) -> tuple[TrainConfig, str]:
    """Find the settings that an adapter was trained with: its run's, else the defaults.

    Returns:
        The settings, and the name of their source.

    Raises:
        ValueError: the run's settings are damaged.
    """
    path = find_config(run_folder(adapter))
    return (TrainConfig(**read_fields(path)), str(path)) if path else (TrainConfig(), "default")


def tokenizer_folder(adapter: Path | None, model: Path) -> Path:
    """Find the folder of the tokenizer: the run's, where it has one, else the model's."""
    folder = run_folder(adapter) if adapter else model
    return folder if (folder / TOKENIZER_FILE).is_file() else model
