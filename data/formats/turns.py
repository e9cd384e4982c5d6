"""The turns of a conversation as messages with a role and a content, as chat templates read them.

A list of turns may have, mixed as they are in the files of others:

    {"role": "user", "content": "..."}             OpenAI's and TRL's messages
    {"from": "human", "value": "..."}              FastChat's turns
    {"human": "...", "assistant": "..."}           Firefly's and ms-swift's pairs
    {"system"?: "...", "input": "...", "output": "..."}    XTuner's and Capybara's pairs
    {"from": "function_call", "value": "{\"name\": ..., \"arguments\": ...}"}    LLaMA-Factory's
                                                   calls, and ms-swift's ("tool_call")
    {"from": "observation", "value": "..."}        their results, and ms-swift's ("tool_response")

A call is part of what the assistant says: it joins the assistant's message before it, so that text
and calls, or several calls in a row, are one turn. LLaMA-Factory leaves out such a conversation.

A message keeps all its fields. Roles, contents and calls that no chat template can take are errors
with their place.
"""

from collections.abc import Mapping
from typing import Any

from data.chat.template import Message
from data.formats.fields import IGNORED_FIELDS, excerpt, is_empty, kind_of
from data.formats.tool_calls import decode_arguments, read_calls

CALL = "call"
# the names of those who speak, each with the role that templates know or CALL
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "function",
    "ipython": "ipython",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "function_call": CALL,
    "tool_call": CALL,
    "observation": "tool",
    "tool_response": "tool",
}
# FastChat's turns know no role of that name
SHAREGPT_ROLES = ROLES | {"function": "tool"}
_PAIRS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))


def to_messages(
    turns: list[object], location: str, name: str, roles: Mapping[str, str] = ROLES
) -> list[Message]:
    """Read turns as messages.

    Args:
        name: of the field that they are from, for errors.
        roles: those who may speak, each with the role of the message.

    Raises:
        ValueError: a turn is none; the message starts with its place.
    """
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        where = f"{location}: {name}[{index}]"
        if not isinstance(turn, dict):
            raise ValueError(
                f'{where} must be an object with "role" and "content", or with "from" and '
                f'"value": got {kind_of(turn)}; correct it'
            )
        turn = {key: value for key, value in turn.items() if value is not None}
        for said in _of_pair(turn, where) or [_of_turn(turn, where, roles)]:
            if said["role"] != CALL:
                messages.append(_checked(said, where))
                continue
            called = _checked(_calling(said, where), where)
            if messages and _can_join(messages[-1], called):
                before = messages.pop()
                calls = [*before.get("tool_calls", []), *called["tool_calls"]]
                called = before | {"tool_calls": calls}
            messages.append(called)
    return messages


def _of_pair(turn: dict[str, Any], where: str) -> list[Message]:
    """The messages of a request with its answer, none where the turn is no such pair."""
    pair = next((names for names in _PAIRS if turn.keys() >= {*names}), None)
    if pair is None or "role" in turn or "from" in turn:
        return []
    others = [
        name
        for name, value in turn.items()
        if name not in (*pair, "system", *IGNORED_FIELDS) and not is_empty(value)
    ]
    if others:
        raise ValueError(
            f"{where} must have no field that would be lost: got {', '.join(others)} beside "
            f"{' and '.join(pair)}; if no answer depends on it, give --ignore-fields "
            f"{','.join(others)}"
        )
    said = zip(("system", "user", "assistant"), ("system", *pair), strict=True)
    return [
        {"role": role, "content": turn[name]}
        for role, name in said
        if name != "system" or turn.get("system")
    ]


def _of_turn(turn: dict[str, Any], where: str, roles: Mapping[str, str]) -> Message:
    """A turn as a message, or as one whose role is CALL."""
    names = [turn[key] for key in ("from", "role") if key in turn] or [None]
    for name in names:
        if not isinstance(name, str) or name not in roles:
            raise ValueError(
                f"{where} must have a role among {', '.join(roles)}: got {excerpt(name)}; "
                "correct it"
            )
    said = [turn[key] for key in ("value", "content") if key in turn]
    if len({roles[name] for name in names}) > 1 or (len(said) > 1 and said[0] != said[1]):
        raise ValueError(
            f'{where} must have "from" and "value", or "role" and "content": got both, which '
            "differ; delete one of them"
        )
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message: Message = {**others, "role": roles[names[0]]}
    return message | {"content": said[0]} if said else message


def _calling(turn: Message, where: str) -> Message:
    """A turn that consists of calls as a message of the assistant."""
    others = {key: value for key, value in turn.items() if key != "content"}
    return {**others, "role": "assistant", "tool_calls": read_calls(turn.get("content"), where)}


def _can_join(before: Message, called: Message) -> bool:
    """Whether calls belong to the message before: the assistant's, if both are learned or neither,
    and the calls' turn has no field that would be lost."""
    fields = {"weight", *called} - {"role", "tool_calls", *IGNORED_FIELDS}
    is_alike = all(before.get(name) == called.get(name) for name in fields)
    return before["role"] == "assistant" and is_alike


def _checked(message: Message, where: str) -> Message:
    if message.get("weight") not in (None, 0, 1):
        raise ValueError(
            f"{where} must have a weight of 0 (not learned) or 1: got {excerpt(message['weight'])}"
        )
    # a call needs no words; templates see that there are none
    is_call = message["role"] == "assistant" and (
        message.get("tool_calls") or message.get("function_call")
    )
    if "content" in message or not is_call:
        message = message | {"content": _content(message.get("content"), where)}
    return decode_arguments(message, where)


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(
            f"{where} must have text as its content: got {kind_of(content)}; correct it"
        )
    return "".join(_text_of(part, where) for part in content)


def _text_of(part: object, where: str) -> str:
    """The text of a part of a content, which some files call its value."""
    found = []
    if isinstance(part, dict) and part.get("type") == "text":
        found = [part[name] for name in ("text", "value") if part.get(name) is not None]
    if len(found) != 1 or not isinstance(found[0], str):
        raise ValueError(
            f'{where} must have content parts {{"type": "text", "text": "..."}}: got '
            f"{excerpt(part)}; only text can be learned from"
        )
    return found[0]
