"""data/formats/field_names.py: --fields, the names of public data sets, and no guess of two."""

import pytest
from test_data_formats import ASSISTANT, LAYOUTS, SYSTEM, USER, convert

from data.formats.examples import Conversation, PromptCompletion, Text, TokenIds
from data.formats.field_names import FIELDS, KNOWN_NAMES, NEEDED_FIELDS, check_fields, parse_fields
from data.formats.layouts import FORMATS, detect_format, to_example
from data.reading.record import Record

ANSWERED = Conversation([USER, ASSISTANT], [1])


def read(fields: dict[str, object], flag: str = "", ignored: tuple[str, ...] = ()) -> object:
    """A record, as --fields and --ignore-fields have it read."""
    given = parse_fields(flag)
    values = {name: value for name, value in fields.items() if name not in ignored}
    return convert(fields, detect_format(values, given), ignored_fields=ignored, field_names=given)


def test_every_format_has_fields() -> None:
    assert {*FORMATS} == {*FIELDS} == {*NEEDED_FIELDS} > {*KNOWN_NAMES}
    for data_format, fields in KNOWN_NAMES.items():
        assert {*fields} <= {*FIELDS[data_format]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("text=body", {"text": "body"}),
        (" instruction = q , output=a=b", {"instruction": "q", "output": "a=b"}),
        ("output=o,instruction=i", {"instruction": "i", "output": "o"}),
    ],
)
def test_fields_are_read_from_the_flag(text: str, expected: dict[str, str]) -> None:
    assert parse_fields(text) == expected
    # one order for the token cache
    assert [*parse_fields(text)] == sorted(expected)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("question", "pairs as .*: got 'question'"),
        ("prompt=", "pairs as .*: got 'prompt='"),
        ("prompt=a,", "pairs as .*: got ''"),
        ("quary=a", "one of input_ids, .* before the equals sign: got 'quary'"),
        ("=a", "before the equals sign: got ''"),
        ("prompt=a,prompt=b", "each field once: got 'prompt=b' after another"),
        ("prompt=a,completion=a", "each field once: got 'completion=a' after another"),
    ],
)
def test_a_flag_that_says_nothing_is_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=rf"^--fields must .*{match}"):
        parse_fields(text)


TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
NAMED: dict[str, tuple[str, dict[str, object], object]] = {
    "text": ("text=body", {"body": "a"}, Text("a")),
    "tokenized": ("input_ids=i,labels=l", {"i": [1], "l": [2]}, TokenIds([1], [2])),
    "messages": ("messages=chat", {"chat": [USER, ASSISTANT]}, ANSWERED),
    "sharegpt": ("conversations=chat", {"chat": TURNS}, ANSWERED),
    "prompt-completion": (
        "prompt=q,completion=a",
        {"q": "a", "a": "b"},
        PromptCompletion("a", "b"),
    ),
    "prompt-messages": ("prompt=q,completion=a", {"q": [USER], "a": [ASSISTANT]}, ANSWERED),
    "alpaca": ("instruction=q,output=a", {"q": "hi", "a": "yo"}, ANSWERED),
    "input": (
        "instruction=q,output=a,input=notes",
        {"q": "h", "a": "yo", "notes": "i"},
        Conversation([{"role": "user", "content": "h\n\ni"}, ASSISTANT], [1]),
    ),
    "input-alone": ("instruction=input", {"input": "hi", "output": "yo"}, ANSWERED),
    "null": ("instruction=q,output=a,input=notes", {"q": "hi", "a": "yo", "notes": None}, ANSWERED),
    "history": (
        "instruction=q,output=a,history=before",
        {"q": "hi", "a": "yo", "before": [["hi", "yo"]]},
        Conversation([USER, ASSISTANT, USER, ASSISTANT], [1, 3]),
    ),
    "beside": (
        "system=role,tools=api,documents=found,chat_template_kwargs=more",
        {
            **{"messages": [USER, ASSISTANT], "role": "s", "api": TOOLS},
            **{"found": [{"title": "t"}], "more": {"x": 1}},
        },
        Conversation(
            [SYSTEM, USER, ASSISTANT], [2], TOOLS, {"documents": [{"title": "t"}], "x": 1}
        ),
    ),
    "functions": (
        "functions=api,system_prompt=role",
        {"messages": [USER, ASSISTANT], "role": "s", "api": [{"name": "f"}]},
        Conversation([SYSTEM, USER, ASSISTANT], [2], TOOLS),
    ),
    "swapped": (
        "prompt=completion,completion=prompt",
        {"prompt": "a", "completion": "b"},
        PromptCompletion("b", "a"),
    ),
    "known-name-of-another": ("instruction=answer", {"answer": "hi", "response": "yo"}, ANSWERED),
    "one-of-two": ("output=response", {"question": "hi", "response": "yo"}, ANSWERED),
}


