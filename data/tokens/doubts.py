"""Records that are learned as they are, though hardly anybody means to teach that: noted.

- An answer without a word teaches to say nothing. Most of them come from an export that lost a
  column, and the loss falls quickly.
- A message that spells out a control token of the model closes its own turn. The tokenizer makes
  the token of it, as that of transformers does, and what follows reads as a turn of its own.
- A template may leave out the reasoning of an answer that a later turn follows (Qwen3's). Where
  such an answer is learned, the model learns to answer without reasoning.

data/audit.py tells of them, and refuses data most of whose answers are empty.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from data.chat.template import REASONING_FIELDS
from data.formats.examples import Conversation, Example, PromptCompletion, Text
from data.samples import Sample
from data.tokenizer import Tokenizer
from data.tokens.pieces import Counts

# what an assistant may say
_SAID = ("content", "tool_calls", "function_call", *REASONING_FIELDS)


def note_doubts(
    counts: Counts,
    location: str,
    example: Example,
    sample: Sample,
    tokenizer: Tokenizer,
    train_on: str,
) -> None:
    """Count what is doubtful in a record, and keep the place of the first of each kind."""
    # where all is learned there is more than answers
    answers = _answers(example) if train_on == "completions" else []
    is_empty = [not any(map(_has_words, answer)) for answer in answers]
    if any(is_empty):
        counts.num_with_empty_answer += 1
        counts.num_empty += all(is_empty)
        counts.first_empty_answer = counts.first_empty_answer or location
    if token := _control_token(example, tokenizer):
        counts.num_with_control_token += 1
        counts.first_control_token = counts.first_control_token or f"{token} in {location}"
    if sample.lacks_reasoning:
        counts.num_without_reasoning += 1
        counts.first_without_reasoning = counts.first_without_reasoning or location


def _answers(example: Example) -> list[list[object]]:
    """What each answer that is learned consists of; none where token ids say it."""
    if isinstance(example, Conversation):
        return [_parts_of(example.messages[i]) for i in example.targets]
    if isinstance(example, PromptCompletion):
        return [[example.completion]]
    return [[example.text]] if isinstance(example, Text) else []


def _parts_of(message: Mapping[str, Any]) -> list[object]:
    return [message.get(name) for name in _SAID]


def _has_words(part: object) -> bool:
    return bool(part.strip() if isinstance(part, str) else part)


def _control_token(example: Example, tokenizer: Tokenizer) -> str:
    """The first control token that a message spells out, or nothing. A text without turns may
    have them on purpose."""
    if not isinstance(example, Conversation):
        return ""
    bos = (tokenizer.bos_token,) if tokenizer.bos_token else ()
    pattern = _any_of((*bos, *tokenizer.closing_tokens))
    contents = (message.get("content") or "" for message in example.messages)
    found = next(filter(None, map(pattern.search, contents)), None)
    return found.group() if found else ""


@functools.lru_cache(maxsize=4)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    # of two tokens that begin alike, the longer one
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
