"""answering/prompts.py: what a file of prompts may hold, and how a record becomes messages."""

import json
from pathlib import Path

import pytest

from answering.prompts import Prompt, read_prompts

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi"}


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


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


def test_a_system_prompt_comes_first_unless_there_is_one() -> None:
    prompt = Prompt("x", {"prompt": "Hi"})
    assert prompt.messages("") == [USER]
    assert prompt.messages("Be kind.") == [SYSTEM, USER]
    own = Prompt("x", {"messages": [SYSTEM, USER]})
    assert own.messages("Be rude.") == [SYSTEM, USER]


def test_messages_have_no_text_to_continue() -> None:
    with pytest.raises(ValueError, match="messages are written by a chat template"):
        Prompt("x", {"messages": [USER]}).text()


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