@pytest.mark.parametrize(("flag", "fields", "expected"), NAMED.values(), ids=NAMED)
def test_the_user_says_which_field_is_which(
    flag: str, fields: dict[str, object], expected: object
) -> None:
    assert read(fields, flag) == expected


def test_a_record_without_a_field_that_was_named_is_refused() -> None:
    fields: dict[str, object] = {"question": "hi", "reply": "yo"}
    match = r"--fields output=replay must name a field of every record: got question, reply; "
    with pytest.raises(ValueError, match=f"^{match}"):
        detect_format(fields, {"output": "replay"})
    # where the others of the format are there, too
    with pytest.raises(ValueError, match=rf"^x\.jsonl:3: {match}".replace("output", "input")):
        convert(fields, "alpaca", field_names={"input": "replay"})


@pytest.mark.parametrize("has_template", [True, False])
def test_a_field_whose_name_another_one_was_given_is_not_lost(has_template: bool) -> None:
    fields: dict[str, object] = {"instruction": "old", "q": "hi", "output": "yo"}
    given = {"instruction": "q"}
    with pytest.raises(ValueError, match=r"lost: got instruction beside q, output"):
        convert(fields, "alpaca", has_template=has_template, field_names=given)
    example = convert(fields, "alpaca", ignored_fields=["instruction"], field_names=given)
    assert example == ANSWERED


def test_a_field_under_its_own_name_in_errors() -> None:
    with pytest.raises(ValueError, match=r"^x\.jsonl:3: 'q' must be a string: got a list; "):
        read({"q": [1], "a": "yo"}, "instruction=q,output=a")
    with pytest.raises(ValueError, match=r"^x\.jsonl:3: chat\[1\] must have a role among"):
        read({"chat": [USER, {"role": "x"}]}, "messages=chat")
    with pytest.raises(ValueError, match=r"^x\.jsonl:3: 'api' must be a list, or the JSON text"):
        read({"messages": [ASSISTANT], "api": "f"}, "tools=api")
    with pytest.raises(ValueError, match=r"^x\.jsonl:3: before\[0\] must be a request and its"):
        read({"instruction": "a", "output": "b", "before": ["c"]}, "history=before")
    with pytest.raises(ValueError, match=r"^x\.jsonl:3: l\[0\] must be an integer: got a string"):
        read({"i": [1], "l": ["1"]}, "input_ids=i,labels=l")


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("text=body", "text"),
        ("prompt=q,completion=body", "prompt-completion"),
        ("instruction=q,output=body", "alpaca"),
        ("messages=chat", "messages"),
        ("output=body", "alpaca"),
        ("", "messages"),
    ],
)
def test_fields_that_are_named_decide_the_format(flag: str, expected: str) -> None:
    fields: dict[str, object] = {"messages": [], "q": "", "text": "", "question": "", "body": ""}
    assert detect_format({**fields, "chat": []}, parse_fields(flag)) == expected


@pytest.mark.parametrize("data_format", FORMATS)
def test_a_name_that_the_format_has_no_use_for_is_refused(data_format: str) -> None:
    check_fields(FIELDS[data_format], data_format)
    other = "text" if data_format != "text" else "prompt"
    with pytest.raises(ValueError, match=rf"fields of the format {data_format}, .*got {other}; "):
        check_fields([*FIELDS[data_format], other], data_format)


def test_a_text_file_has_no_fields() -> None:
    record = Record("x.txt:1", {"text": "a"}, part=0)
    given = {"text": "body"}
    assert to_example(record, "text", has_chat_template=True, field_names=given) == Text("a")


def test_an_answer_that_was_chosen_may_be_named() -> None:
    pair: dict[str, object] = {"prompt": "hi", "chosen": "yo", "rejected": "no"}
    flag = "instruction=prompt,output=chosen"
    with pytest.raises(ValueError, match=r"not preference data .*got rejected; .*fields rejected$"):
        read(pair, flag)
    assert read(pair, flag, ("rejected",)) == ANSWERED


