"""step/host_stash.py: nobody reads too early or writes too soon, however slow the others are."""

import pytest
import torch
from support.lagging_streams import lag
from torch import Tensor

from step.host_stash import HostStash

SHAPE = (256, 1024)


@pytest.fixture
def device(device_with_streams: torch.device) -> torch.device:
    return device_with_streams


@pytest.fixture
def stash(device: torch.device) -> HostStash:
    """A stash of two layers that has been used: kernels are loaded, which may wait for the GPU."""
    stash = HostStash((0, 1), device)
    zeros = ready(0.0, device)
    stash.reserve(zeros)
    for layer in (0, 1):
        stash.put(layer, zeros.fill_(0.0))
    for layer in (1, 0):
        has_value(bring(stash, layer, zeros), 0.0)
    lag(torch.cuda.current_stream())
    torch.cuda.synchronize()
    return stash


def ready(value: float, device: torch.device) -> Tensor:
    """Make a matrix of one value, and wait for it."""
    matrix = torch.full(SHAPE, value, device=device)
    torch.cuda.synchronize()
    return matrix


def bring(stash: HostStash, layer: int, like: Tensor) -> Tensor:
    stash.settle()
    stash.fetch_next(like)
    return stash.take(layer)


def has_value(matrix: Tensor, value: float) -> bool:
    return bool((matrix == value).all())


def give_as_new(monkeypatch: pytest.MonkeyPatch, place: Tensor) -> None:
    """Let this be the memory that is allocated next."""
    monkeypatch.setattr(torch, "empty", lambda *_, **__: place)


def test_a_matrix_is_put_when_it_is_computed(device: torch.device, stash: HostStash) -> None:
    matrix = ready(0.0, device)
    lag(torch.cuda.current_stream())
    stash.put(0, matrix.fill_(1.0))
    assert has_value(bring(stash, 0, matrix), 1.0)


def test_what_is_let_go_of_is_on_the_host(device: torch.device, stash: HostStash) -> None:
    first, second = ready(1.0, device), ready(2.0, device)
    lag(stash._stream)
    stash.put(0, first)
    lag(stash._stream)
    # lets go of the first; its memory is written to, as whoever is given it next would
    stash.put(1, second)
    first.fill_(0.0)
    stash.settle()
    second.fill_(0.0)
    assert has_value(bring(stash, 1, first), 2.0)
    assert has_value(bring(stash, 0, first), 1.0)


def test_a_matrix_comes_back_when_its_place_is_free(
    device: torch.device, stash: HostStash, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ready(0.0, device)
    stash.put(0, ready(1.0, device))
    stash.settle()
    torch.cuda.synchronize()
    give_as_new(monkeypatch, place)
    lag(torch.cuda.current_stream())
    # the last that its owner before does with it
    place.fill_(0.0)
    stash.fetch_next(place)
    assert has_value(stash.take(0), 1.0)


def test_a_matrix_is_taken_when_it_is_back(
    device: torch.device, stash: HostStash, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ready(0.0, device)
    stash.put(0, ready(1.0, device))
    stash.settle()
    torch.cuda.synchronize()
    give_as_new(monkeypatch, place)
    lag(stash._stream)
    stash.fetch_next(place)
    assert has_value(stash.take(0), 1.0)
