"""data/chat/unwritten.py: what a template leaves out is named, whatever it is; what may go goes."""

from pathlib import Path
from typing import Any

import pytest
from support.chat_cases import (
    CALL,
    CHATML,
    INTRICATE,
    JOINED_CALLS,
    REASONER,
    RESULT,
    TOKENS,
    TOOLS,
    USED,
    call,
    make,
    say,
)
from test_data_tokenizer import save_byte_level

from data.chat.template import ChatTemplate
from data.chat.unwritten import check_written
from data.formats.examples import Conversation
from data.samples import to_sample
from data.tokenizer import Tokenizer

# writes the roles that many templates know, and no others
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
NAMED = "{% for m in messages %}[{{ m.name or m.role }}]{{ m.content }}{% endfor %}"
FIRST_CALL = (
    "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function | tojson }}{% endif %}{% endfor %}"
)
CALLED_NAMES = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{% endfor %}{% endfor %}"
)
SAID = {"role": "assistant", "content": "yo"}
CALLED = {**CALL, "content": ""}
THOUGHT = {**SAID, "reasoning_content": "hm"}


def check(
    template: ChatTemplate | str,
    messages: list[dict[str, Any]],
    *,
    targets: list[int] | None = None,
    **given: Any,
) -> None:
    if isinstance(template, str):
        template = make(template)
    variables = template.variables(
        tools=given.get("tools"), variables=given.get("variables"), now=None
    )
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    text = template.attempt(messages, variables)
    check_written(template, messages, variables, text, targets or replies)


def said_after(role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": "Say no."}, *say("hi", "yo")]


LEFT_OUT: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    **{
        role: (KNOWN_ROLES, said_after(role), rf"content of message 0 \(role '{role}'\); choose")
        for role in ("developer", "system", "tool", "function", "ipython")
    },
    "system-by-continue": (INTRICATE, said_after("system"), r"content of message 0 \(role 'sys"),
    "result": (KNOWN_ROLES, [*say("a", "b"), RESULT, SAID], r"content of message 2 \(role 'tool'"),
    "reasoning": (CHATML, [*say("hi"), THOUGHT], "reasoning_content of message 1"),
    "thinking": (CHATML, [*say("hi"), {**SAID, "thinking": "hm"}], "thinking of message 1"),
    "reasoning-never-written": (CHATML, [*say("hi"), THOUGHT, *say("and", "no")], "reasoning_cont"),
    "reasoning-in-content": (
        REASONER,
        say("hi", "<think>\nhm</think>\nyo"),
        r"the text before </think> of message 1",
    ),
    "calls": (CHATML, [*say("hi"), CALLED], r"tool_calls\[0\]\.name of message 1"),
    "second-call": (
        FIRST_CALL,
        [*say("hi"), {**CALLED, "tool_calls": call({"x": 1}, {"x": 2})}],
        r"ignores tool_calls\[1\]\.name of message 1 .*, tool_calls\[1\]\.arguments of",
    ),
    "arguments": (CALLED_NAMES, [*say("hi"), CALLED], r"ignores tool_calls\[0\]\.arguments of mes"),
    "function-call": (
        CHATML,
        [*say("hi"), {**SAID, "function_call": {"name": "f", "arguments": {"x": 1}}}],
        r"function_call\.name of message 1 .*, function_call\.arguments of message 1",
    ),
    "name": (CHATML, [{**say("hi")[0], "name": "Ann"}, SAID], r"name of message 0 \(role 'user'\)"),
    "list": (CHATML, [{**say("hi")[0], "images": ["a"]}, SAID], "images of message 0"),
    "object": (CHATML, [{**say("hi")[0], "extra": {"a": 1}}, SAID], "extra of message 0"),
    "number": (CHATML, [{**say("hi")[0], "volume": 3}, SAID], "volume of message 0"),
    "boolean": (CHATML, [*say("hi"), {**SAID, "prefix": False}], "prefix of message 1"),
    "content-like-a-mark": (
        # of this test alone: its shape must be new
        KNOWN_ROLES + "!",
        [*said_after("system")[:1], *say("Mark0x markk0x", "yo")],
        "content of message 0",
    ),
    "many": (
        KNOWN_ROLES,
        [*said_after("tool")[:1] * 5, *say("hi", "yo")],
        r"message 2 \(role 'tool'\) and 2 more; choose",
    ),
}


