"""data/answer_text.py: the words of an answer, and the reasoning before them."""

from pathlib import Path

import pytest
import tokenizers
from support.chat_cases import CHATML, IN_THE_LOOP, INST, LLAMA3, MARKED, REASONER
from test_data_tokenizer import save_byte_level

from data.answer_text import Opening, StreamedAnswer, opening_of_words, words_of
from data.tokenizer import Tokenizer

CONTROLS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
CONTROLS += ["<|turn>", "<turn|>", "<|channel>", "<channel|>"]
# every answer names its channel, as gpt-oss's do
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# an answer with reasoning alone does, as Gemma 4's
THOUGHTS = (
    "{% for m in messages %}{{ '<|turn>' + m.role + '\n' }}{% if m.reasoning_content %}"
    "{{ '<|channel>thought\n' + m.reasoning_content + '\n<channel|>' }}{% endif %}"
    "{{ m.content + '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}"
)
TAGS = CHATML.replace(
    "message['content']",
    "('<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' + message['content'])",
)
THINKS_FIRST = CHATML.replace("<|im_start|>assistant\\n'", "<|im_start|>assistant\\n<think>\\n'")
OTHERS = [CHATML, LLAMA3, INST, MARKED, IN_THE_LOOP, REASONER, TAGS, THINKS_FIRST, "{{ x.y }}"]


def with_template(folder: Path, template: str) -> Tokenizer:
    save_byte_level(
        folder,
        config={"bos_token": "<|begin|>", "eos_token": "<|return|>", "chat_template": template},
    )
    path = str(folder / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(path)
    backend.add_special_tokens(CONTROLS)
    backend.save(path)
    return Tokenizer.from_folder(folder)


def both(tokenizer: Tokenizer, answer: str) -> tuple[str, str, str]:
    """The words of an answer's tokens, and the words and the reasoning that come one by one."""
    opening = opening_of_words(tokenizer)
    ids = tokenizer.encode(answer, add_special_tokens=False)
    streamed = StreamedAnswer(tokenizer, opening)
    words, reasoning = map("".join, zip(*map(streamed.add, ids), strict=True))
    assert streamed.ids == ids
    # by either token that the template closes answers with
    assert streamed.is_closed == any(token in answer for token in ("Yes.<|end|>", "<|return|>"))
    return tokenizer.decode(words_of(ids, opening)), words + streamed.rest(), reasoning


@pytest.mark.parametrize(
    ("answer", "words", "reasoning"),
    [
        ("<|channel|>final<|message|>Yes, caf\u00e9.", "Yes, caf\u00e9.", ""),
        (
            "<|channel|>analysis<|message|>Hm \u00e9<|end|><|start|>assistant<|channel|>final"
            "<|message|>Yes.",
            "Yes.",
            "<|channel|>analysis<|message|>Hm \u00e9<|end|><|start|>assistant\n",
        ),
        ("Yes, without a channel.", "Yes, without a channel.", ""),
        # closed as an earlier answer is, and as the last one
        ("<|channel|>final<|message|>Yes.<|end|><|start|>user<|message|>Hm", "Yes.", ""),
        ("<|channel|>final<|message|>Yes.<|return|>Hm", "Yes.", ""),
        # cut before the words
        ("<|channel|>analysis<|message|>Hm", "analysisHm", None),
    ],
    ids=["words", "reasoning", "no channel", "end", "return", "cut"],
)
def test_what_an_answer_says_stands_behind_its_channel(
    tmp_path: Path, answer: str, words: str, reasoning: str | None
) -> None:
    tokenizer = with_template(tmp_path, CHANNELS)
    found = both(tokenizer, answer)
    assert found[:2] == (words, words)
    assert answer.startswith(found[2]) if reasoning is None else found[2] == reasoning


@pytest.mark.parametrize(
    ("answer", "words", "reasoning"),
    [
        ("Yes.", "Yes.", ""),
        ("<|channel>thought\nHm\n<channel|>Yes.", "Yes.", "<|channel>thought\nHm\n\n"),
        ("<|channel>thought\n<channel|>Yes.", "Yes.", "<|channel>thought\n\n"),
        # words may name what would end reasoning
        ("See <channel|> there.", "See  there.", ""),
    ],
    ids=["words", "reasoning", "none", "named"],
)
def test_words_begin_at_once_where_no_reasoning_does(
    tmp_path: Path, answer: str, words: str, reasoning: str
) -> None:
    assert both(with_template(tmp_path, THOUGHTS), answer) == (words, words, reasoning)


@pytest.mark.parametrize("template", OTHERS)
def test_other_templates_have_words_from_the_first_token(tmp_path: Path, template: str) -> None:
    tokenizer = with_template(tmp_path, template)
    assert opening_of_words(tokenizer) == Opening()
    answer = "<think>\nHm\n</think>\n\nYes."
    assert both(tokenizer, answer) == (answer, answer, "")


def test_without_a_template_all_tokens_are_words(tmp_path: Path) -> None:
    assert opening_of_words(Tokenizer.from_folder(save_byte_level(tmp_path))) == Opening()
    assert words_of([5, 6], Opening()) == [5, 6]
