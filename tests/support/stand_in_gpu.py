"""Stands in for what the benchmarks ask of torch.cuda, so that they run on a CPU, tiny.

A graph's capture runs its calls and its replay takes a time that the test sets; nothing is
measured. What this cannot show is how a GPU behaves; that the benchmarks' own lines run, it can.
"""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import measure

L2_BYTES = 1024


class Clock:
    """Milliseconds on the stand-in device, moved by replays."""

    def __init__(self) -> None:
        self.ms = 0.0
        # of the next replays, in turn; the last one stays
        self.replay_ms = [1.0]
        # between two events, whatever is queued
        self.tick_ms = 0.0
        self.num_captures = 0

    def replay(self) -> None:
        self.ms += self.replay_ms[0]
        if len(self.replay_ms) > 1:
            self.replay_ms.pop(0)


def install(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put the stand-in in place for one test."""
    clock = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.ms = 0.0

        def record(self) -> None:
            clock.ms += clock.tick_ms
            self.ms = clock.ms

        def elapsed_time(self, end: "Event") -> float:
            return end.ms - self.ms

    class Graph:
        def replay(self) -> None:
            clock.replay()

    @contextmanager
    def graph(_: Graph, stream: object) -> Any:
        assert stream is not None
        clock.num_captures += 1
        yield

    @contextmanager
    def stream(_: object) -> Any:
        yield

    stand_ins = {
        "synchronize": lambda: None,
        "stream": stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "empty_cache": lambda: None,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=L2_BYTES),
        "mem_get_info": lambda _: (2**30, 2**30),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 164,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(measure, "side_stream", object)
    return clock
