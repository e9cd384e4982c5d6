"""data/tokens/doubts.py: what is learned and hardly meant is counted, told, and refused where it is
most of the data."""

from pathlib import Path
from typing import Any

import pytest
from support.chat_cases import say
from test_data_dataset import load
from test_data_tokenizer import save_byte_level

from data import audit
from data.dataset import Dataset
from data.tokenizer import Tokenizer

# writes the reasoning of the last turn alone, as Qwen3's does
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.reasoning_content and loop.last %}"
    "{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GOOD = {"messages": say("a", "b")}
UNLEARNED = {"role": "assistant", "content": "", "weight": 0}
IN_PARTS = {"role": "assistant", "content": [{"type": "text", "text": ""}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(
        save_byte_level(tmp_path_factory.mktemp("tokenizer")), chat_template="chatml"
    )


def doubts(dataset: Dataset, tokenizer: Tokenizer) -> tuple[list[int], list[str]]:
    """The counts of data.json, and the warnings."""
    told = audit.describe(dataset).splitlines()
    counted = audit.facts_of(dataset, tokenizer)["doubtful"]
    return [*counted.values()], [line for line in told if line.startswith("warning")]


@pytest.mark.parametrize(
    ("record", "is_empty"),
    [
        ({"messages": say("a", "")}, True),
        ({"messages": say("a", " \n\t")}, True),
        ({"messages": say("a", "", "b", "c")}, True),
        ({"messages": say("", "c")}, False),
        ({"messages": [*say("a"), UNLEARNED, *say("b", "c")]}, False),
        ({"messages": [*say("a"), IN_PARTS]}, True),
    ],
    ids=["empty", "whitespace", "in the middle", "a question", "not learned", "in parts"],
)
def test_an_empty_answer_is_told(
    tmp_path: Path, tokenizer: Tokenizer, record: dict[str, Any], is_empty: bool
) -> None:
    counted, told = doubts(load(tmp_path, tokenizer, GOOD, GOOD, record), tokenizer)
    assert counted == [int(is_empty), 0, 0]
    expected = [
        f"warning: 1 record has an empty answer (the first: {tmp_path / 'x.jsonl'}:3): there the "
        "model learns to say nothing"
    ]
    assert told == (expected if is_empty else [])


@pytest.mark.parametrize("data_format", ["alpaca", "prompt-completion", "text"])
def test_an_empty_answer_is_told_in_every_format(
    tmp_path: Path, tokenizer: Tokenizer, data_format: str
) -> None:
    def record(answer: str) -> dict[str, str]:
        return {
            "alpaca": {"instruction": "a", "output": answer},
            "prompt-completion": {"prompt": "a", "completion": answer},
            "text": {"text": answer},
        }[data_format]

    dataset = load(tmp_path, tokenizer, record("b"), record(" "), record("b"), record(" "))
    assert dataset.format == data_format
    counted, told = doubts(dataset, tokenizer)
    assert counted == [2, 0, 0]
    assert "warning: 2 records have an empty answer (the first: " in told[0]
    assert "x.jsonl:2)" in told[0]
    audit.check(dataset, "--data", allow_truncation=False)


def test_a_call_is_an_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    template = tmp_path / "calls.jinja"
    template.write_text(
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
        "{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    calling = Tokenizer.from_folder(save_byte_level(tmp_path / "t"), chat_template=str(template))
    dataset = load(tmp_path, calling, {"messages": [*say("a"), turn]})
    assert doubts(dataset, calling) == ([0, 0, 0], [])


def test_data_whose_answers_are_mostly_empty_is_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    empty = {"instruction": "a", "output": ""}
    half = [{"instruction": "a", "output": "b"}, empty]
    audit.check(load(tmp_path, tokenizer, *half), "--data", allow_truncation=False)
    dataset = load(tmp_path, tokenizer, *half, empty)
    with pytest.raises(
        ValueError,
        match=r"--data must have answers, .* those of 2 of 3 records \(67%\) are empty, the first "
        r"in .*x\.jsonl:2; say which field has them with --fields",
    ):
        audit.check(dataset, "--data", allow_truncation=True)
    # one answer of each record is there
    some = [{"messages": say("a", "", "b", "c")}] * 3
    audit.check(load(tmp_path, tokenizer, *some), "--data", allow_truncation=False)


def test_an_empty_completion_is_none_where_all_is_learned(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    records = [{"prompt": "a long text", "completion": ""}] * 3
    dataset = load(tmp_path, tokenizer, *records, train_on="all")
    assert doubts(dataset, tokenizer) == ([0, 0, 0], [])
    audit.check(dataset, "--data", allow_truncation=False)


def test_a_record_that_is_left_out_is_not_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cut = {"messages": say("a" * 300, "")}
    dataset = load(tmp_path, tokenizer, GOOD, GOOD, cut, max_length=200)
    assert dataset.counts.num_cut_before_target == 1
    assert doubts(dataset, tokenizer) == ([0, 0, 0], [])


@pytest.mark.parametrize("token", ["<|begin|>", "<|end_of_text|>"])
def test_a_control_token_in_a_message_is_told(
    tmp_path: Path, tokenizer: Tokenizer, token: str
) -> None:
    records = [GOOD, {"messages": say(f"a{token}b", "c")}, {"messages": say("a", f"b {token}")}]
    counted, told = doubts(load(tmp_path, tokenizer, *records), tokenizer)
    assert counted == [0, 2, 0]
    place = tmp_path / "x.jsonl"
    assert told == [
        "warning: 2 records have a control token of the model within a message (the first: "
        f"{token} in {place}:2): there the turn ends for the model, and what follows is another "
        "one; delete it from the data"
    ]


def test_a_text_may_have_control_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"prompt": "a<|begin|>", "completion": "b<|end_of_text|>"}]
    assert doubts(load(tmp_path, tokenizer, *records), tokenizer) == ([0, 0, 0], [])


@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_an_answer_without_its_reasoning_is_told(tmp_path: Path, train_on: str) -> None:
    path = tmp_path / "reasoning.jinja"
    path.write_text(REASONING)
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path / "t"), chat_template=str(path))

    def reasons(text: str, **more: object) -> dict[str, object]:
        return {"role": "assistant", "content": text, "reasoning_content": "r", **more}

    last = {"messages": [*say("a"), reasons("b")]}
    earlier = {"messages": [*say("a"), reasons("b"), *say("c", "d")]}
    unlearned = {"messages": [*say("a"), reasons("b", weight=0), *say("c", "d")]}
    records = [last, earlier, earlier] + [unlearned] * (train_on == "completions")
    counted, told = doubts(load(tmp_path, tokenizer, *records, train_on=train_on), tokenizer)
    assert counted == [0, 0, 2]
    assert told == [
        "warning: 2 records have an answer whose reasoning the chat template leaves out, because "
        f"another turn follows (the first: {tmp_path / 'x.jsonl'}:2): there the model learns to "
        "answer without reasoning; give that message a weight of 0, or let the conversation end "
        "with it"
    ]


def test_doubts_are_the_same_from_the_cache(tmp_path: Path, tokenizer: Tokenizer) -> None:
    # unlike those of other tests, whose tokens are in the cache already
    records = [*[{"messages": say("cached", "b")}] * 100, {"messages": say("a", "")}]
    made = load(tmp_path, tokenizer, *records)
    found = load(tmp_path, tokenizer, *records)
    assert (made.is_cached, found.is_cached) == (False, True)
    assert doubts(made, tokenizer)[1][0].replace("x.jsonl:101", "") != doubts(made, tokenizer)[1][0]
    assert doubts(found, tokenizer) == doubts(made, tokenizer)
