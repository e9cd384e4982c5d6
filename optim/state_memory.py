"""Where an optimizer's moments are kept: the interface of such a place, and ordinary memory.

The other places are `optim/unified_memory.py`, whose pages move between device and host, and
`optim/staged_memory.py` for devices whose pages cannot.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from kernels.adamw_arenas import Arenas


class StateMemory(Protocol):
    """One buffer, and its way to the device and back around each step."""

    buffer: Tensor  # (num_bytes,) uint8, zeros at first, aligned to 256 bytes

    def prefetch(self) -> None:
        """Start moving the buffer to the device, beside the device's other work.

        Raises:
            torch.OutOfMemoryError: the device has no room for it; nothing was begun.
        """

    def pieces(self, arenas: Arenas) -> Iterator[Arenas]:
        """Yield the arenas, in one or in several pieces, each when its moments may be used."""
        ...

    def settled(self) -> Tensor:
        """Return the buffer after all steps so far, on the side where it is best read and written.

        For unified memory that is the host: a GPU without free memory cannot reach the buffer.
        """
        ...

    def describe(self) -> str:
        """Say where the buffer is, and how many bytes were moved."""
        ...


class OrdinaryMemory:
    """A buffer that stays where it is."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def prefetch(self) -> None:
        pass

    def pieces(self, arenas: Arenas) -> Iterator[Arenas]:
        yield arenas

    def settled(self) -> Tensor:
        return self.buffer

    def describe(self) -> str:
        return f"ordinary memory of {self.buffer.device}"
