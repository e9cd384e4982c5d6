"""Layer inputs that wait for the backward pass in pinned host memory.

    compute   | layer 0 | layer 1 | layer 2 | ... | layer 2' | layer 1' | layer 0' |
    copies      ........ | put 0   | put 1   | ... | fetch 1  | fetch 0  |

Copies have a stream of their own beside the compute, so they cost no time while a layer takes
longer than its input takes over the bus: 64 MiB of an 8B layer take 1.3 ms, the layer 5. What is
put may be captured in one CUDA graph and fetched in another.

On the meta device there is nothing to copy, and nothing is pinned: matrices are taken and given
back as on a GPU.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Copy(NamedTuple):
    """A matrix on the device, and the event after the copy from or to it."""

    matrix: Tensor
    done: torch.cuda.Event | None  # None: there was nothing to copy


class HostStash:
    """Keeps a matrix for each of some layers on the host: last in, first out.

    Attributes:
        layers: the layers that may put one.
    """

    def __init__(self, layers: Sequence[int], device: torch.device) -> None:
        self.layers = tuple(layers)
        self._host: dict[int, Tensor] = {}
        self._has_copies = device.type != "meta"
        if self._has_copies:
            self._stream = torch.cuda.Stream(device)
        self._leaving: deque[_Copy] = deque()
        self._on_host: list[int] = []
        self._coming: dict[int, _Copy] = {}

    def reserve(self, like: Tensor) -> None:
        """Pin room for matrices as large as `like`, where there is less."""
        if not self._has_copies:
            return
        if not self._host or next(iter(self._host.values())).numel() < like.numel():
            self._host = {
                layer: torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)
                for layer in self.layers
            }

    def held(self) -> list[Tensor]:
        """The host memory, for those who capture: a graph holds its address only."""
        return list(self._host.values())

    def _room(self, layer: int, like: Tensor) -> Tensor:
        return self._host[layer][: like.numel()].view(like.shape)

    def _start(self, layer: int, matrix: Tensor, is_leaving: bool) -> _Copy:
        """Start copying a matrix out or back, after what the current stream was given so far."""
        if not self._has_copies:
            return _Copy(matrix, None)
        room = self._room(layer, matrix)
        target, source = (room, matrix) if is_leaving else (matrix, room)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        done = torch.cuda.Event()
        done.record(self._stream)
        return _Copy(matrix, done)

    def put(self, layer: int, matrix: Tensor) -> None:
        """Start copying a matrix out; it is held until the copy is done."""
        self._leaving.append(self._start(layer, matrix, is_leaving=True))
        self._on_host.append(layer)
        # the one before has had a layer's time
        if len(self._leaving) > 1:
            self._let_go()

    def _let_go(self) -> None:
        _await(self._leaving.popleft())

    def settle(self) -> None:
        """Let what follows on this stream come after every copy out."""
        while self._leaving:
            self._let_go()

    def abandon(self) -> None:
        """Let what follows on this stream come after every copy of a pass that has failed.

        A capture can end only then.
        """
        self.settle()
        while self._coming:
            _, copy = self._coming.popitem()
            _await(copy)
        self._on_host.clear()

    def fetch_next(self, like: Tensor) -> None:
        """Start copying the matrix that was put last back, if one is left; its shape is like's."""
        if not self._on_host:
            return
        layer = self._on_host.pop()
        # memory of the current stream, where something may still use it
        matrix = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self._coming[layer] = self._start(layer, matrix, is_leaving=False)

    def take(self, layer: int) -> Tensor:
        """Return a layer's matrix, which `fetch_next` has begun to bring."""
        copy = self._coming.pop(layer)
        _await(copy)
        return copy.matrix


def _await(copy: _Copy) -> None:
    """Let what follows on the current stream come after a copy."""
    if copy.done is not None:
        torch.cuda.current_stream().wait_event(copy.done)
