"""The shapes of batches that were captured as CUDA graphs, and the memory that the graphs hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# of the shapes that are captured; each holds its launches, some 10 MB
MAX_GRAPHS = 32


@dataclass(frozen=True)
class Captured:
    """The graphs of a shape, and the memory that they read and write.

    Attributes:
        given: what a batch is copied to before its graphs are replayed.
        hidden: (M, D), of the step's buffer.
        host: pinned memory of the stash.
        backward: None where the shape is evaluated.
    """

    given: tuple[Tensor, ...]  # (B, T) each
    hidden: Tensor
    host: list[Tensor]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph | None

    def take(self, given: Sequence[Tensor]) -> None:
        """Copy a batch to where the graphs read it."""
        for place, tensor in zip(self.given, given, strict=True):
            place.copy_(tensor)


class CapturedShapes:
    """What is known of the shapes that came."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()
        self._captured: dict[tuple[int, ...], Captured] = {}

    def find(
        self, given: Sequence[Tensor], capture: Callable[[Sequence[Tensor]], Captured]
    ) -> Captured | None:
        """Find the graphs of a batch's shape, recording them when it comes for the second time.

        By then its kernels are compiled and all constants are on the device.
        """
        shape = (len(given), *given[0].shape)
        is_known = shape in self._seen
        self._seen.add(shape)
        if is_known and shape not in self._captured and len(self._captured) < MAX_GRAPHS:
            self._captured[shape] = capture([torch.zeros_like(x) for x in given])
        return self._captured.get(shape)
