"""kernels/capture.py: nothing is collected while launches are recorded, and later as before."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from test_house import name_of, product_files

from kernels.capture import recording
from kernels.constants import constant

GRAPH = cast(torch.cuda.CUDAGraph, object())


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What torch's recording is given, and whether the collector is on where it begins and ends."""
    seen: list[Any] = []

    @contextmanager
    def graph(*given: object, **named: object) -> Iterator[None]:
        seen.append((given, named, gc.isenabled()))
        try:
            yield
        finally:
            seen.append(gc.isenabled())

    monkeypatch.setattr(torch.cuda, "graph", graph)
    was_enabled = gc.isenabled()
    yield seen
    (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize("switch", [gc.enable, gc.disable], ids=["on", "off"])
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_the_collector_waits_for_the_end_of_a_recording(
    given: list[Any], switch: Callable[[], None], fails: bool
) -> None:
    switch()
    before = gc.isenabled()
    try:
        with recording(GRAPH, (1, 2), None):
            assert not gc.isenabled()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert gc.isenabled() == before
    assert given == [((GRAPH,), {"pool": (1, 2), "stream": None}, False), False]


@pytest.mark.usefixtures("given")
def test_garbage_outlives_a_recording() -> None:
    class Held:
        freed = 0

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            Held.freed += 1

    gc.enable()
    gc.collect()
    Held()
    with recording(GRAPH):
        # far more than what starts a collection
        kept = [[] for _ in range(100_000)]
        assert Held.freed == 0
    del kept
    gc.collect()
    assert Held.freed == 1


@pytest.mark.usefixtures("given")
def test_a_recorded_pass_makes_no_tables() -> None:
    @constant
    def table() -> int:
        return 1

    with pytest.raises(RuntimeError, match="tables of kernels must be made"), recording(GRAPH):
        table()
    assert table() == 1


def test_the_product_records_nowhere_else() -> None:
    recorded = [name_of(path) for path in product_files() if "cuda.graph(" in path.read_text()]
    assert recorded == ["kernels/capture.py"]
