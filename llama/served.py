"""A model as it will be served: with base products in the dtype of the passes.

Whoever loads an adapter multiplies in 16 bits, whatever its training did. So an evaluation or an
answer in the middle of a training in 8 bits says what the adapter will do there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from llama.model import Llama


@contextmanager
def as_served(model: Llama) -> Iterator[None]:
    """Let no base product be of 8 bits, for as long as this lasts.

    Note:
        Weights that stay expanded in 8 bits stay, and passes expand them in 16 bits beside that;
        those that stay in 16 bits for the forward pass serve here too.
    """
    groups = [group for _, group in model.groups() if group.fp8_scale is not None]
    kept = [(group.fp8_scale, group.expanded) for group in groups]
    for group in groups:
        group.fp8_scale = None
        if group.forward_format is not None:
            group.expanded = None
    try:
        yield
    finally:
        for group, (scale, expanded) in zip(groups, kept, strict=True):
            group.fp8_scale, group.expanded = scale, expanded
