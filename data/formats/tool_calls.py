"""The arguments of tool calls, decoded for chat templates that expect an object.

OpenAI's API and the data sets recorded from it keep arguments as JSON text. Most templates write
arguments with `tojson`, which turns such text into one escaped string, and the model would learn
to call functions with a string. Arguments are therefore objects in every conversation. The few
templates that join arguments to other text (DeepSeek's) are shown the object's JSON.

LLaMA-Factory and ms-swift keep a call as JSON text in a turn of its own.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

from data.chat.template import TEMPLATE_ERRORS, ChatTemplate, Message
from foreign.json_text import parse_json


def decode_arguments(message: Message, where: str) -> Message:
    """The message with the arguments of its calls as objects.

    Args:
        where: the message's place, for errors.

    Raises:
        ValueError: a call or its arguments are not an object, nor the JSON text of one.
    """
    decoded = dict(message)
    if message.get("tool_calls"):
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise ValueError(f"{where}: tool_calls must be a list: got {calls!r:.60}; correct it")
        decoded["tool_calls"] = [
            _decode_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    if message.get("function_call"):
        decoded["function_call"] = _decode_call(message["function_call"], f"{where}: function_call")
    return decoded


def read_calls(value: object, where: str) -> list[dict[str, Any]]:
    """The calls that a turn consists of, as those of a message.

    Args:
        value: {"name": ..., "arguments": {...}}, a list of such objects, or their JSON text.
        where: the turn's place, for errors.

    Raises:
        ValueError: it is nothing of the kind.
    """
    if isinstance(value, str):
        value = parse_json(value, f"{where}: a call", "correct it")
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not _is_bare_call(call):
            raise ValueError(
                f'{where}: a call must be {{"name": "...", "arguments": {{...}}}}, or a list of '
                f"such calls: got {call!r:.60}; correct it"
            )
    if not calls:
        raise ValueError(f"{where}: a turn of calls must have one: got none; delete the turn")
    return [{"type": "function", "function": call} for call in calls]


def show_arguments(messages: Sequence[Message], template: ChatTemplate) -> list[Message]:
    """The messages with the arguments of their calls as the template can write them."""
    if not any(message.get("tool_calls") for message in messages) or not _wants_text(
        template.text, tuple(template.special_tokens.items())
    ):
        return list(messages)
    return [
        {**message, "tool_calls": [_encode_call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _is_bare_call(call: object) -> bool:
    """Whether it is a call, and nothing more, which would be lost."""
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
        return False
    return isinstance(call["name"], str)


def _decode_call(call: object, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise ValueError(f"{where} must be an object: got {call!r:.60}; correct it")
    if "function" in call:
        return {**call, "function": _decode_call(call["function"], f"{where}.function")}
    arguments = call.get("arguments", {})
    if isinstance(arguments, dict):
        return call
    came = f"{arguments!r:.60}"
    if isinstance(arguments, str):
        try:
            value = parse_json(arguments, "the text")
            # NaN and Infinity, which Python's decoder takes, are no JSON
            json.dumps(value, allow_nan=False)
        except ValueError as error:
            came += f", {error}"
        else:
            if isinstance(value, dict):
                return {**call, "arguments": value}
    raise ValueError(
        f"{where}.arguments must be a JSON object, or the JSON text of one: got {came}; correct "
        'it ("{}" for a function without arguments)'
    )


def _encode_call(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _encode_call(call["function"])}
    if "arguments" not in call:
        return call
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}


@functools.lru_cache(maxsize=16)
def _wants_text(template: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    """Whether the template refuses arguments as an object and takes them as text."""
    probe = ChatTemplate(template, "a probe", dict(special_tokens))
    variables = probe.variables(tools=None, variables=None, now=None)
    takes = {}
    for arguments in ({"x": 1}, '{"x": 1}'):
        # Mistral's templates want ids of nine characters
        function = {"name": "f", "arguments": arguments}
        calls = [{"id": "call00000", "type": "function", "function": function}]
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        try:
            probe.attempt(messages, variables)
        except TEMPLATE_ERRORS:
            takes[type(arguments)] = False
        else:
            takes[type(arguments)] = True
    return takes[str] and not takes[dict]
