"""data/chat/template_ending.py: the generation prompts of one rendering are those of many."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from support.chat_cases import (
    CALL,
    INTRICATE,
    RESULT,
    ROWS,
    SYSTEM,
    TEMPLATES,
    asset_templates,
    make,
    say,
)

from data.chat.assistant_spans import render_with_spans
from data.chat.template import ChatTemplate
from data.chat.template_ending import Sight, Watched

# "#" is learned where a turn begins with its prompt, and not where it begins with its content
SAY = "<|{{ m.role }}|>{{ '#' if m.role == 'assistant' }}{{ m.content }}</s>"
LOOP = "{% for m in messages %}" + SAY
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
END = "{% endfor %}" + PROMPT


def turns(*more: str) -> str:
    """A loop over the messages that writes more behind each."""
    return LOOP + "".join(more) + END


# templates of which a part asks what only the whole conversation can tell, and others
LOOKING_AHEAD = {
    "last": turns("{% if loop.last %}!{% endif %}"),
    "last-by-role": turns("{% if loop.last and m.role == 'tool' %}<|assistant|>{% endif %}"),
    "last-by-content": turns("{% if loop.last and not m.content %}<|assistant|>{% endif %}"),
    "last-by-index": turns("{% if loop.last and loop.index == 2 %}!{% endif %}"),
    "not-last": turns("{{ '' if loop.last else '-' }}"),
    "next": turns("{{ loop.nextitem.role if loop.nextitem else '' }}"),
    "length": turns("{{ loop.length }}"),
    "from-the-end": turns("{{ loop.revindex }}"),
    "later-index": turns("{{ '+' if messages[loop.index0 + 1] is defined }}"),
    "outer-loop": turns(
        "{% set o = loop %}{% for i in [1, 2] %}{{ 'L' if o.last }}{% endfor %}",
    ),
    "inner-iterable": turns("{% for i in [loop.last] %}{{ i }}{% endfor %}"),
    "loop-by-item": turns("{{ '!' if loop['last'] }}"),
    "loop-by-filter": turns("{{ '!' if loop | attr('last') }}"),
    "last-message": "{{ messages[-1].role }}" + LOOP + END,
    "last-slice": "{{ (messages[-2:] | first).role }}" + LOOP + END,
    "number": "{{ messages | length }}" + LOOP + END,
    "scan": "{% for m in messages %}{% if m.role == 'x' %}x{% endif %}{% endfor %}" + LOOP + END,
    "scan-to-a-user": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ loop.last }}{% break %}{% endif %}"
        "{% endfor %}" + LOOP + END
    ),
    "prompt-by-last": (
        LOOP + "{% endfor %}{% if add_generation_prompt and messages[-1].role == 'user' %}"
        "<|assistant|>{% endif %}"
    ),
    "prompt-by-state": (
        "{% set ns = namespace(r='') %}{% for m in messages %}{% set ns.r = m.role %}" + SAY + "{% "
        "endfor %}{% if add_generation_prompt and ns.r == 'user' %}<|assistant|>{% endif %}"
    ),
    "prompt-in-loop": turns("{{ '?' if add_generation_prompt and loop.index0 == 1 }}"),
    "prompt-before": "{{ add_generation_prompt }}" + LOOP + END,
    "prompt-set": "{% set add_generation_prompt = true %}" + LOOP + END,
    "joiner": "{% set j = joiner('|') %}" + turns("{{ j() }}") + "{{ j() }}",
    "none": ("{{ messages[0].content }}{% for m in messages[1:] %}" + SAY + "{% else %}none" + END),
    "printed": "{{ messages }}" + LOOP + END,
    "json": "{{ messages | tojson }}" + LOOP + END,
    "compared": "{{ messages == [] }}" + LOOP + END,
    "added": "{% for m in messages + [{'role': 'x', 'content': 'y'}] %}" + SAY + END,
    "attribute": "{{ messages.append is defined }}" + LOOP + END,
}
LOOKING_BACK = {
    "plain": LOOP + END,
    "previous": turns("{{ '' if loop.previtem else '' }}"),
    "earlier-index": turns("{{ messages[loop.index0 - 1].role[9:] if loop.index0 }}"),
    "changed": turns("{{ '' if loop.changed(m.role) }}"),
    "first": "{{ messages[0].role }}{{ 'm' if messages }}" + LOOP + END,
    "slice": "{% set messages = messages[1:] %}" + LOOP + END,
    "inner-last": turns("{% for i in [1, 2] %}{{ '' if not loop.last }}{% endfor %}"),
    "some": "{% for m in messages if m.role != 'system' %}" + SAY + END,
    "default": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
        "{% endif %}" + LOOP + END
    ),
    "option": LOOP + END + "{{ '<think></think>' if enable_thinking is false }}",
}
CONVERSATIONS = [
    say("a", "b", "c", "d", "e", "f"),
    [SYSTEM, *say("a", "b", "c", "d")],
    [*say("a"), CALL, RESULT, *say("x", "b")[1:], *say("c", "d")],
    [*say("x", "hi")[1:], *say("a", "b"), *say("x", "c")[1:]],
    [*say("", "a", "b", "c"), CALL, RESULT, *say("x", "d")[1:]] * 4,
]


def outcome(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> object:
    try:
        return render_with_spans(template, messages, **options)
    except ValueError as error:
        return str(error)


@pytest.fixture
def rendering_all(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(ChatTemplate, "ending", lambda *_: None)
    return monkeypatch


@pytest.mark.parametrize("name", [*LOOKING_AHEAD, *LOOKING_BACK])
def test_spans_are_those_of_a_rendering_for_each_turn(
    name: str, rendering_all: pytest.MonkeyPatch
) -> None:
    template = make((LOOKING_AHEAD | LOOKING_BACK)[name])
    expected = [outcome(template, messages) for messages in CONVERSATIONS]
    rendering_all.undo()
    assert [outcome(template, messages) for messages in CONVERSATIONS] == expected
    # not all of them are refused
    assert any(isinstance(each, tuple) for each in expected)


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_a_template_that_looks_back_alone_needs_no_other_rendering(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatTemplate, "attempt", None)
    template = make(LOOKING_BACK[name])
    messages = [SYSTEM, *say("a", "b", "c", "d")]
    text, spans = render_with_spans(template, messages)
    assert [text[start:end] for start, end in spans] == ["#b</s>", "#d</s>"]


def test_replies_to_messages_of_one_shape_need_one_rendering_more(
    assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = []
    attempt = ChatTemplate.attempt

    def counted(template: ChatTemplate, messages: Any, variables: Any) -> str:
        rendered.append(len(messages))
        return attempt(template, messages, variables)

    monkeypatch.setattr(ChatTemplate, "attempt", counted)
    template = make(asset_templates(assets)["templates/trl/qwen3.jinja"])
    messages = [*say("a", "b"), *say("c"), CALL, RESULT, *say("x", "d")[1:]] * 20
    _, spans = render_with_spans(template, messages)
    assert len(spans) == 60
    # behind the first user, another one, and a tool
    assert rendered == [1, 3, 5]


def test_spans_of_real_templates_are_those_of_a_rendering_for_each_turn(
    assets: Any, rendering_all: pytest.MonkeyPatch
) -> None:
    templates = [make(text) for text in (*asset_templates(assets).values(), *TEMPLATES.values())]
    cases = [
        (template, row["messages"], {k: v for k, v in row.items() if k != "messages"})
        for template, row in itertools.product(templates, ROWS.values())
    ]
    expected = [outcome(template, messages, **options) for template, messages, options in cases]
    rendering_all.undo()
    assert [outcome(template, messages, **o) for template, messages, o in cases] == expected


def test_most_real_templates_end_in_a_prompt_of_their_own(assets: Any) -> None:
    templates = asset_templates(assets)
    without = [
        name
        for name, text in templates.items()
        if make(text).ending(make(text).variables(tools=None, variables=None, now=None)) is None
    ]
    # their last word is of the last message
    assert without == [f"templates/trl/{name}_training.jinja" for name in ("phi3_5", "phi3")]
    assert make(INTRICATE).ending({"strftime_now": lambda _: "2024"}) == "2024"


@pytest.mark.parametrize(
    ("look", "furthest"),
    [
        (lambda m: m[0], 0),
        (lambda m: m[2], 2),
        (lambda m: m[1:][1], 2),
        (lambda m: m[1:][0:][0], 1),
        (bool, 0),
        (lambda m: bool(m[2:]), 2),
        (lambda m: m[1:], -1),
        (lambda m: next(iter(m)), 0),
        (lambda m: next(m.turns()), -1),
        (lambda m: m[-1], 3),
        (lambda m: m[:1], 3),
        (lambda m: m[::2], 3),
        (lambda m: m[-2:], 3),
        (len, 3),
        (list, 3),
        (lambda m: list(reversed(m)), 3),
        (lambda m: "z" in m, 3),
    ],
)
def test_what_is_asked_of_messages_is_noted(look: Any, furthest: int) -> None:
    sight = Sight()
    values = ["a", "b", "c"]
    found = look(Watched(values, sight))
    assert sight.furthest == furthest
    if not isinstance(found, Watched):
        assert found == (next(iter(values)) if found == "a" else look(_Plain(values)))


class _Plain(list[Any]):
    """A list with what the last loop asks for."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return _Plain(found) if isinstance(index, slice) else found


@pytest.mark.parametrize(
    "use",
    [
        *(str, repr, "{}".format, hash, lambda m: m == [], lambda m: m + m),
        *(lambda m: m["a"], lambda m: m[1.0], lambda m: m.append, lambda m: m.copy),
    ],
)
def test_messages_that_are_watched_are_nothing_but_a_sequence(use: Any) -> None:
    with pytest.raises(TypeError):
        use(Watched(["a"], Sight()))
    with pytest.raises(IndexError):
        Watched(["a"], Sight())[1]
