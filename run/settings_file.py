"""A file of settings, YAML or JSON, as the command line that says the same.

    lora_target: [q_proj, v_proj]    ->    --lora_target=q_proj,v_proj
    fp16: false                      ->    --fp16=false

So a name or a value is understood, or refused, as on the command line. A name without a value says
nothing.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from foreign.json_text import read_object
from foreign.yaml_text import Setting, read_yaml_settings

# a name with a space or an equals sign would be read as a name and a value
_NAME = re.compile(r"[\w-]+")


def read_settings(path: Path) -> dict[str, Setting]:
    """Read a file of settings; of YAML no names inside a value are kept.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is neither YAML nor JSON.
    """
    if not _is_json(path):
        return read_yaml_settings(path)
    return {name: _setting(value) for name, value in read_object(path).items()}


def as_arguments(
    settings: Mapping[str, Setting], path: Path, lists: Collection[str], known: Collection[str]
) -> list[str]:
    """Write settings as arguments.

    Args:
        path: of the file that they are from, for messages.
        lists: flags that take texts separated by commas.
        known: flags whose values are read; any other is refused, whatever its value.

    Raises:
        ValueError: a name cannot be a flag's, or a setting has no form of a value.
    """
    arguments: dict[str, str] = {}
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{path} must have the name of a flag before each colon: got {name!r}")
        if value is None:
            continue
        if isinstance(value, list) and flag in lists:
            value = ",".join(value)
        elif not isinstance(value, str) and flag not in known:
            value = ""
        if not isinstance(value, str):
            got = "a list" if isinstance(value, list) else "names or lists inside it"
            raise ValueError(f"{path}: {name} must be one value: got {got}")
        if flag in arguments:
            raise ValueError(f"{path}: {name} must be given once: got it with _ and with -")
        arguments[flag] = f"--{name}={value}"
    return [*arguments.values()]


def _is_json(path: Path) -> bool:
    """Whether a file is JSON, by its ending or else by its first character."""
    if path.suffix in (".json", ".yaml", ".yml"):
        return path.suffix == ".json"
    with path.open("rb") as file:
        return file.read(1) == b"{"


def _setting(value: Any) -> Setting:
    """Write a value of JSON as it would be typed."""
    if isinstance(value, list):
        texts = [_setting(each) for each in value]
        flat = [text for text in texts if isinstance(text, str)]
        return flat if len(flat) == len(texts) else {}
    if isinstance(value, dict):
        return {name: _setting(each) for name, each in value.items()}
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value)
