"""data/chat/assistant_spans.py: exactly what the assistant says, or an error."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import pytest
from support.chat_cases import (
    CALL,
    CHATML,
    CONVERSATIONS,
    IN_THE_LOOP,
    INST,
    INTRICATE,
    LLAMA3,
    MARKED,
    REASONER,
    RESULT,
    ROWS,
    TEMPLATES,
    TOOLS,
    asset_templates,
    make,
    say,
)

from data.chat.assistant_spans import render_with_spans
from data.chat.template_ending import Watched


def spoken(template: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    """What the assistant says of a text that is the rendering itself."""
    text, spans = render_with_spans(make(template), messages, **options)
    options.pop("targets", None)
    assert text == make(template).render(messages, **options)
    # nothing is found twice
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(
    ("template", "around", "is_trimmed"),
    [
        (CHATML, "{}<|im_end|>\n", False),
        (MARKED, "{}<|im_end|>", False),
        (LLAMA3, "{}<|eot|>", True),
        (INST, " {} </s>", True),
        (IN_THE_LOOP, "{}</s>\n", False),
    ],
    ids=["chatml", "marked", "llama3", "inst", "in-the-loop"],
)
def test_a_turn_is_what_follows_the_prompt_to_its_end(
    template: str, around: str, is_trimmed: bool, conversation: str
) -> None:
    messages = CONVERSATIONS[conversation]
    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    contents = [content.strip() if is_trimmed else content for content in contents]
    assert spoken(template, messages) == [around.format(content) for content in contents]


@pytest.mark.parametrize("template", ["chatml", "marked", "reasoner"])
def test_targets_choose_messages(template: str) -> None:
    messages = say("a", "yo", "b", "yo", "c", "yo")
    text, spans = render_with_spans(make(TEMPLATES[template]), messages)
    for targets in ([1], [3], [1, 5], [1, 3, 5]):
        chosen = render_with_spans(make(TEMPLATES[template]), messages, targets=targets)
        assert chosen == (text, [spans[i // 2] for i in targets])


def test_a_prompt_that_earlier_turns_do_not_have_gives_way_to_the_content() -> None:
    messages = [*say("a", "<think>\nx\n</think>b", "<think>", "c"), RESULT, *say("x", "d")[1:]]
    # the prompt is <|Assistant|><think>\n, and after the tool's result the closing of it
    assert spoken(REASONER, messages) == ["b</s>", "c</s>", "d</s>"]


def test_reasoning_of_the_last_turn_is_learned_and_that_of_earlier_ones_is_not_there() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
    )
    messages = say("a", "b", "c", "<think>")
    messages[1]["reasoning_content"], messages[3]["thinking"] = "x", "y"
    assert spoken(template, messages) == ["b</s>", "<think>y</think><think></s>"]
    messages[3]["thinking"] = ""
    without = {"enable_thinking": False}
    assert spoken(template, messages, variables=without) == ["b</s>", "<think></s>"]


def test_calls_are_learned_whatever_is_said_before_the_conversations_last_user() -> None:
    # the tools move to the last user, and messages are written from copies, as Mistral's are
    template = (
        "{% set ns = namespace(copies=[], last=0) %}{% for m in messages %}"
        "{% set ns.copies = ns.copies + [{'role': m.role, 'content': m.content, "
        "'tool_calls': m.tool_calls}] %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
        "{% endif %}{% endfor %}{% for m in ns.copies %}{% if m.role == 'user' %}"
        "{% if loop.index0 == ns.last %}{{ tools | tojson }}{% endif %}[{{ m.content }}]"
        "{% elif m.role == 'tool' %}<{{ m.content }}>{% else %}{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}</s>{% endif %}"
        "{% endfor %}"
    )
    messages = [*say("a"), CALL, RESULT, *say("x", "b")[1:], *say("c", "d")]
    assert spoken(template, messages, tools=TOOLS) == ["add</s>", "b</s>", "d</s>"]
    assert spoken(template, messages, tools=TOOLS, targets=[3]) == ["b</s>"]


def test_what_the_template_drops_from_a_message_is_not_in_its_span() -> None:
    text, spans = render_with_spans(make(INTRICATE), CONVERSATIONS["thinking"])
    turns = [text[start:end] for start, end in spans]
    assert turns == ["yo\n", "no\n(last)"]


def test_an_eos_behind_the_turn_is_learned_with_it() -> None:
    after_all = "{% for m in messages %}#{{ m.content }}{% endfor %} {{ eos_token }}"
    assert spoken(after_all, say("a", "b", "c", "d")) == ["b", "d </s>"]
    before_user = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ eos_token }}{% endif %}#{{ m.content }}"
        "{% endfor %}"
    )
    assert spoken(before_user, say("a", "b", "c", "d")) == ["#b</s>", "#d"]
    twice = "{% for m in messages %}#{{ m.content }}</s>{% endfor %}{{ eos_token }}"
    assert spoken(twice, say("a", "b")) == ["b</s>"]


def test_loop_controls_leave_no_turn_open() -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'skip' %}{% continue %}{% endif %}"
        "{% if m.content == 'end' %}{% break %}{% endif %}#{{ m.content }}{% endfor %}|"
    )
    assert spoken(template, say("skip", "a", "end")) == ["a"]
    assert spoken(template, say("a", "b", "skip")) == ["b"]


def test_turns_and_marks_are_found_through_macros_slices_and_blocks() -> None:
    template = (
        "{% macro say(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}"
        "{% macro all(some) %}{% for m in some %}{{ say(m) }}{% endfor %}{% endmacro %}"
        "{% set rest = messages[1:] %}{{ say(messages[0]) }}"
        "{% set block %}{{ all(rest) }}.{% endset %}{{ block }}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert spoken(template, say("a", "b", "c", "b")) == ["b", "b"]
    marked = template.replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    )
    # whatever is marked, if all is to be learned
    assert spoken(marked, say("a", "b", "c", "b")) == ["a", "b", "c", "b"]


def test_marks_of_one_message_that_touch_are_one_span() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}#{% endif %}{% endfor %}"
        "{% generation %}{{ eos_token }}{% endgeneration %}"
    )
    assert spoken(template, say("a", "b", "c", "d")) == ["b", "d</s>"]
    assert spoken(template, say("a", "b", "c", "d"), targets=[1]) == ["b"]
    assert spoken(template, say("a", "b", "c", "d"), targets=[3]) == ["d</s>"]


LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ messages[1].content }}", "got 0 turns of the assistant for 1 messages"),
        (LOOP + LOOP, "got 2 turns of the assistant for 1 messages"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "got 0 turns"),
        ("{% for m in messages recursive %}{{ m.content }}{% endfor %}", "got 0 turns"),
        ("{% set x %} " + LOOP + "{% endset %}{{ x | length }}", "must write unchanged"),
        ("{% set x %}{% for m in messages %} #{% endfor %}{% endset %}{{ x[3:] }}", "unchanged"),
    ],
    ids=["no-loop", "twice", "omitted", "recursive", "measured", "cut"],
)
def test_turns_that_cannot_be_found_are_refused_with_a_way_out(template: str, match: str) -> None:
    with pytest.raises(ValueError, match=rf"^the chat template x\.jinja .*{match}.*--train-on"):
        render_with_spans(make(template), say("hi", "yo"))


def test_turns_out_of_order_and_merged_are_refused() -> None:
    backwards = "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="got another turn in the place of message 1"):
        render_with_spans(make(backwards), say("a", "b", "c", "d"))
    merged = "{% for m in [{'role': 'assistant', 'content': messages[1].content + messages[2]"
    merged += ".content}] %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="got 1 turns of the assistant for 2 messages"):
        render_with_spans(make(merged), [*say("a", "b"), *say("x", "c")[1:]])


def test_a_turn_that_begins_with_neither_prompt_nor_content_is_refused() -> None:
    template = (
        "{% for m in messages %}{{ '!' if m.content == 'yo' else '?' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}#{% endif %}"
    )
    with pytest.raises(ValueError, match=r"assistant message 1 with its generation .*got '!yo'"):
        render_with_spans(make(template), say("hi", "yo"))


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (
            "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}",
            "must not nest",
        ),
        (
            "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | trim }}",
            "must write unchanged what its {% generation %} marks enclose",
        ),
        ("{% if false %}{% generation %}a{% endgeneration %}{% endif %}b", "must reach its"),
    ],
    ids=["nested", "filtered", "unreached"],
)
def test_marks_that_cannot_be_trusted_are_refused(template: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        render_with_spans(make(template), say("hi", "yo"))


def test_some_targets_need_marks_in_their_turns() -> None:
    template = "{% generation %}a{% endgeneration %}" + LOOP
    assert spoken(template, say("a", "b", "c", "d")) == ["a"]
    with pytest.raises(ValueError, match="got a mark elsewhere"):
        render_with_spans(make(template), say("a", "b", "c", "d"), targets=[3])


@pytest.fixture
def renders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of messages that each rendering is given, none for what ends a template."""
    counts: list[int] = []
    render = jinja2.Template.render

    def counted(template: jinja2.Template, *args: Any, **kwargs: Any) -> str:
        messages = kwargs.get("messages", [])
        # to ask for its length is to look ahead
        counts.append(len(messages._messages if isinstance(messages, Watched) else messages))
        return render(template, *args, **kwargs)

    monkeypatch.setattr(jinja2.Template, "render", counted)
    return counts


