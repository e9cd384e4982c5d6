"""data/prompt.py: prompts as token ids, what ends an answer, templates that do not begin one."""

from pathlib import Path

import pytest
from support.chat_cases import (
    CHATML,
    IN_THE_LOOP,
    INST,
    JOINED_CALLS,
    LLAMA3,
    MARKED,
    TOOLS,
    call,
    say,
)
from test_data_tokenizer import save_byte_level

from data.chat.template import ChatTemplate
from data.formats.examples import Conversation
from data.prompt import (
    check_generation_prompt,
    encode_conversation,
    encode_messages,
    encode_prompt,
    stop_ids,
)
from data.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<|begin|>", "eos_token": "<|end_of_text|>"}
# opens no turn, whether asked to or not
WITHOUT_PROMPT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def with_template(folder: Path, template: str) -> Tokenizer:
    config: dict[str, object] = {**SPECIAL, "chat_template": template}
    return Tokenizer.from_folder(save_byte_level(folder, config=config))


# a prompt that begins the thoughts, which an answer without thoughts does not have
THINKING = CHATML.replace("<|im_start|>assistant\\n'", "<|im_start|>assistant\\n<think>\\n'")


@pytest.mark.parametrize("template", [CHATML, LLAMA3, INST, MARKED, IN_THE_LOOP, THINKING])
def test_templates_that_begin_an_answer_are_taken(template: str) -> None:
    check_generation_prompt(ChatTemplate(template, "the template", SPECIAL))


def test_a_template_that_does_not_begin_an_answer_is_refused() -> None:
    template = ChatTemplate(WITHOUT_PROMPT, "the template", SPECIAL)
    with pytest.raises(ValueError, match=r"^the template must open the assistant's turn .* --raw$"):
        check_generation_prompt(template)


def test_a_prompt_is_a_conversation_of_one_message(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHATML)
    size = tokenizer.vocab_size
    message = {"role": "user", "content": "Hi"}
    ids = encode_prompt("Hi", tokenizer, size)
    assert ids == encode_messages([message], tokenizer, size)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    longer = [{"role": "system", "content": "Be kind."}, message]
    text = f"<|im_start|>system\nBe kind.<|im_end|>\n{text}"
    assert encode_messages(longer, tokenizer, size) == tokenizer.encode(text, False)
    assert encode_prompt("Hi", tokenizer, size, "Be kind.") == tokenizer.encode(text, False)


# with tools, and a variable of its own
CALLING = "{% if tools %}{{ tools | tojson }}{% endif %}{% if shouts %}{{ 'LOUD' }}{% endif %}"


def test_a_conversation_is_written_with_its_tools_and_variables(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CALLING + CHATML)
    asked = Conversation(say("Hi"), [], TOOLS, {"shouts": True})
    text = tokenizer.decode(
        encode_conversation(asked, tokenizer, tokenizer.vocab_size), skip_special_tokens=False
    )
    template = tokenizer.chat_template()
    expected = template.render(
        asked.messages, add_generation_prompt=True, tools=TOOLS, variables=asked.variables
    )
    assert text == expected
    assert expected.startswith("[{")
    assert "LOUD" in expected


def test_the_template_for_tools_writes_a_conversation_with_tools(tmp_path: Path) -> None:
    templates = {"default": CHATML, "tool_use": "TOOLS" + CALLING + CHATML}
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    config: dict[str, object] = {**SPECIAL, "chat_template": listed}
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, config=config))
    for tools, is_for_tools in ((None, False), (TOOLS, True)):
        asked = Conversation(say("Hi"), [], tools)
        text = tokenizer.decode(encode_conversation(asked, tokenizer, tokenizer.vocab_size))
        assert text.startswith("TOOLS") == is_for_tools


def test_earlier_calls_are_written_as_in_training(tmp_path: Path) -> None:
    template = JOINED_CALLS + "{% if add_generation_prompt %}{{ '<answer>' }}{% endif %}"
    tokenizer = with_template(tmp_path, template)
    turn = {"role": "assistant", "content": "", "tool_calls": call({"x": 1})}
    asked = Conversation([*say("Hi"), turn, *say("And?")], [])
    text = tokenizer.decode(encode_conversation(asked, tokenizer, tokenizer.vocab_size))
    assert text == 'Hi<call>add\n{"x": 1}</call>And?<answer>'


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Conversation(say("Hi"), [], TOOLS), "got no use of tools in it"),
        (Conversation(say("Hi"), [], None, {"shouts": True}), "got no use of shouts in it"),
        (
            Conversation([{"role": "user", "content": "Hi", "name": "Ann"}], []),
            r"ignores name of message 0 \(role 'user'\)",
        ),
    ],
    ids=["tools", "a variable", "a name"],
)
def test_what_the_template_would_leave_out_is_refused(
    tmp_path: Path, asked: Conversation, message: str
) -> None:
    tokenizer = with_template(tmp_path, CHATML)
    with pytest.raises(ValueError, match=message):
        encode_conversation(asked, tokenizer, tokenizer.vocab_size)


def test_a_template_without_a_system_prompt_is_not_given_one(tmp_path: Path) -> None:
    deaf = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = with_template(tmp_path, deaf)
    with pytest.raises(ValueError, match=r"ignores content of message 0 \(role 'system'\)"):
        encode_prompt("Hi", tokenizer, tokenizer.vocab_size, "Be kind.")


def test_a_message_may_have_no_words(tmp_path: Path) -> None:
    template = CHATML.replace("message['content']", "message['content'] | default('', true)")
    tokenizer = with_template(tmp_path, template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": []}]
    assert encode_messages(messages, tokenizer, tokenizer.vocab_size)


def test_an_answer_ends_at_eos_and_at_the_end_of_the_templates_turn(tmp_path: Path) -> None:
    plain = Tokenizer.from_folder(save_byte_level(tmp_path / "plain"))
    eos = plain.eos_token_id
    assert stop_ids(plain, (5, 7)) == {5, 7, eos}
    inst = with_template(tmp_path / "inst", INST)
    # the template's end of turn is EOS itself
    assert stop_ids(inst, ()) == {inst.eos_token_id}
    chatml = with_template(tmp_path / "chatml", CHATML)
    assert stop_ids(chatml, ()) == {eos, chatml.added_ids["<|im_end|>"]}
    # words that are no special token end nothing
    words = with_template(tmp_path / "words", CHATML.replace("<|im_end|>", "</answer>"))
    assert stop_ids(words, ()) == {eos}
