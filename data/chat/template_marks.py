"""Signs of a chat template of another model: marks that are no tokens, untrained tokens, no BOS.

ChatML on a base model whose vocabulary lacks it makes six or more tokens of `<|im_start|>`, in
every turn, and leaves the BOS away that the tokenizer sets in front of a text. A base model may
also have the tokens of its chat variant, and rows of the embeddings for them that were never
trained. Some models are trained with such marks on purpose (Zephyr's `<|user|>` is no token), so
these signs are warnings and no errors.
"""

import re
from collections.abc import Callable, Collection, Iterator
from typing import TypeAlias

from data.chat.template import TEMPLATE_ERRORS, ChatTemplate
from data.tokenizer import Tokenizer
from data.tokens.pieces import Counts
from foreign.guest import in_guest

# <|im_start|>, DeepSeek's <\uff5cUser\uff5c>, <start_of_turn>, and [AVAILABLE_TOOLS]; [INST] is
# plain text to Llama 2 and to the first Mistral
_MARK = re.compile(
    r"<[|\uff5c][^<>|\uff5c\s'\"{}]+[|\uff5c]>|<[a-z]+_of_[a-z]+>|\[/?[A-Z]+_[A-Z]+\]"
)
_CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

# given the ids of some tokens and of all added tokens, finds which of the first the model was never
# trained on: rows of the embeddings are compared
FindUntrained: TypeAlias = Callable[[Collection[int], Collection[int]], set[int]]


def marks_without_token(template: ChatTemplate, tokenizer: Tokenizer) -> dict[str, int]:
    """The marks in a template's text that are several tokens, and how many, in their order."""
    marks = dict.fromkeys(_MARK.findall(template.text))

    def count() -> dict[str, int]:
        return {mark: len(tokenizer.encode(mark, add_special_tokens=False)) for mark in marks}

    sizes = in_guest(count, f"{template.name}, whose marks are tokenized,")
    return {mark: size for mark, size in sizes.items() if size > 1}


def lacks_bos(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether a template begins conversations without the BOS that the tokenizer begins a text
    with."""
    bos = tokenizer.bos_token
    if not tokenizer.adds_bos or bos is None:
        return False

    def begins_without() -> bool:
        seen = template.variables(tools=None, variables=None, now=None)
        try:
            return not template.attempt(_CONVERSATION, seen).startswith(bos)
        except TEMPLATE_ERRORS:
            # it wants other messages than these: is BOS named in it at all?
            return "bos_token" not in template.text and bos not in template.text

    return in_guest(begins_without, f"{template.name}, which writes a conversation,")


def marks_written(template: ChatTemplate, tokenizer: Tokenizer) -> dict[str, int]:
    """The added tokens that a template writes, without BOS, and their ids."""
    named = {t for name, t in tokenizer.special_tokens.items() if name in template.text}
    return {
        token: i
        for token, i in tokenizer.added_ids.items()
        if (token in template.text or token in named) and token != tokenizer.bos_token
    }


def warnings(counts: Counts, tokenizer: Tokenizer, find_untrained: FindUntrained) -> Iterator[str]:
    """The warnings about each chat template that wrote records."""
    with_tools = counts.num_rendered_with_tools
    used: dict[str, tuple[ChatTemplate, int]] = {}
    for has_tools, number in ((False, counts.num_rendered - with_tools), (True, with_tools)):
        if number:
            template = tokenizer.chat_template(has_tools)
            used[template.name] = template, number + used.get(template.name, (template, 0))[1]
    for name, (template, number) in used.items():
        if marks := marks_without_token(template, tokenizer):
            sizes = ", ".join(f"{mark} is {size} tokens" for mark, size in marks.items())
            yield (
                f"warning: {name} has marks that are no tokens of this tokenizer: {sizes}; "
                f"records written with it: {number:,}; it may be another model's"
            )
        if lacks_bos(template, tokenizer):
            yield (
                f"warning: {name} does not begin with {tokenizer.bos_token}, with which the "
                f"tokenizer begins a text; records written with it: {number:,}; if the model was "
                "trained with it, give a copy of the template that begins with {{- bos_token }} "
                "(--chat-template)"
            )
        written = marks_written(template, tokenizer)
        untrained = find_untrained(written.values(), tokenizer.added_ids.values())
        if marks := [mark for mark, i in written.items() if i in untrained]:
            yield (
                f"warning: {name} writes tokens that the model was never trained on, whose rows of "
                f"the embeddings or the head are zero or equal: {', '.join(marks)}; records "
                f"written with it: {number:,}; an adapter leaves these rows as they are: take the "
                "model's chat variant, or a template of tokens that it knows"
            )
