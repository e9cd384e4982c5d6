"""How many tokens an answer may have, and a prompt and its answer together."""

from argparse import Namespace
from collections.abc import Sequence

from answering.flags import DEFAULT_NEW_TOKENS
from answering.prompts import Prompt

# of a conversation, where --max-length does not say it: 1 GiB of keys and values for Llama-3-8B
CHAT_LENGTH = 8192


def choose_lengths(
    given: Namespace, prompts: Sequence[tuple[Prompt, list[int]]], positions: int
) -> tuple[int, int]:
    """Choose the most tokens of an answer, and of the longest prompt and its answer together.

    Both are within the model's positions. In a conversation the answer is as long as there is room
    when its turn comes.

    Args:
        positions: of the model.

    Raises:
        ValueError: a prompt has no token or leaves no room for an answer, or --max-length is more
            than the positions.
    """
    if given.max_length > positions:
        raise ValueError(
            f"--max-length must be at most the model's {positions:,} positions: got "
            f"{given.max_length:,}"
        )
    limit = given.max_length or (min(positions, CHAT_LENGTH) if given.chat else positions)
    prompt, ids = max(prompts, key=lambda each: len(each[1]))
    if not all(len(ids) for _, ids in prompts):
        raise ValueError("a prompt must hold at least one token: got none")
    if len(ids) >= limit:
        name = "--max-length" if given.max_length else "the model's positions"
        raise ValueError(
            f"{prompt.where}: a prompt must leave room for an answer: got {len(ids):,} tokens of "
            f"at most {limit:,} ({name}); shorten it"
        )
    max_new_tokens = given.max_new_tokens or DEFAULT_NEW_TOKENS
    if given.chat:
        return max_new_tokens, limit
    max_new_tokens = min(max_new_tokens, limit - len(ids))
    return max_new_tokens, len(ids) + max_new_tokens
