"""Streams that lag on purpose, so that a wait that is missing shows: a GPU's, and a stand-in's.

The stand-in lets a test of a GPU's streams run anywhere. It keeps time as a GPU does: an operation
that is queued begins when its stream is done with those before it and with what it was told to wait
for, and takes effect at its end; the host goes on at once. What it cannot show is what a driver
does behind a stream's back.
"""

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# some 50 ms of an H200: by far more than Python takes to queue the rest of a test
LAG_CYCLES = 100_000_000


def lag(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Let a stream do nothing for a while, and return the event of its end."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LAG_CYCLES)
    return mark(stream)


def mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return the event of a stream's having done what it was given so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


class _Clock(TorchDispatchMode):
    """The stand-in's time, in cycles, and what is still to take effect.

    What is written in place is queued on the current stream. To read a tensor waits for that stream
    alone, as a copy to the host does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.current: Any = None
        self._effects: list[tuple[int, int, Callable[[], object]]] = []
        self._num_queued = 0
        self._is_running = False

    def queue(self, end: int, effect: Callable[[], object]) -> None:
        self._num_queued += 1
        heapq.heappush(self._effects, (end, self._num_queued, effect))

    def wait_until(self, time: int) -> None:
        """Let everything take effect that ends by then."""
        self.now = max(self.now, time)
        self._is_running = True
        while self._effects and self._effects[0][0] <= self.now:
            heapq.heappop(self._effects)[2]()
        self._is_running = False

    def synchronize(self) -> None:
        self.wait_until(max((end for end, _, _ in self._effects), default=0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        if self._is_running or func.is_view:
            return func(*args, **kwargs)
        if func.overloadpacket.__name__ in ("add_", "copy_", "fill_", "zero_"):
            self.current.queue(1, lambda: func(*args, **kwargs))
            return args[0]
        if any(isinstance(argument, Tensor) for argument in args):
            self.wait_until(self.current.end)
        return func(*args, **kwargs)


@contextmanager
def stand_in_streams() -> Iterator[None]:
    """Let torch.cuda's streams and events be those of a device that is not there."""
    clock = _Clock()

    class Stream:
        cuda_stream = 0

        def __init__(self, device: object = None) -> None:
            self.end = 0

        def queue(self, cycles: int, effect: Callable[[], object] = lambda: None) -> None:
            self.end = max(self.end, clock.now) + cycles
            clock.queue(self.end, effect)

        def wait_event(self, event: "Event") -> None:
            self.end = max(self.end, event.time)

        def wait_stream(self, stream: "Stream") -> None:
            self.end = max(self.end, stream.end)

        def synchronize(self) -> None:
            clock.wait_until(self.end)

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.time = 0

        def record(self, stream: Stream) -> None:
            self.time = max(stream.end, clock.now)

        def query(self) -> bool:
            return self.time <= clock.now

        def elapsed_time(self, end: "Event") -> int:
            return end.time - self.time

    @contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        before, clock.current = clock.current, stream
        yield
        clock.current = before

    clock.current = Stream()
    stand_ins = {
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": lambda device=None: clock.current,
        "synchronize": lambda device=None: clock.synchronize(),
        "mem_get_info": lambda device=None: (1 << 40, 1 << 40),
        "_sleep": lambda cycles: clock.current.queue(cycles),
        "current_device": lambda: 0,
        "device": nullcontext,
    }
    with patch.multiple(torch.cuda, **stand_ins), clock:
        yield