def test_a_turn_that_begins_with_its_prompt_needs_no_other_opening(renders: list[int]) -> None:
    spoken_before = spoken(CHATML, say("a", "b"))
    # spoken() renders once itself, to compare
    assert (spoken_before, renders.pop()) == (["b<|im_end|>\n"], 2)
    assert renders == [2, 0]
    renders.clear()
    # the prompt depends on the messages
    messages = say("a", "b", "c", "d")
    spans = render_with_spans(make(TEMPLATES["in-the-loop"]), messages)[1]
    assert (len(spans), renders) == (2, [4, 1, 3])


def test_markers_that_the_template_collects_first_are_held_against_a_plain_rendering(
    renders: list[int],
) -> None:
    block = "{% set x %}" + LOOP + "{% endset %}{{ x }}"
    assert spoken(block, say("a", "b")) == ["b"]
    assert renders[:3] == [2, 2, 2]
    renders.clear()
    # so is a text with the characters of a marker
    assert spoken(LOOP, say("a", "\ue0000\ue000")) == ["\ue0000\ue000"]
    assert renders[:3] == [2, 2, 2]


@pytest.mark.parametrize("template", ["chatml", "llama3", "inst", "marked"])
def test_a_long_conversation_is_rendered_once(template: str, renders: list[int]) -> None:
    messages = say(*(f"message {i}" for i in range(600)))
    _, spans = render_with_spans(make(TEMPLATES[template]), messages)
    assert len(spans) == 300
    assert (renders[0], sum(renders)) == (600, 600)


