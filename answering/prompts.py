"""The prompts of a file: a line of text each, or a record each with a prompt or messages."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat.template import Message
from data.formats.turns import to_messages
from data.reading.content import decode, lines_of
from data.reading.files import data_suffix, read_records
from data.reading.record import Record

_TEXTS = (".txt", ".text")


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given, and its place for messages.

    Attributes:
        given: the field "prompt" or "messages" of the record, as the file of answers repeats it.
    """

    where: str
    given: dict[str, Any]

    def messages(self, system_prompt: str) -> list[Message]:
        """The conversation to answer, after the system prompt unless it has one of its own."""
        said = self.given.get("messages") or [{"role": "user", "content": self.given["prompt"]}]
        has_system = said[0]["role"] == "system"
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return [*([] if has_system else system), *said]

    def text(self) -> str:
        """The text to continue as it stands.

        Raises:
            ValueError: the prompt is a conversation.
        """
        if "prompt" not in self.given:
            raise ValueError("messages are written by a chat template: got --raw, or no template")
        return self.given["prompt"]


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts.

    Raises:
        FileNotFoundError, ValueError: as `read_records`, or a record has no prompt.
    """
    # a file of that name is looked for, and refused, by read_records
    is_text = data_suffix(path.name) in _TEXTS and path.is_file()
    prompts = list(_lines(path) if is_text else map(_of_record, read_records(path)))
    if not prompts:
        raise ValueError(f"{path} must hold at least one prompt: got none")
    return prompts


def _lines(path: Path) -> Iterator[Prompt]:
    for number, line in lines_of(path):
        text = decode(line, path, first_line=number).rstrip("\r\n")
        yield _checked(f"{path}:{number}", text)


def _checked(where: str, text: object) -> Prompt:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: a prompt must be a text that is not empty: got {text!r}")
    return Prompt(where, {"prompt": text})


def _of_record(record: Record) -> Prompt:
    where, fields = record.location, record.fields
    given = [name for name in ("prompt", "messages") if fields.get(name) is not None]
    if len(given) != 1:
        raise ValueError(
            f'{where}: a record must have either "prompt" or "messages": got '
            f"{', '.join(fields) or 'no field'}"
        )
    if given == ["prompt"]:
        return _checked(where, fields["prompt"])
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list that is not empty: got {messages!r}")
    checked = to_messages(messages, where, "messages")
    if checked[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: messages must end with one to answer: the last is the assistant's"
        )
    return Prompt(where, {"messages": checked})
