"""The words of an answer, without the reasoning before them, where control tokens part the two.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>Yes.
    <|channel>thought ...<channel|>Yes.

Decoded without control tokens, every answer of gpt-oss would begin with "final", and its reasoning
and Gemma 4's would run into the words. In a conversation that goes on, the chat template would
write all of that as what the assistant said. What stands before the words is seen in what the
template writes for an answer. Reasoning between texts, as Qwen3's <think>, stays in the answer:
templates take it out themselves.

gpt-oss's template closes the last answer with <|return|>, and an earlier one with <|end|>, as it
does reasoning. So a model that learned from conversations may close any answer with <|end|>, which
ends the words and cannot be what ends the whole.
"""

from collections.abc import Sequence
from datetime import datetime
from itertools import takewhile
from typing import NamedTuple

from data.chat.template import TEMPLATE_ERRORS, ChatTemplate, Message
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
        closes: what the words end before.
    """

    begins: frozenset[int] = frozenset()
    ends: tuple[int, ...] = ()
    closes: frozenset[int] = frozenset()


def opening_of_words(tokenizer: Tokenizer) -> Opening:
    """Find what a chat template writes before the words of an answer.

    Raises:
        ValueError: the template is broken, or takes too long.
    """
    if not tokenizer.has_chat_template:
        return Opening()
    template = tokenizer.chat_template()

    def find() -> list[tuple[int, ...]]:
        return [_control_ids(text, tokenizer) for text in _around_words(template)]

    plain, before_reasoning, behind_reasoning, *behind = in_guest(find, template.name)
    ends = plain or behind_reasoning
    if plain and behind_reasoning:
        # what is written with reasoning and without it
        pairs = zip(reversed(plain), reversed(behind_reasoning), strict=False)
        shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        ends = tuple(reversed(shared))
    begins = frozenset(ids[0] for ids in (plain, before_reasoning) if ids)
    closes = frozenset(ids[0] for ids in behind if ids)
    return Opening(begins, ends, closes) if begins and ends else Opening()


def _around_words(template: ChatTemplate) -> tuple[str, str, str, str, str]:
    """What the template writes before the words of an answer without reasoning, before and behind
    the reasoning of another, and behind the words of an answer that is the last and of one that is
    not."""
    now = datetime.now()

    def answered(*later: Message, **more: str) -> str:
        message = {"role": "assistant", "content": _WORDS, **more}
        text = template.render([*_QUESTION, message, *later], now=now)
        return text.removeprefix(asked) if text.startswith(asked) else ""

    try:
        asked = template.render(_QUESTION, add_generation_prompt=True, now=now)
        plain, reasoned = answered(), answered(reasoning_content=_REASONING)
        earlier = answered(*_QUESTION)
    except (*TEMPLATE_ERRORS, ValueError):
        return "", "", "", "", ""
    opening, _, closing = plain.partition(_WORDS)
    before, _, behind = reasoned.partition(_WORDS)[0].partition(_REASONING)
    return opening, before, behind, closing, earlier.partition(_WORDS)[2]


def _control_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a text from its first control token to its last."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    places = [place for place, i in enumerate(ids) if i in tokenizer.special_ids]
    return tuple(ids[places[0] : places[-1] + 1]) if places else ()


def words_of(ids: Sequence[int], opening: Opening) -> list[int]:
    """The tokens of an answer's words, or all where they never begin."""
    size, start = len(opening.ends), 0
    if opening.begins.intersection(ids[:1]):
        ends = (i for i in range(size, len(ids) + 1) if tuple(ids[i - size : i]) == opening.ends)
        if (found := next(ends, None)) is None:
            return list(ids)
        start = found
    return list(takewhile(lambda i: i not in opening.closes, ids[start:]))


class StreamedAnswer:
    """Turns an answer's tokens into pieces of its words, and pieces of the reasoning before them.

    Attributes:
        ids: all tokens so far.
        is_closed: whether the words have ended.
    """

    def __init__(self, tokenizer: Tokenizer, opening: Opening) -> None:
        self._tokenizer, self._opening = tokenizer, opening
        self.ids: list[int] = []
        # the last tokens of the reasoning, which may be those that end it
        self._held: list[int] = []
        self._words = StreamedText(tokenizer)
        self._reasoning = StreamedText(tokenizer, skip_special_tokens=False)
        self._is_in_words = not opening.begins
        self.is_closed = False

    def add(self, token_id: int) -> tuple[str, str]:
        """Add a token, and return the words and the reasoning that are certain by now."""
        self.ids.append(token_id)
        if len(self.ids) == 1 and token_id not in self._opening.begins:
            self._is_in_words = True
        if self._is_in_words:
            self.is_closed |= token_id in self._opening.closes
            return "" if self.is_closed else self._words.add(token_id), ""
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
