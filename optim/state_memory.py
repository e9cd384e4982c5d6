"""Where an optimizer's moments are kept: what the optimizer asks of such a place, and the plainest.

The others are `optim/unified_memory.py`, whose pages move between device and host, and
`optim/staged_memory.py` for devices that cannot do that.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from kernels.adamw import Arenas


class StateMemory(Protocol):
    """One buffer, and its way to the device and back around each step."""

    buffer: Tensor  # (num_bytes,) uint8, zeros at first, aligned to 256 bytes

    def prefetch(self) -> None:
        """Start bringing the buffer to the device, beside what the device is doing."""

    def pieces(self, arenas: Arenas) -> Iterator[Arenas]:
        """Yield the arenas, in one or in several pieces, each when its moments may be used."""
        ...

    def settle(self) -> None:
        """Wait until the buffer holds what the steps so far left there."""

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

    def settle(self) -> None:
        pass

    def describe(self) -> str:
        return f"ordinary memory of {self.buffer.device}"
