"""step/allocations.py: what code takes and gives back, in the order in which it does."""

import pytest
import torch
from torch import Tensor

from step.allocations import DEFAULT_POOL, Allocations, Event

META = torch.device("meta")


def empty(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.uint8, device=META)


def taken(block: int, num_bytes: int, pool: str = DEFAULT_POOL) -> Event:
    return Event(block, num_bytes, pool)


def given_back(block: int, pool: str = DEFAULT_POOL) -> Event:
    return Event(block, 0, pool)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_blocks_are_taken_and_given_back_in_order(device: str) -> None:
    with Allocations(device) as recorded:
        a = torch.empty(100, dtype=torch.uint8, device=device)
        b = a + 1
        del a
        c = torch.cat((b, b))
        del b, c
    assert recorded.events == [
        taken(1, 100),
        taken(2, 100),
        given_back(1),
        taken(3, 200),
        given_back(2),
        given_back(3),
    ]


def test_a_view_holds_its_block_and_takes_none() -> None:
    with Allocations() as recorded:
        whole = empty(4, 8)
        part = whole[1:].T
        del whole
        assert recorded.events == [taken(1, 32)]
        copy = part.contiguous()
        del part
    assert recorded.events == [taken(1, 32), taken(2, 24), given_back(1)]
    del copy


def test_what_is_written_in_place_takes_nothing() -> None:
    before = empty(8)
    with Allocations() as recorded:
        a = empty(8)
        a += 1
        torch.add(a, 1, out=a)
        a.copy_(before)
        before.add_(a)
        before[2:].zero_()
    assert recorded.events == [taken(1, 8)]


def test_a_block_that_becomes_larger_in_place_is_another() -> None:
    with Allocations() as recorded:
        a = empty(8)
        a.resize_(64)
        # within what there is
        a.resize_(32)
        result = empty(1)
        torch.add(a, 1, out=result.resize_(0))
        del a
    assert recorded.events == [
        taken(1, 8),
        taken(2, 64),
        given_back(1),
        taken(3, 1),
        taken(4, 32),
        given_back(3),
        given_back(2),
    ]


def test_several_results_are_several_blocks() -> None:
    with Allocations() as recorded:
        values, places = torch.empty(6, 2, device=META).max(dim=1)
        del places
        del values
    assert recorded.events == [
        taken(1, 48),
        taken(2, 24),
        taken(3, 48),
        given_back(1),
        given_back(3),
        given_back(2),
    ]


def test_other_devices_and_empty_tensors_take_nothing() -> None:
    with Allocations() as recorded:
        empty(0)
        torch.empty(8).to(torch.int8)
    assert recorded.events == []


def test_a_block_goes_back_to_the_pool_that_it_is_of() -> None:
    with Allocations() as recorded:
        with recorded.taking_from("passes"):
            a = empty(8)
            with recorded.taking_from("loss"):
                b = empty(4)
        c = empty(2)
        del a, b, c
    assert recorded.events == [
        taken(1, 8, "passes"),
        taken(2, 4, "loss"),
        taken(3, 2),
        given_back(1, "passes"),
        given_back(2, "loss"),
        given_back(3),
    ]


def test_what_goes_after_the_recording_is_recorded_too() -> None:
    with Allocations(num_blocks=7) as recorded:
        a = empty(8)
    b = empty(8)
    del a, b
    assert recorded.events == [taken(8, 8), given_back(8)]
    assert recorded.num_blocks == 8


def test_a_pause_leaves_tensors_out() -> None:
    with Allocations() as recorded:
        with recorded.paused():
            a = empty(8)
        b = empty(4)
        del a
        assert recorded.events == [taken(1, 4)]
    del b
