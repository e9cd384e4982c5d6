"""data/chat/templates/: each writes its family's format, and marks what the assistant says."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.chat_cases import CALL, RESULT, ROWS, SYSTEM, TOOLS, USED, call, make, say
from test_data_tokenizer import save_byte_level

from answering.flags import build_parser
from data.chat.assistant_spans import render_with_spans
from data.chat.template import ChatTemplate
from data.chat.template_files import BUNDLED_TEMPLATES
from data.chat.template_marks import lacks_bos, marks_without_token, warnings
from data.chat.unwritten import check_written
from data.tokenizer import Tokenizer
from data.tokens.pieces import Counts
from run.flags import DataFlags

NAMES = sorted(path.stem for path in BUNDLED_TEMPLATES.glob("*.jinja"))
# of a system message, a question, an answer and another question: the text, and what is learned
# of it
WRITTEN = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n",
        # without marks the turn is learned to the end of its line
        ["yo<|im_end|>\n"],
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\nyo"
        "<end_of_turn>\n<start_of_turn>user\nand?<end_of_turn>\n",
        ["yo<end_of_turn>"],
    ),
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|>",
        ["yo<|eot_id|>"],
    ),
    "llama-3.1": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|>",
        ["yo<|eot_id|>"],
    ),
    "mistral": ("<s>[INST] Be brief.\n\nhi[/INST] yo</s>[INST] and?[/INST]", [" yo</s>"]),
    "phi": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\nyo<|end|>\n"
        "<|user|>\nand?<|end|>\n</s>",
        ["yo<|end|>"],
    ),
    "qwen": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n",
        ["yo<|im_end|>"],
    ),
}
OPENINGS = {
    "chatml": "<|im_start|>assistant\n",
    "gemma": "<start_of_turn>model\n",
    "llama-3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-3.1": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "",
    "phi": "<|assistant|>\n",
    "qwen": "<|im_start|>assistant\n",
}
# the families' own templates among the assets, and the rows that ours writes as they do
PLAIN = ("one-turn", "equal-messages", "whitespace", "content-like-the-template", "markup")
PLAIN += ("unicode", "user-last")
MORE = ("system", "thinking", "two-users", "two-assistants")
WITH_TOOLS = ("tools", "tools-twice", "calls-without-tools")
THEIRS = [
    ("llama-3", "tokenizers/llama-3/tokenizer_config.json", (*PLAIN, *MORE, "system-only-later")),
    ("llama-3.1", "tokenizers/llama-3/chat_template.llama-3.1.jinja", (*PLAIN, *MORE, *WITH_TOOLS)),
    ("mistral", "tokenizers/mistral-v3/tokenizer_config.json", PLAIN),
    ("qwen", "templates/trl/qwen3_instruct_2507.jinja", (*PLAIN, *MORE, *WITH_TOOLS)),
    ("qwen", "templates/trl/qwen2_5.jinja", ("system", "tools-twice")),
    ("gemma", "templates/trl/gemma.jinja", PLAIN),
    ("gemma", "templates/trl/gemma3.jinja", (*PLAIN, "system", "thinking")),
    ("phi", "tokenizers/phi-3-mini/tokenizer_config.json", (*PLAIN, *MORE)),
    ("phi", "templates/trl/phi3_5.jinja", (*PLAIN, *MORE)),
]


def bundled(name: str) -> ChatTemplate:
    return make((BUNDLED_TEMPLATES / f"{name}.jinja").read_text(), name)


def learned(name: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    text, spans = render_with_spans(bundled(name), messages, **options)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_is_written_in_the_familys_format(name: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *say("hi", "yo", "and?")]
    text, marked = WRITTEN[name]
    assert bundled(name).render(messages) == text
    assert learned(name, messages) == marked
    opened = text.removesuffix("</s>") if name == "phi" else text
    assert bundled(name).render(messages, add_generation_prompt=True) == opened + OPENINGS[name]


@pytest.mark.parametrize(("name", "path", "rows"), THEIRS, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("opens", [False, True], ids=["whole", "opened"])
def test_the_text_is_that_of_the_familys_own_template(
    assets: Path, name: str, path: str, rows: tuple[str, ...], opens: bool
) -> None:
    text = (assets / path).read_text()
    theirs = make(json.loads(text)["chat_template"] if path.endswith("json") else text)
    for row in rows:
        messages, tools = ROWS[row]["messages"], ROWS[row].get("tools")
        written = [
            template.render(messages, tools=tools, add_generation_prompt=opens)
            for template in (bundled(name), theirs)
        ]
        assert written[0] == written[1], row


CALLS = {
    "llama-3.1": '{"name": "add", "parameters": {"x": 1, "y": "<\u00e9>"}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"x": 1, "y": "<\u00e9>"}, '
    '"id": "call00000"}]</s>',
    "qwen": '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": "<\u00e9>"}}\n</tool_call>'
    "<|im_end|>",
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_learned_and_their_results_are_not(name: str) -> None:
    asked, answer = learned(name, USED, tools=TOOLS)
    assert asked == CALLS[name]
    assert answer.startswith(" It is 3." if name == "mistral" else "It is 3.")
    template = bundled(name)
    seen = template.variables(tools=TOOLS, variables=None, now=None)
    check_written(template, USED, seen, template.write(USED, seen), [1, 3])


TWO_CALLS = {
    "qwen": '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>\n'
    '{"name": "add", "arguments": {"x": 2}}\n</tool_call><|im_end|>',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"x": 1}, "id": "call00000"}, '
    '{"name": "add", "arguments": {"x": 2}, "id": "call00001"}]</s>',
}


@pytest.mark.parametrize("name", TWO_CALLS)
def test_two_calls_of_a_message_are_apart(name: str) -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": call({"x": 1}, {"x": 2})}
    assert learned(name, [*say("add"), calls]) == [TWO_CALLS[name]]


@pytest.mark.parametrize("name", sorted({*NAMES} - {*CALLS}))
def test_a_format_without_calls_refuses_them(name: str) -> None:
    template = bundled(name)
    seen = template.variables(tools=None, variables=None, now=None)
    # the call alone, which a template might pass over, and its result
    for messages in ([*say("add"), {**CALL, "content": ""}], USED):
        with pytest.raises(ValueError, match=r"ignores tool_calls|the template raised"):
            check_written(template, messages, seen, template.write(messages, seen), [1])


@pytest.mark.parametrize(
    ("name", "messages", "tools", "why"),
    [
        ("gemma", say("a")[:1] * 2, None, "user and assistant take turns"),
        ("gemma", [*say("a", "b"), SYSTEM], None, "user and assistant take turns"),
        ("mistral", say("a")[:1] * 2, None, "user and assistant take turns"),
        ("mistral", [*say("a"), RESULT], None, "user and assistant take turns"),
        ("mistral", [*USED[:2], {**RESULT, "tool_call_id": "x"}], None, "id of 9 characters"),
        ("llama-3", [*say("a"), RESULT], None, "no role tool"),
        ("llama-3.1", [*say("a"), {"role": "critic", "content": ""}], None, "no role critic"),
        ("llama-3.1", [SYSTEM], TOOLS, "the user's first message has the tools"),
        ("llama-3.1", ROWS["two-calls"]["messages"], TOOLS, "a message has one call"),
        ("phi", [*say("a"), {"role": "tool", "content": ""}], None, "no role tool"),
        ("qwen", [*say("a"), {"role": "critic", "content": ""}], None, "no role critic"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(
    name: str, messages: list[dict[str, Any]], tools: list[Any] | None, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        bundled(name).render(messages, tools=tools)


def test_a_system_message_and_tools_stand_before_every_answer_of_mistral() -> None:
    text = bundled("mistral").render([SYSTEM, *USED, *say("thanks", "ok")], tools=TOOLS[:1])
    assert text.startswith('<s>[AVAILABLE_TOOLS] [{"type": "function", ')
    assert "[/AVAILABLE_TOOLS][INST]  Be <brief>. \n\n\nadd[/INST][TOOL_CALLS] [" in text
    assert text.endswith("[INST] thanks[/INST] ok</s>")
    assert '[TOOL_RESULTS] {"content": "3", "call_id": "call00000"}[/TOOL_RESULTS] It is' in text


def test_llamas_date_can_be_given() -> None:
    dated = bundled("llama-3.1").render(say("a"), variables={"date_string": "1 May 2025"})
    assert "Today Date: 1 May 2025\n\n<|eot_id|>" in dated


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_of_another_family_is_warned_of(tmp_path: Path, name: str) -> None:
    folder = save_byte_level(tmp_path, adds_bos=True)
    tokenizer = Tokenizer.from_folder(folder, chat_template=name)
    said = "\n".join(warnings(Counts(num_rendered=2), tokenizer, lambda ids, others: set()))
    # the tokenizer has ChatML's marks
    assert ("marks that are no tokens" in said) == (name not in ("chatml", "qwen"))
    assert ("does not begin with <|begin|>" in said) == (name in ("chatml", "qwen", "phi"))


OWN = {"llama-3": "llama-3", "llama-3.1": "llama-3", "mistral": "mistral-v3", "qwen": "qwen3"}
OWN |= {"phi": "phi-3-mini"}


@pytest.mark.parametrize("folder", sorted(set(OWN.values())))
def test_only_tokenizers_of_the_family_have_its_marks(assets: Path, folder: str) -> None:
    tokenizer = Tokenizer.from_folder(assets / "tokenizers" / folder)
    for name, own in OWN.items():
        template = ChatTemplate(bundled(name).text, name, tokenizer.special_tokens)
        foreign = marks_without_token(template, tokenizer)
        assert bool(foreign) == (own != folder), f"{name}: {foreign}"
        assert own != folder or not lacks_bos(template, tokenizer)


def test_the_flags_name_the_bundled_templates() -> None:
    named = f"a bundled template ({', '.join(NAMES)}), "
    (flag,) = (f for f in fields(DataFlags) if f.name == "chat_template")
    assert flag.metadata["help"].startswith(named)
    assert named in " ".join(build_parser().format_help().split())
