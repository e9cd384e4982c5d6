"""data/formats/tool_calls.py: arguments that come as text become objects, as transformers wants."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_cases import JOINED_CALLS, TOOLS, asset_templates, call, make, say

from data.chat.template import ChatTemplate
from data.formats.tool_calls import decode_arguments, show_arguments

ARGUMENTS = {"x": 1, "y": '"caf\u00e9" <b>', "deep": {"null": None, "list": [1.5, True]}}


def calling(arguments: object) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": call(arguments)}


def test_text_becomes_the_object_that_it_spells() -> None:
    expected = calling(ARGUMENTS)
    assert decode_arguments(calling(json.dumps(ARGUMENTS)), "x") == expected
    assert decode_arguments(expected, "x") == expected
    flat = {"name": "f", "arguments": '{"x": 1}'}
    old = {"role": "assistant", "function_call": flat, "tool_calls": [flat]}
    decoded = {"name": "f", "arguments": {"x": 1}}
    assert decode_arguments(old, "x") == {
        "role": "assistant",
        "function_call": decoded,
        "tool_calls": [decoded],
    }


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("", r"got '', the text must be JSON: got Expecting value"),
        ('{"x": ', r"""got '{"x": ', the text must be JSON: got Expecting"""),
        ("x=1", "got 'x=1', the text must be JSON: got Expecting value"),
        ("[1]", r"got '\[1\]'; correct"),
        ("null", "got 'null'; correct"),
        ('"{}"', r"""got '"{}"'; correct"""),
        ('{"x": NaN}', "Out of range float values"),
        ('{"x": 1, "x": 2}', "the key 'x' twice"),
        ("[" * 100_000, "recursion"),
        ([1], r"got \[1\]"),
        (None, "got None"),
    ],
)
def test_arguments_that_are_no_object_are_refused(arguments: object, match: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^x: tool_calls\[0\]\.function\.arguments must be a JSON object, .*{match}",
    ):
        decode_arguments(calling(arguments), "x")


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"tool_calls": {"name": "f"}}, "x: tool_calls must be a list: got {'name"),
        ({"tool_calls": ["f"]}, r"x: tool_calls\[0\] must be an object: got 'f'"),
        ({"tool_calls": [{"function": "f"}]}, r"tool_calls\[0\].function must be an object"),
        ({"function_call": "f"}, "x: function_call must be an object: got 'f'"),
    ],
)
def test_calls_that_are_none_are_refused(message: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        decode_arguments(message, "x")


def test_every_template_for_tools_writes_text_as_it_writes_objects(assets: Path) -> None:
    num_written = 0
    for name, text in asset_templates(assets).items():
        if "tool_calls" not in text:
            continue
        template = make(text)
        written = []
        for arguments in (ARGUMENTS, json.dumps(ARGUMENTS)):
            message = decode_arguments(calling(arguments), "x")
            messages = show_arguments([*say("hi"), message], template)
            written.append(template.render(messages, tools=TOOLS))
        assert written[0] == written[1], name
        assert json.dumps(ARGUMENTS, ensure_ascii=False) in written[0], name
        num_written += 1
    assert num_written > 5


def test_a_template_that_joins_arguments_to_text_is_shown_text() -> None:
    template = make(JOINED_CALLS)
    written = template.render(show_arguments([*say("hi"), calling(ARGUMENTS)], template))
    assert written == f"hi<call>add\n{json.dumps(ARGUMENTS, ensure_ascii=False)}</call>"


def test_a_template_that_refuses_both_is_shown_the_object() -> None:
    template = ChatTemplate("{{ raise_exception('no') }}", "x", {})
    messages = [*say("hi"), calling(ARGUMENTS)]
    assert show_arguments(messages, template) == messages
