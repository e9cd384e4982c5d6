"""The parts of a conversation that a chat template does not write, which would be lost silently.

A template writes what its author thought of. A role that the template does not know (developer,
tool), the reasoning before an answer, a call or a speaker's name may be missing from its text, and
two samples with opposite instructions become one prompt with two answers.

Every part of a conversation therefore gets a mark of its own at its end, and the template writes
the conversation once more, marks and all: a part whose mark is not in the text was left out.

One such rendering stands for all conversations of its shape: the shapes of their messages
(data/chat/message_shapes.py), the options and the number of tools. So a million chats need a few
hundred renderings more.

Three things may be left out:

- reasoning of an earlier turn, where the template writes it as long as that turn is the last, or
  where that turn is not learned;
- ids, and the name on a function's result: they say which call a result answers, and so does the
  order of the messages;
- fields that say where a message is from (IGNORED_FIELDS).

A number or a boolean has no place for a mark: the template must read a field of that name.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.chat.message_shapes import END_OF_THOUGHT, shape_of, shape_until
from data.chat.template import REASONING_FIELDS, TEMPLATE_ERRORS, ChatTemplate, Message
from data.formats.fields import IGNORED_FIELDS

# judged elsewhere, or an id
_UNMARKED_FIELDS = frozenset(("role", "weight", "tool_call_id"))
_RESULT_ROLES = ("tool", "function", "ipython")
# a template must write these; it may use other fields without writing them
_WRITTEN_FIELDS = frozenset(
    ("content", "name", "tool_calls", "function_call", "tools", *REASONING_FIELDS)
)
_NUM_QUOTED = 3


@dataclass(frozen=True)
class _Part:
    """A part of a message, or of the tools, which have no index.

    Attributes:
        field: the message's field that it is in.
        name: of the part, in errors.
    """

    index: int | None
    field: str
    name: str
    is_reasoning: bool = False


# gives the mark of a part
_Mark = Callable[[_Part], str]


@dataclass(frozen=True)
class _Probe:
    """A conversation that stands for all conversations of its shape: they compare equal."""

    template_text: str
    shape: tuple[object, ...]
    template: ChatTemplate = field(compare=False)
    messages: Sequence[Message] = field(compare=False)
    variables: Mapping[str, Any] = field(compare=False)
    text: str = field(compare=False)


def check_written(
    template: ChatTemplate,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    text: str,
    targets: Sequence[int],
) -> list[int]:
    """Refuse a conversation of which the template leaves out a part that a target may depend on.

    Args:
        variables: as ChatTemplate.variables() gives them.
        text: the conversation as the template writes it.
        targets: indices of the messages that are learned, ascending.

    Returns:
        The targets without their reasoning, which the template writes only as long as the turn is
        the last.

    Raises:
        ValueError: names the parts that are left out.
    """
    shape = _shape_of(template, messages, variables)
    lost, left_out = [], []
    for part, may_go in _unwritten(
        _Probe(template.text, shape, template, messages, variables, text)
    ):
        if part.index is None:
            lost.append(part.name)
        # a target depends on nothing that comes after it
        elif part.index <= targets[-1] and not (
            may_go or (part.is_reasoning and part.index not in targets)
        ):
            role = messages[part.index]["role"]
            lost.append(f"{part.name} of message {part.index} (role {role!r})")
        elif may_go and part.index in targets:
            left_out.append(part.index)
    if lost:
        more = f" and {len(lost) - _NUM_QUOTED} more" if len(lost) > _NUM_QUOTED else ""
        raise ValueError(
            f"{template.name} must write all that an answer may depend on: got a template that "
            f"ignores {', '.join(lost[:_NUM_QUOTED])}{more}; choose one that writes it "
            "(--chat-template), or delete it from the data (a field also with --ignore-fields)"
        )
    return left_out


def _shape_of(
    template: ChatTemplate, messages: Sequence[Message], variables: Mapping[str, Any]
) -> tuple[object, ...]:
    given = [(k, v) for k, v in variables.items() if k not in template.special_tokens]
    options = tuple((k, v) for k, v in given if isinstance(v, (int, float, str)))
    sizes = tuple((k, len(v)) for k, v in given if isinstance(v, (list, dict)))
    return (options, sizes, *map(shape_of, messages))


# holds a conversation for each shape
@functools.lru_cache(maxsize=256)
def _unwritten(probe: _Probe) -> tuple[tuple[_Part, bool], ...]:
    """The parts that the template leaves out, and whether each is reasoning that the template
    writes while its turn is the last."""
    prefix = "mark"
    while prefix in probe.text.lower():
        prefix += "k"
    parts, together = _write_marked(probe, prefix)
    found = None if together is None else set(re.findall(rf"{prefix}\d+x", together))
    # of reasoning that is left out, by the shape of its message
    written_last: dict[object, bool] = {}
    left_out = []
    for number, part in enumerate(parts):
        mark = _mark_of(prefix, number)
        if found is None:
            _, text = _write_marked(probe, prefix, only=number)
            # a template that refuses a mark has read the part
            is_written = text is None or mark in text
        else:
            is_written = mark in found
        if is_written:
            continue
        if part.field not in _WRITTEN_FIELDS and probe.template.reads(part.field):
            continue
        may_go = False
        if part.is_reasoning:
            assert part.index is not None
            shape = part.name, shape_until(probe.messages, part.index + 1)
            if shape not in written_last:
                _, text = _write_marked(probe, prefix, only=number, end=part.index + 1)
                written_last[shape] = text is not None and mark in text
            may_go = written_last[shape]
        left_out.append((part, may_go))
    return tuple(left_out)


def _write_marked(
    probe: _Probe, prefix: str, *, only: int | None = None, end: int | None = None
) -> tuple[list[_Part], str | None]:
    """The parts, and the text with the marks of all of them, or of one.

    Args:
        end: the number of messages to write, all if None.

    Returns:
        None in place of a text that the template refuses to write.
    """
    parts: list[_Part] = []

    def mark(part: _Part) -> str:
        parts.append(part)
        number = len(parts) - 1
        return _mark_of(prefix, number) if only in (None, number) else ""

    messages = [_marked(message, i, mark) for i, message in enumerate(probe.messages)]
    tools = probe.variables["tools"]
    if tools:
        tools = [_marked_tool(tool, f"tools[{i}]", mark) for i, tool in enumerate(tools)]
    try:
        text = probe.template.attempt(messages[:end], {**probe.variables, "tools": tools})
    except TEMPLATE_ERRORS:
        return parts, None
    # a template may write in capitals
    return parts, text.lower()


def _mark_of(prefix: str, number: int) -> str:
    return f"{prefix}{number}x"


def _marked(message: Message, index: int, mark: _Mark) -> Message:
    marked = dict(message)
    reasoning: dict[object, str] = {}
    for key, value in message.items():
        is_link = key == "name" and message["role"] in _RESULT_ROLES
        if key in _UNMARKED_FIELDS | IGNORED_FIELDS or is_link or value in (None, "", [], {}):
            continue
        if key == "tool_calls":
            marked[key] = [
                _marked_call(call, _Part(index, key, f"{key}[{i}]"), mark)
                for i, call in enumerate(value)
            ]
        elif key == "function_call":
            marked[key] = _marked_call(value, _Part(index, key, key), mark)
        elif isinstance(value, str):
            if key == "content" and message["role"] == "assistant" and END_OF_THOUGHT in value:
                thought = _Part(index, key, f"the text before {END_OF_THOUGHT}", True)
                before, _, after = value.partition(END_OF_THOUGHT)
                value = before + mark(thought) + END_OF_THOUGHT + after
            part = _Part(index, key, key, key in REASONING_FIELDS)
            # templates see the same reasoning under each of its names
            if part.is_reasoning and value in reasoning:
                marked[key] = reasoning[value]
                continue
            marked[key] = value + mark(part)
            reasoning[value] = marked[key]
        elif isinstance(value, dict):
            marked[key] = _with_key(value, mark(_Part(index, key, key)))
        elif isinstance(value, list):
            marked[key] = [*value, mark(_Part(index, key, key))]
        else:
            mark(_Part(index, key, key))
    return marked


def _marked_call(call: Mapping[str, Any], part: _Part, mark: _Mark) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _marked_call(call["function"], part, mark)}
    marked = dict(call)
    if isinstance(call.get("name"), str):
        marked["name"] += mark(_Part(part.index, part.field, f"{part.name}.name"))
    if arguments := call.get("arguments"):
        added = mark(_Part(part.index, part.field, f"{part.name}.arguments"))
        is_text = isinstance(arguments, str)
        marked["arguments"] = arguments + added if is_text else _with_key(arguments, added)
    return marked


def _marked_tool(tool: Any, name: str, mark: _Mark) -> Any:
    if not isinstance(tool, dict):
        return tool
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": _marked_tool(tool["function"], name, mark)}
    if not isinstance(tool.get("name"), str):
        return tool
    return {**tool, "name": tool["name"] + mark(_Part(None, "tools", name))}


def _with_key(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {**value, key: ""} if key else dict(value)
