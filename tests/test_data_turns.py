"""data/formats/turns.py: the turns of other trainers' files are messages, nothing is dropped."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_cases import asset_templates, make
from test_data_formats import ASSISTANT, SYSTEM, USER, convert

from data.formats.examples import Conversation
from data.formats.tool_calls import read_calls, show_arguments

SUM = {"name": "add", "arguments": {"x": 1, "y": [2]}}
PRODUCT = {"name": "multiply", "arguments": {}}
RESULT = {"role": "tool", "content": "3"}


def calling(*calls: dict[str, Any], **others: object) -> dict[str, Any]:
    wrapped = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", **others, "tool_calls": wrapped}


def converse(*turns: object, **beside: object) -> Conversation:
    example = convert({"conversations": [*turns], **beside}, "sharegpt")
    assert isinstance(example, Conversation)
    return example


def turn(name: str, value: object, **others: object) -> dict[str, object]:
    return {"from": name, "value": value, **others}


PAIRS: dict[str, list[object]] = {
    "Firefly": [{"human": "hi", "assistant": "yo"}],
    "ms-swift": [{"user": "hi", "assistant": "yo"}],
    "XTuner": [{"input": "hi", "output": "yo"}],
    "without a system prompt": [{"system": "", "input": "hi", "output": "yo", "role": None}],
    "with an id": [{"human": "hi", "assistant": "yo", "id": 3, "note": ""}],
}


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("name", ["conversation", "conversations"])
def test_pairs_are_a_request_and_its_answer(name: str, pairs: list[object]) -> None:
    expected = Conversation([USER, ASSISTANT] * 2, [1, 3])
    assert convert({name: pairs * 2}, "sharegpt") == expected


def test_the_system_prompt_of_the_first_pair_comes_first() -> None:
    pairs = [{"system": "s", "input": "hi", "output": "yo"}, {"input": "hi", "output": "yo"}]
    expected = Conversation([SYSTEM, *[USER, ASSISTANT] * 2], [2, 4])
    assert convert({"conversation": pairs}, "sharegpt") == expected
    assert convert({"conversation": pairs, "system": "s"}, "sharegpt") == expected
    with pytest.raises(ValueError, match="one system prompt: got 't' and 's'"):
        convert({"conversation": pairs, "system": "t"}, "sharegpt")


def test_turns_of_all_kinds_may_be_mixed() -> None:
    pair = {"human": "hi", "assistant": "yo"}
    found = converse(USER, turn("gpt", "yo"), pair, {"from": "human", "content": "hi"}, ASSISTANT)
    assert found == Conversation([USER, ASSISTANT] * 3, [1, 3, 5])
    said: dict[str, object] = {"messages": [turn("human", "hi"), {"role": "bot", "value": "yo"}]}
    assert convert(said, "messages") == Conversation([USER, ASSISTANT], [1])


def test_a_message_with_the_names_of_a_pair_beside_it_keeps_them() -> None:
    noted = {**ASSISTANT, "input": "a", "output": "b"}
    assert converse(USER, noted) == Conversation([USER, noted], [1])
    assert converse(USER, turn("gpt", "yo", input="a", output="b")).messages == [USER, noted]


def test_a_function_that_speaks_in_turns_is_a_tool() -> None:
    assert converse(USER, turn("function", "3"), ASSISTANT).messages == [USER, RESULT, ASSISTANT]
    said: dict[str, object] = {"messages": [USER, {**RESULT, "role": "function"}, ASSISTANT]}
    example = convert(said, "messages")
    assert isinstance(example, Conversation)
    assert example.messages[1]["role"] == "function"


@pytest.mark.parametrize("name", ["text", "value"])
def test_a_part_may_have_its_text_as_a_value(name: str) -> None:
    parts = [{"type": "text", name: "y", "text" if name == "value" else "value": None}]
    found = converse(USER, {"role": "assistant", "content": [*parts, {"type": "text", name: "o"}]})
    assert found == Conversation([USER, ASSISTANT], [1])


@pytest.mark.parametrize("form", [lambda value: value, json.dumps], ids=["object", "text"])
def test_a_turn_of_calls_is_the_assistants(form: Any) -> None:
    for calls, expected in ((SUM, [SUM]), ([SUM], [SUM]), ([SUM, PRODUCT], [SUM, PRODUCT])):
        found = converse(
            turn("human", "hi"),
            turn("function_call", form(calls)),
            turn("observation", "3"),
            turn("gpt", "yo"),
        )
        assert found == Conversation([USER, calling(*expected), RESULT, ASSISTANT], [1, 3])


def test_arguments_in_a_turn_of_calls_may_be_text_themselves() -> None:
    text = json.dumps({**SUM, "arguments": json.dumps(SUM["arguments"])})
    assert converse(USER, turn("function_call", text)) == Conversation([USER, calling(SUM)], [1])


def test_calls_in_a_row_are_one_turn_of_the_assistant() -> None:
    calls = [{"role": "tool_call", "content": json.dumps(call)} for call in (SUM, PRODUCT)]
    results = [{"role": "tool_response", "content": "3"}] * 2
    expected = [USER, calling(SUM, PRODUCT), RESULT, RESULT, ASSISTANT]
    found = convert({"messages": [USER, *calls, *results, ASSISTANT]}, "messages")
    assert found == Conversation(expected, [1, 4])
    # what is said before a call is said in the same turn
    found = convert({"messages": [USER, ASSISTANT, *calls]}, "messages")
    assert found == Conversation([USER, calling(SUM, PRODUCT, content="yo")], [1])
    # two turns between which something happened are two
    found = converse(USER, calls[0], RESULT, calls[1])
    assert found == Conversation([USER, calling(SUM), RESULT, calling(PRODUCT)], [1, 3])


@pytest.mark.parametrize(
    ("before", "after", "joins"),
    [
        ({}, {}, True),
        ({"weight": 0}, {"weight": 0}, True),
        ({"weight": 0}, {}, False),
        ({}, {"weight": 0}, False),
        ({"id": 1}, {"id": 2}, True),
        ({"reasoning_content": "a"}, {}, True),
        ({}, {"reasoning_content": "a"}, False),
    ],
)
def test_a_call_joins_what_is_learned_as_it_is_and_loses_nothing(
    before: dict[str, object], after: dict[str, object], joins: bool
) -> None:
    text, call = {**ASSISTANT, **before}, turn("function_call", SUM, **after)
    found = converse(USER, text, call, USER, ASSISTANT).messages
    if joins:
        assert found == [USER, {**text, **calling(SUM)}, USER, ASSISTANT]
    else:
        assert found == [USER, text, calling(SUM, **after), USER, ASSISTANT]


def test_what_was_said_is_left_as_it_is() -> None:
    text = {**ASSISTANT}
    converse(USER, text, turn("function_call", SUM))
    assert text == ASSISTANT


@pytest.mark.parametrize("given", ["flat", "wrapped"])
@pytest.mark.parametrize("form", [lambda value: value, json.dumps], ids=["list", "text"])
def test_tools_beside_turns_are_functions(given: str, form: Any) -> None:
    function = {"name": "add", "description": "d", "parameters": {"type": "object"}}
    tool = {"type": "function", "function": function}
    tools = form([function if given == "flat" else tool])
    found = converse(turn("human", "hi"), turn("gpt", "yo"), tools=tools)
    assert found == Conversation([USER, ASSISTANT], [1], [tool])
    # LLaMA-Factory writes none as an empty text
    assert converse(USER, ASSISTANT, tools="") == Conversation([USER, ASSISTANT], [1])


def test_every_template_for_tools_writes_the_calls_of_turns(assets: Path) -> None:
    tools = json.dumps([{"name": "add", "description": "d", "parameters": {"type": "object"}}])
    example = converse(
        turn("human", "hi"),
        turn("function_call", json.dumps(SUM)),
        turn("observation", '{"sum": 3}'),
        turn("gpt", "yo"),
        tools=tools,
    )
    num_written = 0
    for name, text in asset_templates(assets).items():
        # Mistral's want ids, which such turns have not
        if "tool_calls" not in text or "9" in text:
            continue
        template = make(text)
        written = template.render(show_arguments(example.messages, template), tools=example.tools)
        positions = [written.find(part) for part in ("add", '{"x": 1, "y": [2]}', "yo")]
        assert -1 < positions[0] < positions[1] < positions[2], name
        num_written += 1
    assert num_written > 5


WRONG_CALLS: dict[str, tuple[object, str]] = {
    "cut": ('{"name": "add", "arguments": {"x"', "a call must be JSON: got .*; correct it"),
    "text": ("add(1)", "a call must be JSON: got Expecting value"),
    "empty": ("", "a call must be JSON: got Expecting value"),
    "null": (None, "a call must be .*: got None; correct it"),
    "none": ([], "a turn of calls must have one: got none; delete the turn"),
    "number": ("3", "a call must be .*: got 3; correct it"),
    "list-of-text": ('["add"]', "a call must be .*: got 'add'; correct it"),
    "no-name": ({"arguments": {}}, "a call must be .*: got {'arguments': {}}"),
    "no-arguments": ({"name": "add"}, "a call must be .*: got {'name': 'add'}"),
    "name-number": ({"name": 3, "arguments": {}}, "a call must be .*: got {'name': 3"),
    "more": ({**PRODUCT, "thoughts": "a"}, "a call must be .*: got {'name': 'multiply'"),
    "second": ([SUM, {}], "a call must be .*: got {}"),
    "arguments": (
        {"name": "add", "arguments": "1, 2"},
        r"tool_calls\[0\]\.function\.arguments must be a JSON object, .*got '1, 2'",
    ),
    "twice-a-key": ('{"name": "a", "name": "b"}', "a call must be JSON: got the key 'name' twice"),
}


@pytest.mark.parametrize(("value", "match"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_calls_that_are_none_are_refused_with_their_place(value: object, match: str) -> None:
    with pytest.raises(ValueError, match=rf"^x\.jsonl:3: conversations\[1\]: {match}"):
        converse(USER, turn("function_call", value))


def test_calls_are_read_from_what_holds_them() -> None:
    assert read_calls(json.dumps([SUM, PRODUCT]), "x") == calling(SUM, PRODUCT)["tool_calls"]


WRONG: dict[str, tuple[object, str]] = {
    "pair-and-more": (
        {"human": "hi", "assistant": "yo", "tools_used": "a", "id": 1},
        "no field that would be lost: got tools_used beside human and assistant; .*"
        "--ignore-fields tools_used$",
    ),
    "half-a-pair": ({"human": "hi"}, "must have a role among .*human, gpt, .*got None"),
    "pair-of-null": ({"human": "hi", "assistant": None}, "must have a role among .*got None"),
    "pair-of-number": ({"human": "hi", "assistant": 3}, "text as its content: got 3"),
    "from-and-role": (
        {"from": "gpt", "role": "user", "content": "a"},
        '"from" and "value", or "role" and "content": got both, which differ; delete one',
    ),
    "alien-role": ({"from": "gpt", "role": "alien", "content": "a"}, "must have a role .*'alien'"),
    "part-twice": (
        {"role": "assistant", "content": [{"type": "text", "text": "a", "value": "b"}]},
        "must have content parts",
    ),
    "part-of-image": (
        {"role": "assistant", "content": [{"type": "image", "value": "b"}]},
        "only text can be learned from",
    ),
    "text": ("hi", 'must be an object with "role" and "content", or with "from"'),
}


@pytest.mark.parametrize(("said", "match"), WRONG.values(), ids=WRONG)
def test_turns_that_are_none_are_refused_with_their_place(said: object, match: str) -> None:
    with pytest.raises(ValueError, match=rf"^x\.jsonl:3: conversations\[1\] .*{match}"):
        converse(USER, said, ASSISTANT)


def test_a_turn_under_both_names_that_agree_is_one() -> None:
    both = {"from": "human", "role": "user", "value": "hi", "content": "hi"}
    assert converse(both, ASSISTANT) == Conversation([USER, ASSISTANT], [1])


def test_an_older_call_needs_no_words_either() -> None:
    called = {"role": "assistant", "content": None, "function_call": SUM}
    example = convert({"messages": [USER, called]}, "messages")
    assert example == Conversation([USER, {"role": "assistant", "function_call": SUM}], [1])
