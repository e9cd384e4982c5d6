"""Where a chat template comes from: a checkpoint's files, a bundled one, or a file of the user's.

A checkpoint has one or several, by name, as transformers reads them: chat_template.jinja is the
"default" and additional_chat_templates/NAME.jinja the others; only where there is neither, the
chat_template of tokenizer_config.json, one text or a list of {"name": ..., "template": ...}; and
only where there is none either, that of chat_template.json, which the processors of models for
images had.

The bundled ones are the formats of model families, for base models that come without a template.
Each is written for training: {% generation %} marks enclose what the assistant says, up to the
token that ends its turn.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from foreign.json_text import read_object

TEMPLATE_FILE = "chat_template.jinja"
PROCESSOR_TEMPLATE_FILE = "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT = "default"
# ten times the longest known template
MOST_CHARACTERS = 500_000
BUNDLED_TEMPLATES = Path(__file__).parent / "templates"


class NamedText(NamedTuple):
    """A template's text, and its name in errors."""

    text: str
    name: str


def checkpoint_templates(
    folder: Path, config: Mapping[str, object], config_path: Path
) -> dict[str, NamedText]:
    """The templates of a checkpoint by name, none if it has none.

    Args:
        config: the content of tokenizer_config.json.

    Raises:
        ValueError: a template is no text or too long, or the list of templates is malformed.
    """
    templates = _checkpoint_templates(folder, config, config_path)
    for text, name in templates.values():
        if len(text) > MOST_CHARACTERS:
            raise ValueError(
                f"{name} must have at most {MOST_CHARACTERS:,} characters: got {len(text):,}; "
                "choose another with --chat-template"
            )
    return templates


def _checkpoint_templates(
    folder: Path, config: Mapping[str, object], config_path: Path
) -> dict[str, NamedText]:
    files = {}
    if (folder / TEMPLATE_FILE).is_file():
        files[DEFAULT] = folder / TEMPLATE_FILE
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        files[path.stem] = path
    if files:
        return {
            name: NamedText(_read(path), f"the chat template {path}")
            for name, path in files.items()
        }
    given = config.get("chat_template")
    if given is None and (folder / PROCESSOR_TEMPLATE_FILE).is_file():
        config_path = folder / PROCESSOR_TEMPLATE_FILE
        given = read_object(config_path, "download it again").get("chat_template")
    if given is None:
        return {}
    where = f"chat_template of {config_path}"
    if isinstance(given, str):
        return {DEFAULT: NamedText(given, f"the {where}")}
    if not isinstance(given, list):
        raise ValueError(
            f"the {where} must be text or a list of named texts: got {type(given).__name__}; "
            "correct it"
        )
    named = {}
    for index, entry in enumerate(given):
        name = entry.get("name") if isinstance(entry, dict) else None
        text = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(
                f'the {where} must be a list of {{"name": "...", "template": "..."}}: got '
                f"{repr(entry)[:60]} at index {index}; correct it"
            )
        named[name] = NamedText(text, f"the {where} named {name!r}")
    return named


def choose_templates(
    choice: str, folder: Path, config: Mapping[str, object], config_path: Path
) -> dict[str, NamedText]:
    """The checkpoint's templates, or the one template that --chat-template names.

    Args:
        choice: the name of a bundled template, the path of a file, the name of one of the
            checkpoint's templates, the first of these that there is; or "" for all of the
            checkpoint's.

    Raises:
        ValueError: there is no such template, or it is not UTF-8; as checkpoint_templates().
    """
    if not choice:
        return checkpoint_templates(folder, config, config_path)
    bundled = {path.stem: path for path in sorted(BUNDLED_TEMPLATES.glob("*.jinja"))}
    if choice in bundled:
        return {DEFAULT: NamedText(_read(bundled[choice]), f"the bundled chat template {choice}")}
    if Path(choice).is_file():
        return {DEFAULT: NamedText(_read(Path(choice)), f"the chat template {choice}")}
    own = checkpoint_templates(folder, config, config_path)
    if choice not in own:
        nearest = difflib.get_close_matches(choice.lower(), [*bundled, *own], n=2)
        question = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        raise ValueError(
            f"--chat-template must be a bundled template ({', '.join(bundled)}), the path of a "
            f".jinja file, or a template of the checkpoint ({', '.join(own) or 'it has none'}): "
            f"got {choice!r}{question}"
        )
    return {DEFAULT: own[choice]}


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the chat template {path} must be UTF-8: got {error}") from error
