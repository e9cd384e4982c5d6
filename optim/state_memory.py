"""Where an optimizer's moments are kept: what the optimizer asks of such a place, and the plainest.

The others are `optim/unified_memory.py`, whose pages move between device and host, and
`optim/staged_memory.py` for devices that cannot do that.
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
        """Start bringing the buffer to the device, beside what the device is doing.

        Raises:
            torch.OutOfMemoryError: the device has no room for it; nothing was begun.
        """

    def pieces(self, arenas: Arenas) -> Iterator[Arenas]:
        """Yield the arenas, in one or in several pieces, each when its moments may be used."""
        ...

    def settled(self) -> Tensor:
        """Return the buffer as the steps so far leave it, from where it is best read and written.

        Of unified memory that is the host: a GPU whose memory has ended cannot reach it.
        """
        ...

    def describe(self) -> str:
        """Say where the buffer is, and what was moved."""
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
