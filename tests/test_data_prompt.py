"""data/prompt.py: prompts as token ids, what ends an answer, templates that do not begin one."""

from pathlib import Path

import pytest
from support.chat_cases import CHATML, IN_THE_LOOP, INST, LLAMA3, MARKED
from test_data_tokenizer import save_byte_level

from data.chat.template import ChatTemplate
from data.prompt import check_generation_prompt, encode_messages, encode_prompt, stop_ids
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
