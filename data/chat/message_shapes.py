"""The shape of a message: its role, its fields, which of them are empty, and which texts hold
"</think>". A chat template can decide by these.

Templates copy the words themselves, except "</think>", where templates of reasoning models cut. So
one rendering of a message or a conversation tells something about all of the same shape.
"""

from collections.abc import Sequence
from typing import TypeAlias

from data.chat.template import REASONING_FIELDS, Message

Shape: TypeAlias = tuple[object, ...]

END_OF_THOUGHT = "</think>"
# a message and the one before it
_NUM_LAST = 2


def shape_until(messages: Sequence[Message], end: int) -> tuple[Shape, ...]:
    """The shapes of the last messages before index `end`. By these a template decides how it writes
    the last message of a conversation, if it writes that message in another way than the others."""
    return tuple(map(shape_of, messages[max(end - _NUM_LAST, 0) : end]))


def shape_of(message: Message) -> Shape:
    """The shape of a message, equal for messages that a template treats alike."""
    reasoning = [message[name] for name in REASONING_FIELDS if name in message]
    is_said_once = all(each == reasoning[0] for each in reasoning)
    return (is_said_once, *((key, _shape(key, value)) for key, value in message.items()))


def _shape(name: str, value: object) -> object:
    """What a template can decide by in a message's field."""
    if isinstance(value, str):
        return value if name == "role" else (bool(value.strip()), END_OF_THOUGHT in value)
    if name == "arguments" or not isinstance(value, (dict, list)):
        return type(value), bool(value)
    if isinstance(value, dict):
        return tuple((key, _shape(key, each)) for key, each in value.items())
    return tuple(_shape("", each) for each in value)
