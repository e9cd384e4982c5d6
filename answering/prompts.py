"""The prompts of a file: a line of text each, or a record each with a prompt or messages.

A system prompt, tools and the like may stand beside them in a record, as in data to learn from, and
are read in the same way.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.formats.conversations import CONVERSATION_FIELDS, to_request
from data.formats.examples import Conversation
from data.formats.fields import IGNORED_FIELDS, Fields, is_empty
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
        asked: the conversation that the record asks to be answered.
        unused: the names of the record's fields that nothing here depends on.
    """

    where: str
    given: dict[str, Any]
    asked: Conversation
    unused: tuple[str, ...] = ()

    def conversation(self, system_prompt: str) -> Conversation:
        """The conversation to answer, after the system prompt unless it has one of its own."""
        return self.asked.with_system_prompt(system_prompt) if system_prompt else self.asked

    def text(self) -> str:
        """The text to continue as it stands.

        Raises:
            ValueError: the prompt is a conversation, or has a system prompt or tools.
        """
        text = str(self.given.get("prompt"))
        if self.asked != text_prompt(self.where, text).asked:
            raise ValueError(
                "messages, system prompts and tools are written by a chat template: got --raw, or "
                "no template"
            )
        return text


def text_prompt(where: str, text: str) -> Prompt:
    """The prompt that a text is."""
    return Prompt(where, {"prompt": text}, Conversation(_as_messages(text), []))


def _as_messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


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
    return text_prompt(where, text)


def _of_record(record: Record) -> Prompt:
    where, fields = record.location, record.fields
    given = [name for name in ("prompt", "messages") if fields.get(name) is not None]
    if len(given) != 1:
        raise ValueError(
            f'{where}: a record must have either "prompt" or "messages": got '
            f"{', '.join(fields) or 'no field'}"
        )
    unused = tuple(
        name
        for name, value in fields.items()
        if name not in (*given, *CONVERSATION_FIELDS, *IGNORED_FIELDS) and not is_empty(value)
    )
    beside = Fields(where, fields, "messages", {name: name for name in fields})
    if given == ["prompt"]:
        prompt = _checked(where, fields["prompt"])
        return replace(prompt, asked=to_request(prompt.asked.messages, beside), unused=unused)
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list that is not empty: got {messages!r}")
    checked = to_messages(messages, where, "messages")
    if checked[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: messages must end with one to answer: the last is the assistant's"
        )
    return Prompt(where, {"messages": checked}, to_request(checked, beside), unused)


def describe_unused(prompts: Sequence[Prompt]) -> list[str]:
    """Say which fields of the records are not used, in a line at most."""
    counted = Counter(name for prompt in prompts for name in prompt.unused)
    if not counted:
        return []
    named = ", ".join(f"{name} (in {number:,})" for name, number in sorted(counted.items()))
    return [f"fields of the {len(prompts):,} prompts that no answer is given: {named}"]
