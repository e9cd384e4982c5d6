"""data/formats.py: what each layout means, and that nothing that does not fit passes."""

import pytest

from data.formats import (
    ALPACA_PROMPT,
    FORMATS,
    Conversation,
    Example,
    PromptCompletion,
    Text,
    TokenIds,
    detect_format,
    to_example,
)
from data.records import Record

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}


def convert(fields: dict[str, object], data_format: str, *, has_template: bool = True) -> Example:
    record = Record("x.jsonl:3", fields)
    return to_example(record, data_format, text_field="text", has_chat_template=has_template)


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


def test_a_named_text_field_comes_first() -> None:
    assert detect_format({"messages": [], "body": ""}, text_field="body") == "text"


def test_an_unknown_layout_lists_what_came_and_what_is_needed() -> None:
    with pytest.raises(
        ValueError, match=r"got question, answer; .*alpaca needs instruction and out"
    ):
        detect_format({"question": "", "answer": ""})
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

    for data_format, fields in (
        ("messages", {"messages": [USER, calling('{"x": 1}')]}),
        ("prompt-completion", {"prompt": [USER], "completion": [calling('{"x": 1}')]}),
    ):
        assert convert(fields, data_format) == Conversation([USER, calling({"x": 1})], [1])


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


def test_sharegpt_takes_a_system_field_and_message_keys() -> None:
    example = convert({"system": "s", "conversations": [USER, ASSISTANT]}, "sharegpt")
    assert example == Conversation([{"role": "system", "content": "s"}, USER, ASSISTANT], [2])


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
    "from-missing": ("sharegpt", told(value="a"), r"conversations\[1\] must come from.*got None"),
    "from-number": ("sharegpt", told(**{"from": 1, "value": "a"}), "got 1"),
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
