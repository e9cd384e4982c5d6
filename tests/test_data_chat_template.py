"""data/chat_template.py: equal to transformers, and spans that are exactly what was contributed."""

import json
import subprocess
import sys
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data.chat_template import load_template, render, render_with_spans

CHATML = load_template("chatml")
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|header|>' + message['role'] + '<|/header|>\n\n'"
    " + message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "        {{- '<|im_start|>assistant\n' }}\n"
    "        {%- generation %}\n"
    "            {{- message.content + '<|im_end|>' }}\n"
    "        {%- endgeneration %}\n"
    "        {{- '\n' }}\n"
    "    {%- else %}\n"
    "        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
)
# block trimming, loop controls, macros, JSON, tools, and content-dependent turns, as Qwen 3 has
# them
INTRICATE = """{% if tools %}
    {{ tools | tojson(indent=2) }}
{% endif %}
{% macro say(role, text) %}
[{{ role }}] {{ text }}
{% endmacro %}
{% set ns = namespace(last=-1) %}
{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}
{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {{- say(message.role, content) }}
    {%- if message.extra is defined %}{{ message.extra | tojson }}{% endif %}
    {%- if loop.index0 > ns.last and message.role == 'assistant' %}{{ '(last)' }}{% endif %}
{%- endfor %}
{{ unk_token }}{{ strftime_now('%Y') }}
"""
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "inst": INST,
    "marked": MARKED,
    "intricate": INTRICATE,
}
TOKENS: Any = {"bos_token": "<s>", "eos_token": "</s>"}