def test_spans_are_those_of_trls_twins(assets: Path) -> None:
    """Of every template of TRL that has a twin with marks, over every row."""
    templates = {
        Path(name).stem: text
        for name, text in asset_templates(assets).items()
        if name.startswith("templates/trl")
    }
    pairs = [name for name in templates if f"{name}_training" in templates]
    num_spans = dict.fromkeys(pairs, 0)
    num_otherwise: Counter[str] = Counter()
    for name in pairs:
        for key, row in ROWS.items():
            results, errors = [], []
            for text in (templates[name], templates[f"{name}_training"]):
                options = {k: v for k, v in row.items() if k != "messages"}
                try:
                    results.append(render_with_spans(make(text), row["messages"], **options))
                except ValueError as error:
                    errors.append(str(error))
            assert all("the template raised" in e for e in errors)
            # one refuses what the other does
            assert len(errors) in (0, 2), f"{name} {key}"
            if errors:
                continue
            (text, ours), (their_text, theirs) = results
            if text != their_text:
                num_otherwise[name] += 1
                continue
            if name == "qwen2_5":
                # deliberate: the twin counts the newline of the header as said by the assistant,
                # but the generation prompt ends behind it
                assert all(text[start] == "\n" for start, _ in theirs)
                theirs = [(start + 1, end) for start, end in theirs]
            assert ours == theirs, f"{name} {key}"
            num_spans[name] += len(ours)
    assert num_spans == {
        "gemma": 20,
        "gemma3": 22,
        "llama3": 53,
        "phi3": 32,
        "phi3_5": 32,
        "qwen2_5": 52,
        "qwen3": 7,
        "qwen3_instruct_2507": 53,
    }
    # Qwen 3's twin writes the reasoning of earlier turns too, and an empty one where there is none
    assert num_otherwise == {"qwen3": 23}
