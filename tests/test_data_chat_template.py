"""data/chat/template.py: what a template sees, and what its errors say.

That its text is transformers' is tested in test_data_chat_parity.py.
"""

import re
from datetime import datetime

import pytest
from support.chat_cases import CHATML, INST, PARTS, TOOLS, make, say

from data.chat.template import ChatTemplate


def test_missing_tokens_render_as_nothing() -> None:
    template = ChatTemplate("[{{ bos_token }}{{ eos_token }}]", "x", {"eos_token": "e"})
    assert template.render([]) == "[e]"


def test_a_fixed_clock_fixes_the_date() -> None:
    now = datetime(2024, 7, 26)
    template = make("{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert template.render(say("a", "b"), now=now).startswith("26 Jul 2024<|im_start|>")


def test_variables_of_a_record_replace_special_tokens_and_nothing_else() -> None:
    template = make("{{ bos_token }} {{ documents }} {{ tools | length }}")
    variables = {"bos_token": "B", "documents": [1], "tools": []}
    assert template.render([], tools=TOOLS, variables=variables) == "B [1] 2"


def test_reasoning_has_one_name_and_nulls_are_absent() -> None:
    template = (
        "{% for m in messages %}{{ m.reasoning_content }}{{ m.tool_calls is defined }}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": "a", "reasoning": "r", "tool_calls": None}]
    assert make(template).render(messages) == "rFalse"


@pytest.mark.parametrize(
    "parts",
    [
        PARTS,
        # LLaVA-NeXT's takes a text for an error
        "{% for m in messages %}{{ m.role | upper + ': ' + m.content[0].text + ' ' }}{% endfor %}",
    ],
)
def test_a_template_that_writes_parts_alone_is_given_them(parts: str) -> None:
    messages = say("a", "", "c")
    assert make(parts).render(messages).strip() == "USER: a ASSISTANT:  USER: c"
    assert messages == say("a", "", "c")
    # a call without words has no part
    calls = [{"role": "assistant", "tool_calls": []}]
    told = "{% for m in messages %}{{ m.content is defined }}{% endfor %}"
    assert make(PARTS.replace("{% if", f"{told}{{% if")).render(calls).endswith("False")


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        INST,
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        # writes whatever is short
        "{% for m in messages %}{% if m.content | length > 5 %}{{ raise_exception('long') }}"
        "{% endif %}{{ m.content }}{{ m.text }}{% endfor %}",
        # takes both
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{{ m.content[0].text }}{% endif %}{% endfor %}",
    ],
)
def test_other_templates_are_given_texts(template: str) -> None:
    assert "hello" in make(template).render(say("hello")).lower()
    assert "type" not in make(template).render(say("hello"))


def test_a_refused_conversation_names_template_message_role_and_reason() -> None:
    messages = [*say("a", "b", "c"), {"role": "user", "content": "d"}]
    place = r"suit the chat template x\.jinja: at message 3 \(role 'user'\).*'roles must alternate'"
    with pytest.raises(ValueError, match=place):
        make(INST).render(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 3 }}",
        "{{ 1 / 0 }}",
        "{{ messages.x.y }}",
        "{{ messages[0].content.split('') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__class__.x }}",
        "{{ dict.fromkeys.__globals__.x }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ trace_of_this_rendering.read }}",
        "{{ messages.append(1) }}",
        "{{ 3 | tojson | nope }}",
        "{% for %}",
        "{% generation %}",
        "{{ range(99999999) | list }}",
    ],
)
def test_whatever_a_template_does_wrong_is_a_value_error(template: str) -> None:
    with pytest.raises(ValueError, match=r"the chat template x\.jinja"):
        make(template).render(say("hi", "yo"))


def test_a_syntax_error_names_template_and_line() -> None:
    with pytest.raises(ValueError, match=r"x\.jinja must be valid Jinja: got line 2"):
        make("a\n{% if %}").render([])


def test_a_namespace_and_a_dict_are_as_in_jinja() -> None:
    text = (
        "{% set ns = namespace({'a': 1}, self=2) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns.self }}"
        "{{ dict(a=1)['a'] }}{{ dict.fromkeys('ab') }}"
    )
    assert make(text).render([]) == "221{'a': None, 'b': None}"


def test_what_a_record_gives_must_be_read() -> None:
    template = make("{% if tools %}{{ enable_thinking }}{% endif %}{% set documents = 1 %}")
    template.check_variables(["tools", "enable_thinking"])
    message = re.escape("the chat template x.jinja must read what the record gives it: got no use")
    with pytest.raises(ValueError, match=rf"{message} of documents, thinking in it"):
        template.check_variables(["tools", "documents", "thinking"])
