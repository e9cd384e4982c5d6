"""Memory that a room allocated and has not written yet reads as NaN, or as 0xA5 bytes.

torch.empty often returns zeros, so code that forgets to write an element passes its tests by luck.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

# `with torch.device("meta")` remembers at its first use which functions allocate: asked now, it
# knows them as they are, and those that are poisoned call them
_device_constructors()

ROOMS = {"nf4", "kernels", "lora", "optim", "llama", "checkpoint", "step", "data", "run", "prepare"}
DOORS = {"train", "generate", "merge", "quantize"}

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)


def poison_(tensor: Tensor) -> Tensor:
    """Fill a tensor with NaN, or with the byte 0xA5 if its type has no NaN; one on the meta device
    has no memory to fill."""
    if tensor.is_meta:
        return tensor
    dtype = tensor.dtype
    value: float | int | bool = float("nan")
    if dtype == torch.bool:
        value = True
    elif not (dtype.is_floating_point or dtype.is_complex):
        value = int.from_bytes(b"\xa5" * dtype.itemsize, sys.byteorder, signed=dtype.is_signed)
    with torch.no_grad():
        return tensor.fill_(value)


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison_(tensor) if caller.partition(".")[0] in ROOMS | DOORS else tensor

    return allocate_poisoned


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Poison what the rooms allocate, as long as the context lasts."""
    with ExitStack() as stack:
        for owner, name in ALLOCATORS:
            allocate = getattr(owner, name)
            stack.enter_context(patch.object(owner, name, _poisoning(allocate)))
        yield
