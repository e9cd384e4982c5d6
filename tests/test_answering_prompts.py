"""answering/prompts.py: what a file of prompts may hold, and how a record becomes messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_cases import TOOLS

from answering.prompts import Prompt, describe_unused, read_prompts, text_prompt

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi"}


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def read_one(tmp_path: Path, record: dict[str, Any]) -> Prompt:
    (prompt,) = read_prompts(write(tmp_path, "a.jsonl", json.dumps(record)))
    return prompt


def test_each_line_of_a_text_is_a_prompt(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\ufefffirst\r\n  second \u2028 line\nlast")
    found = [prompt.given for prompt in read_prompts(path)]
    assert found == [
        {"prompt": "first"},
        {"prompt": "  second \u2028 line"},
        {"prompt": "last"},
    ]


def test_each_record_is_a_prompt_or_a_conversation(tmp_path: Path) -> None:
    records = [{"prompt": "a", "id": 7}, {"messages": [USER]}, {"prompt": None, "messages": [USER]}]
    path = write(tmp_path, "a.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    found = read_prompts(path)
    assert [prompt.given for prompt in found] == [{"prompt": "a"}, *[{"messages": [USER]}] * 2]
    assert [prompt.where for prompt in found] == [f"{path}:{n}" for n in (1, 2, 3)]


def test_a_system_prompt_comes_first_unless_there_is_one(tmp_path: Path) -> None:
    prompt = text_prompt("x", "Hi")
    assert prompt.conversation("").messages == [USER]
    assert prompt.conversation("Be kind.").messages == [SYSTEM, USER]
    own = [
        {"messages": [SYSTEM, USER]},
        {"messages": [USER], "system": "Be kind."},
        {"prompt": "Hi", "system_prompt": "Be kind."},
    ]
    for record in own:
        assert read_one(tmp_path, record).conversation("Be rude.").messages == [SYSTEM, USER]
    developer = SYSTEM | {"role": "developer"}
    found = read_one(tmp_path, {"messages": [developer, USER]})
    assert found.conversation("Be rude.").messages == [developer, USER]


@pytest.mark.parametrize("asked", [{"prompt": "Hi"}, {"messages": [USER]}])
def test_what_stands_beside_a_prompt_is_read_as_in_data_to_learn_from(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    beside = {"tools": TOOLS, "documents": [{"text": "d"}], "chat_template_kwargs": {"x": 1}}
    prompt = read_one(tmp_path, asked | beside)
    assert (prompt.given, prompt.unused) == (asked, ())
    assert prompt.asked.tools == TOOLS
    assert prompt.asked.variables == {"documents": [{"text": "d"}], "x": 1}
    older = read_one(tmp_path, asked | {"functions": json.dumps([TOOLS[0]["function"]])})
    assert older.asked.tools == TOOLS[:1]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: 'tools' must be a list: got a string"):
        read_one(tmp_path, asked | {"tools": '"f"'})


def test_fields_that_no_answer_is_given_are_counted(tmp_path: Path) -> None:
    records = [
        {"prompt": "a", "completion": "b", "label": 0, "id": 7},
        {"messages": [USER], "completion": "b", "tools": [], "note": ""},
        {"prompt": "a"},
    ]
    path = write(tmp_path, "a.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    assert describe_unused(read_prompts(path)) == [
        "fields of the 3 prompts that no answer is given: completion (in 2), label (in 1)"
    ]
    assert describe_unused([text_prompt("x", "a")]) == []


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER]},
        {"prompt": "Hi", "system": "Be kind."},
        {"prompt": "Hi", "tools": TOOLS},
        {"prompt": "Hi", "chat_template_kwargs": {"x": 1}},
    ],
)
def test_what_a_template_writes_is_no_text_to_continue(
    tmp_path: Path, record: dict[str, Any]
) -> None:
    assert read_one(tmp_path, {"prompt": "Hi", "source": "x"}).text() == "Hi"
    with pytest.raises(ValueError, match="messages, system prompts and tools are written by"):
        read_one(tmp_path, record).text()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "first\n\nthird\n", r"a\.txt:2: a prompt must be a text that is not empty"),
        ("a.txt", "", "must hold at least one prompt: got none"),
        ("a.jsonl", "", "must hold at least one record"),
        ("a.jsonl", '{"prompt": 1}', r"a\.jsonl:1: a prompt must be a text .*got 1"),
        ("a.jsonl", '{"text": "a"}', 'either "prompt" or "messages": got text'),
        ("a.jsonl", '{"prompt": "a", "messages": []}', "either"),
        ("a.jsonl", '{"messages": []}', "must be a list that is not empty"),
        ("a.jsonl", '{"messages": [{"role": "x", "content": ""}]}', "must have a role among"),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "must end with one to answer",
        ),
        ("a.doc", "a", "the data file must end in"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path, name, text))
