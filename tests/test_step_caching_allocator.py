"""step/caching_allocator.py: blocks, holes and growth as torch's allocator has them.

What is expected was written down by hand from the rules of c10/cuda/CUDACachingAllocator.cpp; on a
GPU the allocator itself is asked.
"""

import random

import pytest
from support.on_gpu import measure

from step.allocations import Event
from step.caching_allocator import CachingAllocator

MIB = 1 << 20
POOL = "pool"


class Memory:
    """Takes and gives back blocks by name."""

    def __init__(self) -> None:
        self.allocator = CachingAllocator()
        self.blocks: dict[str, int] = {}

    def take(self, name: str, num_bytes: int, pool: str = POOL) -> None:
        self.blocks[name] = len(self.blocks)
        self.allocator.run([Event(self.blocks[name], num_bytes, pool)])

    def give(self, *names: str, pool: str = POOL) -> None:
        self.allocator.run(Event(self.blocks[name], 0, pool) for name in names)

    @property
    def reserved(self) -> int:
        return self.allocator.reserved // MIB


def test_segments_grow_in_steps_for_small_and_for_large_blocks() -> None:
    memory = Memory()
    memory.take("a", 1)
    assert memory.reserved == 2
    memory.take("as much as is small", MIB)
    assert memory.reserved == 2
    memory.take("beyond the end", MIB)
    assert memory.reserved == 4
    memory.take("large", MIB + 1)
    assert memory.reserved == 4 + 20
    memory.take("another", 18 * MIB)
    assert memory.reserved == 4 + 20
    memory.take("beyond the step", 512)
    memory.take("much", 45 * MIB)
    # 19 MiB and a bit are taken, 45 more end in the fourth step
    assert memory.reserved == 4 + 80


def test_sizes_are_rounded_up() -> None:
    memory = Memory()
    memory.take("a", 1)
    memory.take("b", 513)
    assert memory.allocator.in_use(POOL) == 512 + 1024
    memory.give("a")
    assert memory.allocator.in_use(POOL) == 1024
    assert memory.allocator.most_in_use(POOL) == 512 + 1024


def test_the_smallest_hole_that_is_large_enough_is_filled() -> None:
    memory = Memory()
    for name, size in zip("abcdefg", (8, 2, 4, 2, 6, 2, 16), strict=True):
        memory.take(name, size * MIB)
    # holes of 8, 4 and 6 MiB in 40
    memory.give("a", "c", "e")
    memory.take("h", 4 * MIB)
    memory.take("i", 6 * MIB)
    memory.take("j", 8 * MIB)
    assert memory.reserved == 40


def test_a_hole_that_is_too_small_stays_one() -> None:
    memory = Memory()
    for name, size in zip("abc", (6, 2, 12), strict=True):
        memory.take(name, size * MIB)
    memory.give("a")
    memory.take("d", 7 * MIB)
    assert memory.allocator.in_use(POOL) == 21 * MIB
    assert memory.reserved == 40


def test_of_equal_holes_the_first_is_filled() -> None:
    memory = Memory()
    for name in "abcde":
        memory.take(name, 4 * MIB)
    memory.give("b", "d")
    memory.take("f", 4 * MIB)
    # a and f lie side by side, d is free: a and f make room for 8
    memory.give("a", "f")
    memory.take("g", 8 * MIB)
    assert memory.reserved == 20


def test_free_neighbours_become_one() -> None:
    memory = Memory()
    for name in "abcde":
        memory.take(name, 4 * MIB)
    memory.give("b", "d", "c")
    memory.take("f", 12 * MIB)
    assert memory.reserved == 20
    memory.give("f", "e", "a")
    memory.take("g", 20 * MIB)
    assert memory.reserved == 20


def test_what_remains_of_a_hole_is_a_hole() -> None:
    memory = Memory()
    for name, size in zip("ab", (12, 8), strict=True):
        memory.take(name, size * MIB)
    memory.give("a")
    memory.take("c", 2 * MIB)
    memory.take("d", 10 * MIB)
    assert memory.reserved == 20


def test_the_free_end_that_can_grow_is_left_alone_where_a_larger_hole_is() -> None:
    memory = Memory()
    for name, size in zip("abc", (12, 2, 2), strict=True):
        memory.take(name, size * MIB)
    # a hole of 12 MiB, and an end of 4: smaller, but it could grow
    memory.give("a")
    memory.take("d", 3 * MIB)
    memory.take("e", 4 * MIB)
    memory.take("f", 5 * MIB)
    assert memory.reserved == 20
    memory.take("g", 4 * MIB)
    assert memory.reserved == 20


def test_a_segment_grows_from_its_free_end() -> None:
    memory = Memory()
    memory.take("a", 16 * MIB)
    # 4 MiB are free at the end
    memory.take("b", 24 * MIB)
    assert memory.reserved == 40


def test_pools_do_not_share() -> None:
    memory = Memory()
    memory.take("a", 20 * MIB)
    memory.give("a")
    memory.take("b", 20 * MIB, "other")
    assert memory.reserved == 40
    assert memory.allocator.in_use("other") == 20 * MIB
    assert memory.allocator.in_use(POOL) == 0


def test_a_pass_that_comes_again_takes_no_more() -> None:
    generator = random.Random(0)
    sizes = [generator.randrange(1, 40 * MIB) for _ in range(200)]
    memory, held = Memory(), []
    for turn in range(2):
        for number, size in enumerate(sizes):
            held.append(f"{turn} {number}")
            memory.take(held[-1], size)
            if number % 3:
                memory.give(held.pop(generator.randrange(len(held))))
        memory.give(*held)
        held.clear()
        generator.seed(0)
        for _ in sizes:
            generator.randrange(1, 40 * MIB)
        if not turn:
            first = memory.reserved
    assert memory.reserved == first
    assert memory.allocator.in_use(POOL) == 0


@pytest.mark.gpu
def test_gpu_allocator_holds_what_the_replay_says() -> None:
    for held, replayed in measure("allocator_on_gpu.py"):
        assert held == replayed
