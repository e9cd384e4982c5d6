"""Moments in pinned host memory, copied through two buffers on the device at every step.

For GPUs whose unified memory cannot be prefetched. The copies have a stream of their own: while the
kernel updates one part, the last is on its way out and the next on its way in.

    copies   | in 0 | in 1 |   | out 0, in 2 | out 1, in 3 | ...
    kernel          | part 0   | part 1      | part 2      | ...
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kernels.adamw_arenas import MOMENT_BLOCK, TILE_BLOCKS, Arenas, Moments

# of a part: 16 MiB of float32 moments, a third of a millisecond at 50 GB/s
PART_BLOCKS = 8192
MIB = 1 << 20


def spans(num_8bit_blocks: int, num_blocks: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut an arena into spans of at most `size` blocks, each of which lies in one region."""
    assert size % TILE_BLOCKS == 0
    for start, stop in ((0, num_8bit_blocks), (num_8bit_blocks, num_blocks)):
        for first in range(start, stop, size):
            yield first, min(first + size, stop)


def moments_of(moments: Moments, first: int, last: int) -> Moments:
    """Cut the moments of blocks first to last, which lie in one region, as views."""
    num_8bit = len(moments.exp_avg_absmax)
    in_8bit = slice(first, last) if last <= num_8bit else slice(0, 0)
    in_32bit = slice(0, 0) if last <= num_8bit else slice(first - num_8bit, last - num_8bit)
    return Moments(
        _elements(moments.exp_avg_codes, in_8bit),
        _elements(moments.exp_avg_sq_codes, in_8bit),
        moments.exp_avg_absmax[in_8bit],
        moments.exp_avg_sq_absmax[in_8bit],
        _elements(moments.exp_avg, in_32bit),
        _elements(moments.exp_avg_sq, in_32bit),
    )


def cut(arenas: Arenas, first: int, last: int, moments: Moments) -> Arenas:
    """Cut blocks first to last out of the arenas, with moments that lie elsewhere."""
    blocks = slice(first, last)
    return replace(
        arenas,
        parameters=_elements(arenas.parameters, blocks),
        gradients=_elements(arenas.gradients, blocks),
        moments=moments,
        group_of_block=arenas.group_of_block[blocks],
    )


def _elements(tensor: Tensor, blocks: slice) -> Tensor:
    return tensor[blocks.start * MOMENT_BLOCK : blocks.stop * MOMENT_BLOCK]


class StagedMemory:
    """A buffer on the host, of which the device sees one part at a time.

    Attributes:
        bytes_copied: to the device so far; as many went back.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffer = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.bytes_copied = 0
        self._device = device
        self._copies = torch.cuda.Stream(device)
        size = min(num_bytes, PART_BLOCKS * MOMENT_BLOCK * 2 * torch.float32.itemsize)
        self._slots = torch.empty(2, size, dtype=torch.uint8, device=device)

    def prefetch(self) -> None:
        # a step hides its copies behind its own kernels
        pass

    def pieces(self, arenas: Arenas) -> Iterator[Arenas]:
        kernels = torch.cuda.current_stream(self._device)
        num_8bit, num_blocks = len(arenas.moments.exp_avg_absmax), len(arenas.group_of_block)
        parts = list(spans(num_8bit, num_blocks, PART_BLOCKS))
        on_host = [moments_of(arenas.moments, *span) for span in parts]
        on_device = [_laid_out(host, self._slots[i % 2]) for i, host in enumerate(on_host)]
        arrivals = [self._copy(on_host[i], on_device[i]) for i in range(min(2, len(parts)))]
        for index, span in enumerate(parts):
            kernels.wait_event(arrivals[index])
            yield cut(arenas, *span, on_device[index])
            self._copies.wait_stream(kernels)
            self._copy(on_device[index], on_host[index])
            # into the slot that the copy before it leaves free
            if index + 2 < len(parts):
                arrivals.append(self._copy(on_host[index + 2], on_device[index + 2]))
        self.bytes_copied += self.buffer.nbytes

    def _copy(self, source: Moments, target: Moments) -> torch.cuda.Event:
        with torch.cuda.stream(self._copies):
            for name, tensor in vars(source).items():
                getattr(target, name).copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._copies)
            return event

    def settled(self) -> Tensor:
        self._copies.synchronize()
        return self.buffer

    def describe(self) -> str:
        moved = f", {self.bytes_copied / MIB:,.1f} MiB copied each way" if self.bytes_copied else ""
        return f"pinned host memory: this GPU cannot prefetch unified memory{moved}"


def _laid_out(moments: Moments, slot: Tensor) -> Moments:
    """Lay tensors of the shapes of `moments` into a slot, one after the other."""
    parts, start = [], 0
    for tensor in vars(moments).values():
        parts.append(slot[start : start + tensor.nbytes].view(tensor.dtype))
        # aligned for the widest load
        start += tensor.nbytes + -tensor.nbytes % 16
    return Moments(*parts)