@pytest.mark.parametrize(("template", "messages", "match"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_a_template_leaves_out_is_refused_by_name(
    template: str, messages: list[dict[str, Any]], match: str
) -> None:
    with pytest.raises(ValueError, match=f"x.jinja must write all .*{match}"):
        check(template, messages)


WRITTEN: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "name": (NAMED, [{**say("hi")[0], "name": "Ann"}, SAID]),
    "calls-joined": (JOINED_CALLS, [*say("hi"), {**CALLED, "tool_calls": call('{"x": 1}')}]),
    "nothing-in-it": (CHATML, [*say("hi"), {**SAID, "images": [], "audio": {}, "refusal": ""}]),
    "name-of-a-result": (CHATML, [*say("a", "b"), RESULT, SAID]),
    "where-it-is-from": (CHATML, [{**say("hi")[0], "id": 3, "source": "web"}, SAID]),
    "object-as-json": (CHATML + "{{ messages | tojson }}", [*say("hi"), {**SAID, "a": {"b": 1}}]),
    "read-without-being-written": (
        "{% for m in messages %}{{ m.content }}{% if m.prefix or m.channel == 'final' %}!"
        "{% endif %}{% endfor %}",
        [*say("hi"), {**SAID, "prefix": False, "channel": "final"}],
    ),
    "content-in-capitals": (CHATML.replace("['content']", "['content'] | upper"), say("hi", "yo")),
    "a-mark-refused": (
        "{% for m in messages %}{% if m.content | length > 5 %}{{ raise_exception('long') }}"
        "{% endif %}{{ m.content }}{% endfor %}",
        say("hi", "yo"),
    ),
    "empty-turns": (KNOWN_ROLES, [{"role": "system", "content": ""}, *say("hi", "yo")]),
    "after-the-last-target": (KNOWN_ROLES, [*say("hi", "yo"), RESULT]),
}


@pytest.mark.parametrize(("template", "messages"), WRITTEN.values(), ids=WRITTEN)
def test_what_a_template_writes_or_uses_is_taken(
    template: str, messages: list[dict[str, Any]]
) -> None:
    check(template, messages)


def test_a_part_is_left_out_though_another_is_refused_with_its_mark() -> None:
    template = (
        "{% for m in messages %}{% if m.content | length > 5 %}{{ raise_exception('long') }}"
        "{% endif %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"ignores reasoning_content of message 2 \(role 'assi"):
        check(template, [*said_after("tool")[1:2], RESULT, THOUGHT])


def test_tools_must_be_written_and_not_only_looked_at() -> None:
    check("{{ tools | tojson }}" + FIRST_CALL, [*USED[:1], CALLED], tools=TOOLS)
    check("{{ tools | tojson }}" + FIRST_CALL, [*USED[:1], CALLED], tools=[{"name": "f"}])
    with pytest.raises(ValueError, match=r"ignores tools\[0\], tools\[1\]; choose"):
        check("{% if tools %}Call.{% endif %}" + CHATML, say("hi", "yo"), tools=TOOLS)
    with pytest.raises(ValueError, match=r"ignores tools\[1\]; choose"):
        check("{{ tools[0] | tojson }}" + CHATML, say("hi", "yo"), tools=TOOLS)


def test_reasoning_of_earlier_turns_may_go_as_qwen_means_it(assets: Path) -> None:
    template = make((assets / "templates" / "trl" / "qwen3.jinja").read_text())
    check(template, [*say("hi"), THOUGHT, *say("and"), THOUGHT])
    inside = "<think>\nhm\n</think>\n\nyo"
    check(template, say("hi", inside, "and", inside))
    written = template.render(say("hi", inside, "and", inside))
    # it is the earlier one that has gone
    assert written.count("hm") == 1
    assert written.index("hm") > written.index("and")


def test_reasoning_that_is_not_learned_may_go() -> None:
    messages = [*say("hi"), THOUGHT, *say("and", "no")]
    check(CHATML, messages, targets=[3])
    with pytest.raises(ValueError, match="reasoning_content of message 1"):
        check(CHATML, messages, targets=[1, 3])


def test_reasoning_under_two_names_is_one() -> None:
    template = "{% for m in messages %}{{ m.thinking }}{{ m.content }}{% endfor %}"
    check(template, [*say("hi"), {**SAID, "reasoning": "hm", "thinking": "hm"}])
    with pytest.raises(ValueError, match="ignores reasoning of message 1"):
        check(template, [*say("hi"), {**SAID, "reasoning": "hm", "thinking": "so"}])


class _Counted(ChatTemplate):
    num_renderings = 0

    def attempt(self, *args: Any) -> str:
        _Counted.num_renderings += 1
        return super().attempt(*args)


def test_one_rendering_stands_for_a_shape_and_another_shape_has_its_own() -> None:
    text = CHATML + "{# of this test alone #}"

    def num_renderings(*conversations: list[dict[str, Any]], **given: Any) -> int:
        before = _Counted.num_renderings
        for messages in conversations:
            check(_Counted(text, "x", TOKENS), messages, **given)
        # one writes the text itself
        return _Counted.num_renderings - before - len(conversations)

    assert num_renderings(*(say(f"hi {i}", f"yo {i}") for i in range(50))) == 1
    others = [
        say("hi", "yo", "and", "no"),
        say("hi", ""),
        say(" \n", "yo"),
        say("hi", "<think></think>yo"),
        [{"role": "system", "content": "s"}, *say("hi", "yo")],
        [{**say("hi")[0], "id": "3"}, SAID],
    ]
    for messages in others:
        assert num_renderings(messages, messages) == 1
    assert num_renderings(say("hi", "yo"), variables={"enable_thinking": False}) == 1
    assert num_renderings(say("hi", "yo"), variables={"enable_thinking": True}) == 1


def test_reasoning_of_messages_of_one_shape_needs_one_rendering_more(assets: Path) -> None:
    text = (assets / "templates" / "trl" / "qwen3.jinja").read_text()
    turn = [*say("hi"), THOUGHT]
    before = _Counted.num_renderings
    check(_Counted(text, "x", TOKENS), turn * 40)
    # the text itself, the text with marks, and the first turn while it is the last
    assert _Counted.num_renderings == before + 3
    # before the first user this template never writes it
    with pytest.raises(ValueError, match=r"ignores reasoning_content of message 0 \(role 'assi"):
        check(_Counted(text, "x", TOKENS), [THOUGHT, *turn * 3])


@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_two_samples_with_opposite_instructions_do_not_become_one(
    tmp_path: Path, train_on: str
) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, template=KNOWN_ROLES))
    for example in (
        Conversation(said_after("developer"), [2]),
        Conversation([*say("hi"), CALLED], [1]),
        Conversation([*say("hi"), THOUGHT], [1]),
    ):
        with pytest.raises(ValueError, match="must write all that an answer may depend on"):
            to_sample(example, tokenizer, train_on=train_on)


def test_all_learns_what_comes_after_the_last_answer_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, template=KNOWN_ROLES))
    example = Conversation([*say("hi", "yo"), RESULT], [1])
    to_sample(example, tokenizer, train_on="completions")
    with pytest.raises(ValueError, match="content of message 2"):
        to_sample(example, tokenizer, train_on="all")
