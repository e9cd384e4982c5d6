"""The words of an answer, without the reasoning before them, where control tokens part the two.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>Yes.
    <|channel>thought ...<channel|>Yes.

Decoded without control tokens, every answer of gpt-oss would begin with "final", and its reasoning
and Gemma 4's would run into the words. In a conversation that goes on, the chat template would
write all of that as what the assistant said. What stands before the words is seen in what the
template writes for an answer. Reasoning between texts, as Qwen3's <think>, stays in the answer:
templates take it out themselves.
"""

from collections.abc import Sequence
from datetime import datetime
from itertools import takewhile
from typing import NamedTuple

from data.chat.template import TEMPLATE_ERRORS, ChatTemplate
from data.streamed_text import StreamedText
from data.tokenizer import Tokenizer
from foreign.guest import in_guest

_QUESTION = [{"role": "user", "content": "Who are you?"}]
_WORDS, _REASONING = "Quatrain", "Etymology"


class Opening(NamedTuple):
    """The tokens that an answer has before its words; none where no control token is among them.

    Attributes:
        begins: what such an answer begins with; with another token words begin at once.
        ends: what its words follow.
    """

    begins: frozenset[int] = frozenset()
    ends: tuple[int, ...] = ()


def opening_of_words(tokenizer: Tokenizer) -> Opening:
    """Find what a chat template writes before the words of an answer.

    Raises:
        ValueError: the template is broken, or takes too long.
    """
    if not tokenizer.has_chat_template:
        return Opening()
    template = tokenizer.chat_template()

    def find() -> list[tuple[int, ...]]:
        return [_control_ids(text, tokenizer) for text in _before_words(template)]

    plain, before_reasoning, behind_reasoning = in_guest(find, template.name)
    ends = plain or behind_reasoning
    if plain and behind_reasoning:
        # what is written with reasoning and without it
        pairs = zip(reversed(plain), reversed(behind_reasoning), strict=False)
        shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        ends = tuple(reversed(shared))
    begins = frozenset(ids[0] for ids in (plain, before_reasoning) if ids)
    return Opening(begins, ends) if begins and ends else Opening()


def _before_words(template: ChatTemplate) -> tuple[str, str, str]:
    """What the template writes before the words of an answer without reasoning, and before and
    behind the reasoning of another."""
    now = datetime.now()

    def answered(**more: str) -> str:
        message = {"role": "assistant", "content": _WORDS, **more}
        text = template.render([*_QUESTION, message], now=now)
        return text.removeprefix(asked) if text.startswith(asked) else ""

    try:
        asked = template.render(_QUESTION, add_generation_prompt=True, now=now)
        plain, reasoned = answered(), answered(reasoning_content=_REASONING)
    except (*TEMPLATE_ERRORS, ValueError):
        return "", "", ""
    before, _, behind = reasoned.partition(_WORDS)[0].partition(_REASONING)
    return plain.partition(_WORDS)[0], before, behind


def _control_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a text from its first control token to its last."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    places = [place for place, i in enumerate(ids) if i in tokenizer.special_ids]
    return tuple(ids[places[0] : places[-1] + 1]) if places else ()


def words_of(ids: Sequence[int], opening: Opening) -> list[int]:
    """The tokens of an answer's words, or all where it has no opening."""
    size = len(opening.ends)
    for end in range(size, len(ids) + 1) if opening.begins.intersection(ids[:1]) else ():
        if tuple(ids[end - size : end]) == opening.ends:
            return list(ids[end:])
    return list(ids)


class StreamedAnswer:
    """Turns an answer's tokens into pieces of its words, and pieces of the reasoning before them.

    Attributes:
        ids: all tokens so far.
    """

    def __init__(self, tokenizer: Tokenizer, opening: Opening) -> None:
        self._tokenizer, self._opening = tokenizer, opening
        self.ids: list[int] = []
        # the last tokens of the reasoning, which may be those that end it
        self._held: list[int] = []
        self._words = StreamedText(tokenizer)
        self._reasoning = StreamedText(tokenizer, skip_special_tokens=False)
        self._is_in_words = not opening.begins

    def add(self, token_id: int) -> tuple[str, str]:
        """Add a token, and return the words and the reasoning that are certain by now."""
        self.ids.append(token_id)
        if len(self.ids) == 1 and token_id not in self._opening.begins:
            self._is_in_words = True
        if self._is_in_words:
            return self._words.add(token_id), ""
        self._held.append(token_id)
        size = len(self._opening.ends)
        if tuple(self._held[-size:]) == self._opening.ends:
            self._is_in_words = True
            return "", f"{self._reasoning.rest()}\n" if self._reasoning.ids else ""
        return "", self._reasoning.add(self._held.pop(0)) if len(self._held) == size else ""

    def rest(self) -> str:
        """Return the words that waited for another token, where none comes; all of the answer where
        the words never began."""
        return self._words.rest() if self._is_in_words else self._tokenizer.decode(self.ids)
