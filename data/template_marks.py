"""What a chat template writes and the tokenizer does not know: a template of another model.

ChatML on a base model whose vocabulary lacks it makes six or more tokens of `<|im_start|>`, in
every turn, and leaves the BOS away that the tokenizer sets in front of a text. Some models are
trained so on purpose (Zephyr's `<|user|>` is no token), so both are warnings.
"""

import re
from collections.abc import Iterator

from data.chat_template import ChatTemplate
from data.tokenization import Counts
from data.tokenizer import Tokenizer

# <|im_start|>, DeepSeek's <\uff5cUser\uff5c>, and <start_of_turn>
_MARK = re.compile(r"<[|\uff5c][^<>|\uff5c\s'\"{}]+[|\uff5c]>|<[a-z]+_of_[a-z]+>")


def marks_without_token(template: ChatTemplate, tokenizer: Tokenizer) -> dict[str, int]:
    """The marks in a template's text that are several tokens, and how many, in their order."""
    marks = dict.fromkeys(_MARK.findall(template.text))
    sizes = {mark: len(tokenizer.encode(mark, add_special_tokens=False)) for mark in marks}
    return {mark: size for mark, size in sizes.items() if size > 1}


def lacks_bos(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether a template never writes the BOS that the tokenizer begins a text with."""
    if not tokenizer.adds_bos or tokenizer.bos_token is None:
        return False
    return "bos_token" not in template.text and tokenizer.bos_token not in template.text


def warnings(counts: Counts, tokenizer: Tokenizer) -> Iterator[str]:
    """Say of each chat template that wrote records what shows that it is another model's."""
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
                f"warning: {name} does not write {tokenizer.bos_token}, with which the tokenizer "
                f"begins a text; records written with it: {number:,}"
            )
