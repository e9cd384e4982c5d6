"""data/formats/layouts.py: what each layout means, and that nothing that does not fit passes."""

import json
from collections.abc import Mapping, Sequence

import pytest

from data.formats.examples import Conversation, Example, PromptCompletion, Text, TokenIds
from data.formats.layouts import ALPACA_PROMPT, FORMATS, detect_format, to_example
from data.reading.record import Record

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}


def convert(
    fields: dict[str, object],
    data_format: str,
    *,
    has_template: bool = True,
    ignored_fields: Sequence[str] = (),
    field_names: Mapping[str, str] | None = None,
) -> Example:
    return to_example(
        Record("x.jsonl:3", fields),
        data_format,
        has_chat_template=has_template,
        ignored_fields=ignored_fields,
        field_names=field_names,
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"instruction": "", "output": ""}, "alpaca"),
        ({"instruction": "", "input": "", "output": "", "text": ""}, "alpaca"),
        ({"prompt": "", "completion": ""}, "prompt-completion"),
        ({"text": "", "id": 1}, "text"),
        ({"input_ids": [], "labels": [], "text": ""}, "tokenized"),
    ],
)
def test_formats_are_recognized_by_their_fields(fields: dict[str, object], expected: str) -> None:
    assert detect_format(fields) == expected
    assert expected in FORMATS


def test_an_unknown_layout_lists_what_came_and_what_is_needed() -> None:
    with pytest.raises(
        ValueError,
        match=r"got question, choices; .*alpaca needs instruction and output; .*--fields text=",
    ):
        detect_format({"question": "", "choices": ""})
    with pytest.raises(ValueError, match="got none"):
        detect_format({})


def test_messages_learn_every_assistant() -> None:
    messages = [{"role": "system", "content": "s"}, USER, ASSISTANT, USER, ASSISTANT]
    assert convert({"messages": messages, "id": 3}, "messages") == Conversation(messages, [2, 4])


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    example = convert({"messages": [{"role": "user", "content": parts}, ASSISTANT]}, "messages")
    assert isinstance(example, Conversation)
    assert example.messages[0] == {"role": "user", "content": "ab"}


def test_weight_zero_is_not_learned() -> None:
    example = convert({"messages": [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]}, "messages")
    assert isinstance(example, Conversation)
    assert example.targets == [3]


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'], ids=["list", "json"])
def test_tools_and_all_fields_of_a_message_are_kept(tools: object) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "name": "n"}
    absent = {"content": None, "reasoning_content": None}
    example = convert({"messages": [USER, {**call, **absent}], "tools": tools}, "messages")
    assert example == Conversation([USER, call], [1], [{"name": "f"}])


def test_arguments_of_calls_are_decoded() -> None:
    def calling(arguments: object) -> dict[str, object]:
        return {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}

    expected, called = Conversation([USER, calling({"x": 1})], [1]), calling('{"x": 1}')
    assert convert({"messages": [USER, called]}, "messages") == expected
    assert convert({"prompt": [USER], "completion": [called]}, "prompt-completion") == expected


def test_no_tools_and_an_empty_list_are_different() -> None:
    for tools in (None, []):
        example = convert({"messages": [ASSISTANT], "tools": tools}, "messages")
        assert example == Conversation([ASSISTANT], [0], tools)


