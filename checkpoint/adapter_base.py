"""The base model of an adapter: found where the adapter says it is, and compared with it."""

from pathlib import Path

from checkpoint.files import find_checkpoint
from checkpoint.identity import identify
from checkpoint.opening import Checkpoint
from lora.adapter_base import read_base_place
from lora.adapter_file import read_base_identity


def find_base(adapter: Path, model: str = "") -> Path:
    """Find the folder of an adapter's base: the given path or hub id, else the adapter's own.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `hub.fetch.find_folder`.
        ValueError: the adapter names no base, or the repository has no weights in safetensors.
    """
    if model:
        return find_checkpoint(model)
    place = read_base_place(adapter)
    if not place:
        raise ValueError(
            f"--model must be given: {adapter} does not say which model it was trained on"
        )
    try:
        return find_checkpoint(place, f"the base of {adapter}")
    except (FileNotFoundError, PermissionError, ConnectionError) as error:
        raise type(error)(f"{error}; or give the base with --model") from None


def is_base_of(adapter: Path, checkpoint: Checkpoint) -> bool | None:
    """Whether an adapter was trained on a checkpoint or a copy of it in 4 bits; None where the
    adapter does not say.

    Raises:
        FileNotFoundError, ValueError: as `lora.adapter_file.read_base_identity`.
    """
    trained_on = read_base_identity(adapter)
    return trained_on == identify(checkpoint).original if trained_on else None