# as their first records are, in short
PUBLIC: dict[str, tuple[dict[str, object], Conversation]] = {
    "openai/gsm8k": ({"question": "hi", "answer": "yo"}, ANSWERED),
    "databricks/databricks-dolly-15k": (
        {"instruction": "h", "context": "i", "response": "yo", "category": "closed_qa"},
        Conversation([{"role": "user", "content": "h\n\ni"}, ASSISTANT], [1]),
    ),
    "dolly without context": (
        {"instruction": "hi", "context": "", "response": "yo", "category": "open_qa"},
        ANSWERED,
    ),
    "b-mc2/sql-create-context": (
        {"answer": "yo", "question": "h", "context": "i"},
        Conversation([{"role": "user", "content": "h\n\ni"}, ASSISTANT], [1]),
    ),
    "Open-Orca/OpenOrca": (
        {"id": "niv.1", "system_prompt": "s", "question": "hi", "response": "yo"},
        Conversation([SYSTEM, USER, ASSISTANT], [2]),
    ),
    "ms-swift": (
        {"system": "s", "query": "hi", "response": "yo", "history": [["hi", "yo"]]},
        Conversation([SYSTEM, USER, ASSISTANT, USER, ASSISTANT], [2, 4]),
    ),
    "ms-swift without either": (
        {"system": None, "query": "hi", "response": "yo", "history": []},
        ANSWERED,
    ),
    "LMFlow": ({"input": "hi", "output": "yo"}, ANSWERED),
    "prompt and response": ({"prompt": "hi", "response": "yo"}, ANSWERED),
    "meta-math": ({"query": "hi", "response": "yo", "type": "MATH_AnsAug"}, ANSWERED),
    "hendrycks/competition_math": ({"problem": "hi", "solution": "yo", "type": "a"}, ANSWERED),
    "CohereForAI/aya_dataset": ({"inputs": "hi", "targets": "yo", "language": "en"}, ANSWERED),
    "instruction and completion": ({"instruction": "hi", "completion": "yo"}, ANSWERED),
    "empty beside": ({"question": "hi", "input": "", "answer": "yo", "solution": ""}, ANSWERED),
    "of two files": ({"question": "hi", "answer": "yo", "text": None, "query": None}, ANSWERED),
    "LDJnr/Capybara": (
        {"source": "a", "conversation": [{"input": "hi", "output": "yo"}]},
        ANSWERED,
    ),
    "lmsys/lmsys-chat-1m": (
        {"conversation_id": "a", "model": "b", "conversation": [USER, ASSISTANT], "language": "c"},
        ANSWERED,
    ),
}


@pytest.mark.parametrize(("fields", "expected"), PUBLIC.values(), ids=PUBLIC)
def test_names_of_public_data_sets_are_known(
    fields: dict[str, object], expected: Conversation
) -> None:
    assert read(fields) == expected


def test_a_known_pair_without_a_template_is_stanfords_prompt() -> None:
    for fields, same in (
        ({"question": "q", "answer": "a"}, {"instruction": "q", "output": "a"}),
        ({"input": "q", "output": "a"}, {"instruction": "q", "output": "a"}),
        (
            {"instruction": "q", "context": "c", "response": "a"},
            {"instruction": "q", "input": "c", "output": "a"},
        ),
    ):
        found, expected = (convert({**f}, "alpaca", has_template=False) for f in (fields, same))
        assert found == expected


AMBIGUOUS: dict[str, tuple[dict[str, object], str, str, str]] = {
    "two-answers": (
        {"question": "hi", "answer": "yo", "solution": "no"},
        "one output: got answer and solution; give --fields output=answer or --fields "
        "output=solution, and --ignore-fields",
        "output=answer",
        "solution",
    ),
    "two-requests": (
        {"query": "hi", "question": "no", "response": "yo"},
        "one instruction: got question and query; give --fields instruction=question or",
        "instruction=query",
        "question",
    ),
    "input-or-request": (
        {"question": "hi", "input": "no", "output": "yo"},
        "one instruction: got question and input; ",
        "instruction=question",
        "input",
    ),
    "assembled-prompt": (
        {"prompt": "no", "input": "hi", "output": "yo"},
        "one instruction: got prompt and input; ",
        "instruction=input",
        "prompt",
    ),
}


@pytest.mark.parametrize(("fields", "match", "flag", "other"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_of_two_fields_none_is_guessed(
    fields: dict[str, object], match: str, flag: str, other: str
) -> None:
    with pytest.raises(ValueError, match=rf"^x\.jsonl:3: .*{match}"):
        read(fields)
    # the one that was not chosen is not lost in silence
    if other != "input":
        with pytest.raises(ValueError, match=f"would be lost: got {other} beside"):
            read(fields, flag)
    assert read(fields, flag, (other,)) == ANSWERED


def test_a_text_beside_a_pair_is_not_guessed() -> None:
    fields: dict[str, object] = {"text": "a", "question": "hi", "answer": "yo"}
    with pytest.raises(ValueError, match=r"got text beside question, answer; give --ignore-fields"):
        read(fields)
    assert read(fields, "", ("text",)) == ANSWERED
    assert convert(fields, "text") == Text("a")
    assert read(fields, "text=text") == Text("a")
    with pytest.raises(ValueError, match=r"would be lost: got text beside question, answer"):
        convert(fields, "alpaca")


@pytest.mark.parametrize("name", [*KNOWN_NAMES["alpaca"]["output"], "output"])
def test_a_field_beside_a_format_of_its_own_names_is_no_name_of_another(name: str) -> None:
    with pytest.raises(ValueError, match=f"would be lost: got question, {name} beside messages"):
        read({**LAYOUTS["messages"], "question": "a", name: "b"})