def say(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = {
    "one-turn": say("hi", "yo"),
    "equal-messages": say("yo", "yo", "yo", "yo"),
    "whitespace": say("  hi\n", "\n\n  yo \n", " ", "yo\n"),
    "empty": say("hi", "", "hi", "yo"),
    "content-like-the-template": say("<|im_end|>", "assistant\nyo<|im_end|>", "[/INST]", "user"),
    "markup": say("a < b & 'c' \"d\"", "{{ messages }} {% if %} <|x|>"),
    "unicode": say("caf\u00e9 \u4f60\u597d", "\U0001f9ff\u2028\ue000\ue001"),
    "thinking": say("hi", "<think>\nhm\n</think>\n\nyo", "and?", "no"),
}


@pytest.fixture(scope="module")
def rendered_by_transformers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What apply_chat_template makes of every pair, in one process outside of the checkout."""
    pytest.importorskip("transformers", reason="the peer that rendering is compared with")
    folder = tmp_path_factory.mktemp("transformers")
    (folder / "in.json").write_text(json.dumps([TEMPLATES, CONVERSATIONS, TOKENS]))
    script = """
import json, sys
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
templates, conversations, tokens = json.load(open("in.json"))
peer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **tokens)
tools = [{"type": "function", "function": {"name": "f", "parameters": {"<": "\\u00e9"}}}]
json.dump({
    f"{t} {c} {p}": peer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=p, tools=tools
    )
    for t, template in templates.items() for c, messages in conversations.items()
    for p in (False, True)
}, open("out.json", "w"))
"""
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True)
    return json.loads((folder / "out.json").read_text())


def test_rendering_equals_transformers(rendered_by_transformers: dict[str, str]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"<": "\u00e9"}}}]
    ours = {
        f"{t} {c} {p}": render(template, messages, add_generation_prompt=p, tools=tools, **TOKENS)
        for t, template in TEMPLATES.items()
        for c, messages in CONVERSATIONS.items()
        for p in (False, True)
    }
    assert len(ours) == len(TEMPLATES) * len(CONVERSATIONS) * 2
    assert ours == rendered_by_transformers


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", ["chatml", "llama3", "inst"])
def test_spans_are_exactly_the_contents(template: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    text, spans = render_with_spans(TEMPLATES[template], messages, **TOKENS)
    assert text == render(TEMPLATES[template], messages, add_generation_prompt=False, **TOKENS)
    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    if template != "chatml":
        contents = [content.strip() for content in contents]
    assert [text[start:end] for start, end in spans] == contents
    # nothing is found twice: the spans are ascending and apart
    assert all(a[1] < b[0] for a, b in pairwise(spans))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_generation_marks_give_content_and_closing_token(conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    text, spans = render_with_spans(MARKED, messages, **TOKENS)
    contents = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert [text[start:end] for start, end in spans] == contents
    assert text == render(MARKED, messages, add_generation_prompt=False, **TOKENS)


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_targets_choose_messages(template: str) -> None:
    messages = say("a", "yo", "b", "yo", "c", "yo")
    text, spans = render_with_spans(TEMPLATES[template], messages, **TOKENS)
    assert render_with_spans(TEMPLATES[template], messages, targets=[3], **TOKENS) == (
        text,
        [spans[1]],
    )


def test_what_the_template_drops_from_a_message_is_not_in_its_span() -> None:
    text, spans = render_with_spans(INTRICATE, CONVERSATIONS["thinking"], **TOKENS)
    assert [text[start:end] for start, end in spans] == ["yo", "no"]


def test_marks_inside_a_macro_are_located() -> None:
    template = (
        "{% macro say(m) %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}."
        "{% endmacro %}{% for m in messages %}{% if m.role == 'assistant' %}{{ say(m) }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    text, spans = render_with_spans(template, say("a", "b", "b", "c"), **TOKENS)
    assert text == "a<assistant>b.b<assistant>c."
    assert spans == [(12, 13), (26, 27)]


def test_missing_tokens_render_as_nothing() -> None:
    text = render(
        "[{{ bos_token }}]", [], add_generation_prompt=False, bos_token=None, eos_token="e"
    )
    assert text == "[]"


def test_a_fixed_clock_fixes_the_date() -> None:
    now = datetime(2024, 7, 26)
    text, _ = render_with_spans(
        "{{ strftime_now('%d %b %Y') }}" + CHATML, say("a", "b"), now=now, **TOKENS
    )
    assert text.startswith("26 Jul 2024<|im_start|>")


def test_reasoning_has_one_name_and_nulls_are_absent() -> None:
    template = (
        "{% for m in messages %}{{ m.reasoning_content }}{{ m.tool_calls is defined }}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": "a", "reasoning": "r", "tool_calls": None}]
    assert render(template, messages, add_generation_prompt=False, **TOKENS) == "rFalse"


LOCATED = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "writes 0 times"),
        (LOCATED + LOCATED, "writes 2 times"),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "writes 0 times"),
        ("{{ messages[1].content | length }}" + LOCATED, "depends on it"),
        (
            LOCATED + "{% if messages[1].content != 'yo' %}{{ raise_exception('no') }}{% endif %}",
            "refuses",
        ),
    ],
    ids=["omitted", "twice", "measured", "prefix-depends-on-content", "refused"],
)
def test_a_contribution_that_cannot_be_located_is_refused(template: str, match: str) -> None:
    with pytest.raises(ValueError, match=f"{match}.*--train-on all"):
        render_with_spans(template, say("hi", "yo"), **TOKENS)


@pytest.mark.parametrize("field", ["tool_calls", "reasoning_content", "suffix"])
def test_text_beside_the_content_is_refused_without_marks(field: str) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{{ m.suffix }}{{ m.reasoning_content }}{% endfor %}"
    )
    messages = say("hi", "yo")
    messages[1][field] = "more"
    with pytest.raises(ValueError, match=rf"message 1 must hold nothing but.*'{field}'"):
        render_with_spans(template, messages, **TOKENS)


def test_fields_that_the_template_does_not_read_are_harmless() -> None:
    messages = say("hi", "yo")
    messages[1]["id"] = "x"
    _, spans = render_with_spans(CHATML, messages, **TOKENS)
    assert len(spans) == 1


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (
            "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}",
            "must not be nested",
        ),
        (
            "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | trim }}",
            "enclose unchanged",
        ),
        ("{% if false %}{% generation %}a{% endgeneration %}{% endif %}b", "must be reached"),
    ],
    ids=["nested", "filtered", "unreached"],
)
def test_marks_that_cannot_be_trusted_are_refused(template: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        render_with_spans(template, say("hi", "yo"), **TOKENS)


def test_some_targets_need_one_mark_per_message() -> None:
    template = "{% generation %}a{% endgeneration %}"
    with pytest.raises(ValueError, match="got 1 marks for 2 messages"):
        render_with_spans(template, say("a", "b", "c", "d"), targets=[3], **TOKENS)


def test_a_refused_conversation_names_message_role_and_reason() -> None:
    messages = [*say("a", "b", "c"), {"role": "user", "content": "d"}]
    with pytest.raises(ValueError, match=r"message 3 \(role 'user'\).*'roles must alternate'"):
        render(INST, messages, add_generation_prompt=False, **TOKENS)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 3 }}",
        "{{ 1 / 0 }}",
        "{{ messages.x.y }}",
        "{{ messages[0].content.split('') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 3 | tojson | nope }}",
        "{% for %}",
        "{% generation %}",
        "{{ range(99999999) | list }}",
    ],
)
def test_whatever_a_template_does_wrong_is_a_value_error(template: str) -> None:
    with pytest.raises(ValueError, match="chat template"):
        render(template, say("hi", "yo"), add_generation_prompt=False, **TOKENS)


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(ValueError, match="must be valid Jinja: got line 2"):
        render("a\n{% if %}", [], add_generation_prompt=False, **TOKENS)


def test_templates_load_by_name_and_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ 'caf\u00e9' }}", encoding="utf-8")
    assert load_template(str(tmp_path / "mine.jinja")) == "{{ 'caf\u00e9' }}"
    assert "<|im_start|>" in load_template("chatml")
    with pytest.raises(ValueError, match=r"bundled template \(chatml\).*got 'chatlm'"):
        load_template("chatlm")
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="must be UTF-8"):
        load_template(str(tmp_path / "bad.jinja"))
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match="must be valid Jinja"):
        load_template(str(tmp_path / "bad.jinja"))