def test_documents_and_template_variables_are_kept() -> None:
    fields: dict[str, object] = {
        "prompt": [USER],
        "completion": [ASSISTANT],
        "documents": [{"title": "t"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    variables = {"documents": [{"title": "t"}], "enable_thinking": False}
    expected = Conversation([USER, ASSISTANT], [1], variables=variables)
    assert convert(fields, "prompt-completion") == expected


def test_sharegpt_names_become_roles() -> None:
    names = [
        "system",
        "human",
        "gpt",
        "observation",
        "chatgpt",
        "user",
        "bard",
        "tool",
        "assistant",
    ]
    turns: list[object] = [{"from": name, "value": name} for name in names]
    example = convert({"conversations": turns}, "sharegpt")
    roles = [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    messages = [{"role": r, "content": n} for r, n in zip(roles, names, strict=True)]
    assert example == Conversation(messages, [2, 4, 6, 8])


def test_a_turn_keeps_its_weight_calls_and_reasoning() -> None:
    human = {"from": "human", "value": "hi"}
    called = {"tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}
    turns: list[object] = [
        {**human, "weight": None},
        {"from": "gpt", "value": "yo", "weight": 0},
        human,
        {"from": "gpt", "value": None, **called},
        {"from": "tool", "value": "3", "name": "f"},
        {"from": "gpt", "value": "It is 3.", "reasoning_content": "hm", "weight": 1},
    ]
    decoded = {"tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    messages = [
        USER,
        {**ASSISTANT, "weight": 0},
        USER,
        {"role": "assistant", **decoded},
        {"role": "tool", "content": "3", "name": "f"},
        {"role": "assistant", "content": "It is 3.", "reasoning_content": "hm", "weight": 1},
    ]
    assert convert({"conversations": turns}, "sharegpt") == Conversation(messages, [3, 5])


def test_turns_may_be_written_as_messages() -> None:
    absent = {"from": None, "value": None}
    example = convert({"conversations": [{**USER, **absent}, ASSISTANT]}, "sharegpt")
    assert example == Conversation([USER, ASSISTANT], [1])


SYSTEM = {"role": "system", "content": "s"}
LAYOUTS: dict[str, dict[str, object]] = {
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    },
    "alpaca": {"instruction": "hi", "output": "yo"},
    "prompt-completion": {"prompt": [USER], "completion": [ASSISTANT]},
}


@pytest.mark.parametrize("data_format", LAYOUTS)
@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_beside_any_conversation_comes_first(name: str, data_format: str) -> None:
    fields = LAYOUTS[data_format]
    expected = Conversation([SYSTEM, USER, ASSISTANT], [2])
    assert convert({**fields, name: "s"}, data_format) == expected
    assert convert({**fields, "system": "s", "system_prompt": "s"}, data_format) == expected
    for empty in ("", None):
        assert convert({**fields, name: empty}, data_format) == Conversation([USER, ASSISTANT], [1])


def test_a_system_prompt_moves_what_is_learned_of_a_prompt_with_its_completion() -> None:
    fields = {"prompt": [USER, ASSISTANT], "completion": [ASSISTANT], "system": "s"}
    expected = Conversation([SYSTEM, USER, ASSISTANT, ASSISTANT], [3])
    assert convert(fields, "prompt-completion") == expected


def test_an_instruction_may_be_beside_the_text_that_it_is_assembled_to() -> None:
    for has_template in (True, False):
        expected = convert(LAYOUTS["alpaca"], "alpaca", has_template=has_template)
        beside = {**LAYOUTS["alpaca"], "text": "### Instruction: hi"}
        assert convert(beside, "alpaca", has_template=has_template) == expected


def test_a_system_prompt_given_twice_must_be_one() -> None:
    messages = [SYSTEM, USER, ASSISTANT]
    example = convert({"messages": messages, "system": "s"}, "messages")
    assert example == Conversation(messages, [2])
    for other in ({"messages": messages}, {"messages": [USER, ASSISTANT], "system_prompt": "s"}):
        with pytest.raises(ValueError, match=r"^x\.jsonl:3: .*one system prompt: got 't' and 's'"):
            convert({**other, "system": "t"}, "messages")


@pytest.mark.parametrize("data_format", LAYOUTS)
def test_functions_beside_any_conversation_are_tools(data_format: str) -> None:
    fields, function = LAYOUTS[data_format], {"name": "f", "parameters": {}}
    tool = {"type": "function", "function": function}
    expected = Conversation([USER, ASSISTANT], [1], [tool])
    assert convert({**fields, "tools": [tool]}, data_format) == expected
    for functions in ([function], [tool], json.dumps([function])):
        assert convert({**fields, "functions": functions}, data_format) == expected
    with pytest.raises(ValueError, match="its functions once: got tools and functions"):
        convert({**fields, "tools": [tool], "functions": [function]}, data_format)


def test_history_comes_before_an_instruction_and_is_learned() -> None:
    fields: dict[str, object] = {
        **{"instruction": "c", "output": "d", "system": "s"},
        "history": [["a", "b"], ("hi", "yo")],
    }
    messages = [
        SYSTEM,
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        USER,
        ASSISTANT,
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    assert convert(fields, "alpaca") == Conversation(messages, [2, 4, 6])
    for empty in ([], None):
        example = convert({**fields, "history": empty}, "alpaca")
        assert example == Conversation([SYSTEM, *messages[5:]], [2])
    for wrong in (["a"], [["a"]], [["a", None]], [["a", "b", "c"]], ["ab"]):
        with pytest.raises(ValueError, match=r"history\[0\] must be a request and its answer"):
            convert({**fields, "history": wrong}, "alpaca")


def test_null_in_the_fields_of_another_format_does_not_decide() -> None:
    fields: dict[str, object] = {**LAYOUTS["alpaca"], "messages": None, "conversations": None}
    assert detect_format(fields) == "alpaca"
    assert convert(fields, "alpaca") == Conversation([USER, ASSISTANT], [1])


@pytest.mark.parametrize("context", ["", None, "absent"])
def test_alpaca_without_input_is_the_instruction(context: str | None) -> None:
    fields: dict[str, object] = {"instruction": "{i}", "input": context, "output": "o"}
    if context == "absent":
        del fields["input"]
    expected = [{"role": "user", "content": "{i}"}, {"role": "assistant", "content": "o"}]
    assert convert(fields, "alpaca") == Conversation(expected, [1])
    prompt = ALPACA_PROMPT.replace("{instruction}", "{i}")
    assert convert(fields, "alpaca", has_template=False) == PromptCompletion(prompt, "o")


def test_alpaca_with_input_joins_it_or_uses_stanfords_prompt() -> None:
    fields: dict[str, object] = {"instruction": "do", "input": "this", "output": "o"}
    example = convert(fields, "alpaca")
    assert isinstance(example, Conversation)
    assert example.messages[0]["content"] == "do\n\nthis"
    assert convert(fields, "alpaca", has_template=False) == PromptCompletion(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:",
        "o",
    )


def test_prompt_completion_is_text_or_messages() -> None:
    fields: dict[str, object] = {"prompt": "p", "completion": "c"}
    assert convert(fields, "prompt-completion") == PromptCompletion("p", "c")
    fields = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    messages = [USER, ASSISTANT, USER, ASSISTANT]
    assert convert(fields, "prompt-completion") == Conversation(messages, [3])


def test_text_and_token_ids_pass_through() -> None:
    assert convert({"text": "t"}, "text") == Text("t")
    fields: dict[str, object] = {"input_ids": [1, 2], "labels": [-100, 2]}
    assert convert(fields, "tokenized") == TokenIds([1, 2], [-100, 2])


def said(**message: object) -> dict[str, object]:
    return {"messages": [USER, message]}


def told(**turn: object) -> dict[str, object]:
    return {"conversations": [{"from": "human", "value": "hi"}, turn]}


WRONG: dict[str, tuple[str, dict[str, object], str]] = {
    "no-field": ("messages", {"text": "a"}, "must have the field 'messages': got text"),
    "no-fields": ("text", {}, "must have the field 'text': got no fields"),
    "messages-text": ("messages", {"messages": "a"}, "must be a list: got a string"),
    "messages-null": ("messages", {"messages": None}, "must be a list: got null"),
    "messages-empty": ("messages", {"messages": []}, "an assistant message to learn"),
    "messages-only-user": ("messages", {"messages": [USER]}, "got the roles user"),
    "message-text": ("messages", {"messages": ["a"]}, r"messages\[0\] must be an object"),
    "role-missing": ("messages", said(content="a"), r"messages\[1\] must have a role.*got None"),
    "role-unknown": ("messages", said(role="asistant", content="a"), "got 'asistant'"),
    "role-list": ("messages", said(role=[], content="a"), r"got \[\]"),
    "content-missing": ("messages", said(role="assistant"), r"messages\[1\].*content: got null"),
    "content-number": ("messages", said(role="assistant", content=3), "content: got 3"),
    "content-object": ("messages", said(role="user", content={}), "content: got an object"),
    "content-image": (
        "messages",
        said(role="user", content=[{"type": "image", "url": "u"}]),
        "only text can be learned",
    ),
    "content-part-null": (
        "messages",
        said(role="user", content=[{"type": "text", "text": None}]),
        "must have content parts",
    ),
    "content-part-text": ("messages", said(role="user", content=["a"]), "must have content parts"),
    "weight": ("messages", said(role="assistant", content="a", weight=0.5), "weight .*got 0.5"),
    "all-weights-zero": (
        "messages",
        said(role="assistant", content="a", weight=0),
        "an assistant message to learn",
    ),
    "arguments": (
        "messages",
        said(role="assistant", tool_calls=[{"name": "f", "arguments": "x"}]),
        r"messages\[1\]: tool_calls\[0\]\.arguments must be a JSON object.*got 'x'",
    ),
    "tools-text": ("messages", {"messages": [ASSISTANT], "tools": "f"}, "the JSON text of one"),
    "tools-object": ("messages", {"messages": [ASSISTANT], "tools": "{}"}, "'tools' must be a lis"),
    "tool-name": (
        "messages",
        {"messages": [ASSISTANT], "tools": ["f"]},
        r"tools\[0\] must be an o",
    ),
    "documents": ("messages", {"messages": [ASSISTANT], "documents": "d"}, "'documents' must be"),
    "variables-list": (
        "messages",
        {"messages": [ASSISTANT], "chat_template_kwargs": []},
        "'chat_template_kwargs' must be an object: got a list",
    ),
    "variables-given": (
        "messages",
        {"messages": [ASSISTANT], "chat_template_kwargs": {"tools": []}},
        "must not set messages, .*got tools",
    ),
    "turns-object": ("sharegpt", {"conversations": {}}, "must be a list: got an object"),
    "turn-text": ("sharegpt", {"conversations": ["a"]}, r"conversations\[0\] must be an object"),
    "from-unknown": ("sharegpt", told(**{"from": "alice", "value": "a"}), "got 'alice'"),
    "from-missing": ("sharegpt", told(value="a"), r"conversations\[1\] must have a role.*got None"),
    "from-number": ("sharegpt", told(**{"from": 1, "value": "a"}), "got 1"),
    "value-twice": (
        "sharegpt",
        told(**{"from": "gpt", "value": "a", "content": "b"}),
        r"conversations\[1\] .*got both, which differ",
    ),
    "turn-weight": (
        "sharegpt",
        told(**{"from": "gpt", "value": "a", "weight": 0.5}),
        r"conversations\[1\] must have a weight .*got 0\.5",
    ),
    "functions-text": ("messages", {"messages": [ASSISTANT], "functions": "f"}, "'functions' must"),
    "value-null": ("sharegpt", told(**{"from": "gpt", "value": None}), "content: got null"),
    "no-gpt": ("sharegpt", told(**{"from": "human", "value": "a"}), "an assistant message"),
    "system-number": ("sharegpt", {"system": 1, "conversations": []}, "'system' must be a string"),
    "alpaca-no-output": ("alpaca", {"instruction": "a"}, "must have the field 'output'"),
    "alpaca-number": ("alpaca", {"instruction": 1, "output": "a"}, "must be a string: got 1"),
    "alpaca-input-list": (
        "alpaca",
        {"instruction": "a", "input": [], "output": "b"},
        "'input' must be a string: got a list",
    ),
    "completion-missing": ("prompt-completion", {"prompt": "a"}, "the field 'completion'"),
    "completion-mixed": (
        "prompt-completion",
        {"prompt": "a", "completion": [ASSISTANT]},
        "'completion' must be a string: got a list",
    ),
    "prompt-mixed": (
        "prompt-completion",
        {"prompt": [USER], "completion": "a"},
        "'completion' must be a list: got a string",
    ),
    "completion-of-user": (
        "prompt-completion",
        {"prompt": [USER, ASSISTANT], "completion": [USER]},
        "got the roles user",
    ),
    "prompt-message": (
        "prompt-completion",
        {"prompt": [3], "completion": [ASSISTANT]},
        r"prompt\[0\] must be an object",
    ),
    "text-number": ("text", {"text": 1}, "'text' must be a string: got 1"),
    "ids-text": ("tokenized", {"input_ids": "1", "labels": []}, "must be a list: got a string"),
    "ids-float": ("tokenized", {"input_ids": [1.0], "labels": [1]}, r"input_ids\[0\].*got 1\.0"),
    "ids-bool": ("tokenized", {"input_ids": [1], "labels": [True]}, r"labels\[0\].*got True"),
    "ids-null": ("tokenized", {"input_ids": [1, None], "labels": [1, 1]}, r"\[1\].*got null"),
    "ids-nested": ("tokenized", {"input_ids": [[1]], "labels": [1]}, r"\[0\].*got a list"),
    "lengths": ("tokenized", {"input_ids": [1, 2], "labels": [1]}, "got 1 and 2"),
}


@pytest.mark.parametrize(("data_format", "fields", "match"), WRONG.values(), ids=WRONG)
def test_records_that_do_not_fit_are_refused_with_their_place(
    data_format: str, fields: dict[str, object], match: str
) -> None:
    with pytest.raises(ValueError, match=rf"^x\.jsonl:3: .*{match}"):
        convert(fields, data_format)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--data-format must be auto or messages, .*got 'chat'"):
        convert({}, "chat")
