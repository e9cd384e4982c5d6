"""What torch's caching allocator would hold of a GPU for a series of events.

    pool "passes"                             grows at its end, in whole steps
    large  | block  | free |   block   | free .................... |
    small  | block | block | free ... |

A replay of `c10/cuda/CUDACachingAllocator.cpp` (torch 2.11) with expandable segments, which
`train.py` asks for, as far as sizes and places go. Each pool of each stream has a segment for small
blocks and one for large blocks. A block is put where it leaves least: into the smallest free block
that is large enough, of several the first; but into the free end of the segment, which can grow,
only where there is no other. What remains stays free, and free neighbours become one. A segment
grows in steps, and never shrinks while a step runs.

So the holes between the tensors of a pass are counted, not estimated.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable

from step.allocations import Event

# what a size is rounded up to
ROUNDING = 512
# the largest block that goes to the segment for small ones
LARGEST_SMALL = 1 << 20
SMALL_STEP, LARGE_STEP = 2 << 20, 20 << 20


class _Segment:
    """A range of addresses from 0 up to an end that grows."""

    def __init__(self, step: int) -> None:
        self.end = 0
        self._step = step
        # (size, start) of what is free, in this order; and the starts and ends of the same
        self._free: list[tuple[int, int]] = []
        self._size_from: dict[int, int] = {}
        self._start_of_end: dict[int, int] = {}
        self._taken: dict[int, tuple[int, int]] = {}

    def take(self, block: int, size: int) -> None:
        place = bisect_left(self._free, (size, 0))
        if place + 1 < len(self._free) and self._is_last(*self._free[place]):
            place += 1
        if place < len(self._free):
            found, start = self._free[place]
        else:
            found, start = self._grow(size)
        self._remove(found, start)
        self._taken[block] = (size, start)
        if found > size:
            self._add(found - size, start + size)

    def give_back(self, block: int) -> None:
        size, start = self._taken.pop(block)
        before = self._start_of_end.get(start)
        if before is not None:
            self._remove(start - before, before)
            size, start = size + start - before, before
        behind = self._size_from.get(start + size)
        if behind is not None:
            self._remove(behind, start + size)
            size += behind
        self._add(size, start)

    def _is_last(self, size: int, start: int) -> bool:
        return start + size == self.end

    def _grow(self, size: int) -> tuple[int, int]:
        """Grow so that the free end has room for a size, and return that end."""
        start = self._start_of_end.get(self.end, self.end)
        if start < self.end:
            self._remove(self.end - start, start)
        self.end += -(-(start + size - self.end) // self._step) * self._step
        self._add(self.end - start, start)
        return self.end - start, start

    def _add(self, size: int, start: int) -> None:
        insort(self._free, (size, start))
        self._size_from[start] = size
        self._start_of_end[start + size] = start

    def _remove(self, size: int, start: int) -> None:
        del self._free[bisect_left(self._free, (size, start))]
        del self._size_from[start]
        del self._start_of_end[start + size]


class CachingAllocator:
    """Takes blocks and gives them back as torch's allocator does."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._segments: dict[tuple[str, bool], _Segment] = {}
        self._in_use: Counter[str] = Counter()
        self._most: Counter[str] = Counter()

    @property
    def reserved(self) -> int:
        """Bytes that torch holds of the device, in blocks or free."""
        return sum(segment.end for segment in self._segments.values())

    def in_use(self, pool: str) -> int:
        """Bytes of a pool's blocks, rounded up as torch counts them."""
        return self._in_use[pool]

    def most_in_use(self, pool: str) -> int:
        """Bytes of a pool's blocks at the most so far."""
        return self._most[pool]

    def run(self, events: Iterable[Event]) -> None:
        """Take and give back, event by event."""
        for block, num_bytes, pool in events:
            size = num_bytes + -num_bytes % ROUNDING if num_bytes else self._sizes.pop(block)
            key = (pool, size <= LARGEST_SMALL)
            if key not in self._segments:
                self._segments[key] = _Segment(SMALL_STEP if key[1] else LARGE_STEP)
            if num_bytes:
                assert block not in self._sizes, block
                self._sizes[block] = size
                self._segments[key].take(block, size)
                self._in_use[pool] += size
                self._most[pool] = max(self._most[pool], self._in_use[pool])
            else:
                self._segments[key].give_back(block)
                self._in_use[pool] -= size
