"""Greedy text from a model: the most probable token, again and again."""

from collections.abc import Collection

import torch
from torch import Tensor

from llama.cache import KeyValueCache
from llama.model import Llama


@torch.no_grad()
def most_probable(model: Llama, ids: Tensor, cache: KeyValueCache) -> Tensor:  # (1, T) -> ()
    """Find the most probable token after the cached tokens and the given ones."""
    hidden = model.hidden_states(ids, cache)[:, -1]
    # a cap on logits leaves their order as it is
    return (hidden @ model.head.T).argmax()


@torch.no_grad()
def generate_greedy(
    model: Llama, prompt_ids: list[int], max_new_tokens: int, stop_ids: Collection[int]
) -> list[int]:
    """Continue a prompt by the most probable token until one of `stop_ids`, which is not returned.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt_ids:
        raise ValueError("a prompt must hold at least one token: got none")
    cache = KeyValueCache()
    new_ids: list[int] = []
    ids = torch.tensor([prompt_ids], device=model.device)
    while len(new_ids) < max_new_tokens:
        next_id = int(most_probable(model, ids, cache))
        if next_id in stop_ids:
            break
        new_ids.append(next_id)
        next_ids = [next_id]
        if model.starts_anew(cache.num_tokens, cache.num_tokens + 1):
            cache, next_ids = KeyValueCache(), prompt_ids + new_ids
        ids = torch.tensor([next_ids], device=model.device)
    return new_ids
