"""data/formats/fields.py: no field is lost unless it is empty, said elsewhere, or may be."""

import pytest
from test_data_formats import ASSISTANT, LAYOUTS, USER, convert

from data.formats.examples import Conversation, Text
from data.formats.layouts import detect_format


@pytest.mark.parametrize("data_format", [*LAYOUTS, "text-prompt", "no-template"])
def test_a_field_that_would_be_lost_is_refused_by_name(data_format: str) -> None:
    fields: dict[str, object] = LAYOUTS.get(data_format, LAYOUTS["alpaca"])
    has_template = data_format != "no-template"
    others = ["notes", "persona"]
    if data_format == "text-prompt":
        fields = {"prompt": "p", "completion": "c"}
    if data_format not in LAYOUTS:
        others += ["system", "system_prompt", "tools", "functions", "history", "documents"]
    elif data_format != "alpaca":
        others += ["history", "instruction"]
    name = {"text-prompt": "prompt-completion", "no-template": "alpaca"}.get(
        data_format, data_format
    )
    expected = convert(fields, name, has_template=has_template)
    for other in others:
        beside = {**fields, other: "s", "id": 3, "source": "web", "images": [], "title": None}
        with pytest.raises(
            ValueError,
            match=rf"^x\.jsonl:3: a {name} record .* lost: got {other} beside .*--ignore-fields "
            f"{other}$",
        ):
            convert(beside, name, has_template=has_template)
        without = convert(beside, name, has_template=has_template, ignored_fields=(other,))
        assert without == expected


def test_a_field_that_repeats_a_message_is_not_lost() -> None:
    example = convert({"prompt": "hi", **LAYOUTS["messages"]}, "messages")
    assert example == Conversation([USER, ASSISTANT], [1])
    with pytest.raises(ValueError, match="got prompt beside messages"):
        convert({"prompt": "h", **LAYOUTS["messages"]}, "messages")


def test_the_index_of_pandas_says_nothing() -> None:
    fields: dict[str, object] = {"prompt": "p", "completion": "c"}
    beside = {"__index_level_0__": "7", "Unnamed: 0": "3", **fields}
    expected = convert(fields, "prompt-completion")
    assert convert(beside, "prompt-completion") == expected


def test_ignored_fields_of_messages_go_too() -> None:
    noted = [{**USER, "mood": "m"}, {**ASSISTANT, "mood": "m", "tags": ["mood"]}]
    for data_format, name in (("messages", "messages"), ("sharegpt", "conversations")):
        example = convert({name: noted}, data_format, ignored_fields=("mood",))
        assert example == Conversation([USER, {**ASSISTANT, "tags": ["mood"]}], [1])


PREFERENCES: dict[str, tuple[str, dict[str, object]]] = {
    "chosen": ("chosen, rejected", {"chosen": "a", "rejected": "b"}),
    "chosen-messages": ("chosen", {"chosen": [USER, ASSISTANT]}),
    "label-false": ("label", {"label": False}),
    "label-true": ("label", {"label": True}),
    "label-of-csv": ("label", {"label": "False"}),
    "label-number": ("label", {"label": 0}),
    "reward": ("reward", {"reward": 0.5}),
    "scores": ("chosen, score_chosen", {"chosen": "a", "score_chosen": 3}),
}


@pytest.mark.parametrize(("names", "others"), PREFERENCES.values(), ids=PREFERENCES)
@pytest.mark.parametrize("data_format", LAYOUTS)
def test_preference_data_is_refused_by_that_name(
    data_format: str, names: str, others: dict[str, object]
) -> None:
    fields = {**LAYOUTS[data_format], **others}
    flag = names.replace(", ", ",")
    with pytest.raises(
        ValueError,
        match=rf"^x\.jsonl:3: .*not preference data .*got {names}; .*--ignore-fields {flag}$",
    ):
        convert(fields, data_format)
    if data_format == "messages":
        # no advice to delete a record whose answer is in "chosen"
        with pytest.raises(ValueError, match="not preference data"):
            convert({**fields, "messages": [USER]}, data_format)
    example = convert(fields, data_format, ignored_fields=flag.split(","))
    assert example == Conversation([USER, ASSISTANT], [1])


def test_pairs_without_a_format_are_preference_data() -> None:
    with pytest.raises(ValueError, match=r"not preference data .*got chosen, rejected"):
        detect_format({"prompt": "p", "chosen": "a", "rejected": "b"})


def test_a_label_that_is_no_verdict_is_a_field_like_another() -> None:
    with pytest.raises(ValueError, match="must have no field that would be lost: got label"):
        convert({**LAYOUTS["alpaca"], "label": "sports"}, "alpaca")
    assert convert({"text": "t", "label": 1}, "text") == Text("t")
