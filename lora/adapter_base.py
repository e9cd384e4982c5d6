"""The place of an adapter's base model, as adapter_config.json has it."""

from pathlib import Path

from foreign.json_text import read_object
from foreign.reading import Reading
from hub.fetch import parse_hub_id
from lora.adapter_file import CONFIG_NAME


def read_base_place(folder: Path) -> str:
    """Read the path or hub id of an adapter's base, with @revision if there is one; empty where the
    adapter names none.

    Raises:
        ValueError: adapter_config.json is not what PEFT writes.
    """
    path = folder / CONFIG_NAME
    with Reading(path):
        fields = read_object(path)
        place, revision = fields.get("base_model_name_or_path"), fields.get("revision")
        for name, value in (("base_model_name_or_path", place), ("revision", revision)):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{path}: {name} must be a text: got {value!r}")
    is_pinned = bool(revision) and not Path(place or "").exists() and parse_hub_id(place or "")
    return f"{place}@{revision}" if is_pinned else place or ""
