"""Time an operation on a GPU: rotated inputs, one captured graph, quantiles over its replays.

A kernel of 10 us ends before Python has queued the next, so calls that can be captured are put into
one CUDA graph, and what is timed is its replay. Inputs and outputs rotate past the L2 cache: a call
finds there nothing that it reads, nor the lines that it writes. What a call allocates and frees
within (a temporary) does come back at the same address, as it does in training.

Operations that are compared take turns, replay by replay.

What is left out, against `triton.testing.do_bench`: no cache is flushed between calls, because a
rotation needs no flush, and nothing is timed one call at a time.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

# a replay shorter than this is lengthened, within MOST_CALLS: events tick in half microseconds
SHORTEST_REPLAY_MS = 1.0
MOST_CALLS = 128
# how long one measurement replays, within these bounds
BUDGET_MS = 40.0
FEWEST_REPLAYS, MOST_REPLAYS = 7, 30
# input sets of one operation, whose bytes together must exceed the L2 cache this many times
CACHES_PER_ROTATION = 2
FEWEST_SETS, MOST_SETS = 2, 64

Call = Callable[[], Any]


class Quantiles(NamedTuple):
    """Milliseconds of one call: the fast fifth, the median, the slow fifth."""

    ms_p20: float
    ms_p50: float
    ms_p80: float


class Plan(NamedTuple):
    """How often a rotation is repeated within a replay, and how often that is replayed."""

    repeats: int
    replays: int


def quantiles(times_ms: Sequence[float]) -> Quantiles:
    """Take the 20th, 50th and 80th percentile, interpolated between neighbours."""
    fifths = statistics.quantiles(times_ms, n=5, method="inclusive")
    return Quantiles(fifths[0], statistics.median(times_ms), fifths[3])


def plan(rotation_ms: float, num_calls: int) -> Plan:
    """Plan a measurement of `num_calls` calls that take `rotation_ms` together."""
    repeats = min(math.ceil(SHORTEST_REPLAY_MS / rotation_ms), MOST_CALLS // num_calls)
    repeats = max(repeats, 1)
    replays = int(BUDGET_MS / (rotation_ms * repeats))
    return Plan(repeats, min(max(replays, FEWEST_REPLAYS), MOST_REPLAYS))


def num_input_sets(moved_bytes: float, resident_bytes: float, device: torch.device) -> int:
    """Count the input sets that a rotation past the L2 cache needs.

    Args:
        moved_bytes: what one call reads and writes.
        resident_bytes: what one set and its result occupy.

    Raises:
        RuntimeError: the device has no room for two sets.
    """
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = int(CACHES_PER_ROTATION * l2_bytes // moved_bytes) + 1
    torch.cuda.empty_cache()
    # the other half is for temporaries and for what the allocator cannot reuse
    affordable = int(torch.cuda.mem_get_info(device)[0] / 2 // resident_bytes)
    if affordable < FEWEST_SETS:
        raise RuntimeError(
            f"rotating inputs needs {FEWEST_SETS} sets of {resident_bytes / 2**30:.1f} GiB in half "
            "of the free device memory: got room for fewer; end what else runs on the GPU"
        )
    return min(max(wanted, FEWEST_SETS), MOST_SETS, affordable)


@cache
def side_stream() -> torch.cuda.Stream:
    """Make the stream on which operations are captured and timed."""
    # one for the process: cuBLAS keeps a workspace for every stream that it has seen
    return torch.cuda.Stream()


def _run(calls: Sequence[Call], repeats: int = 1) -> None:
    # results live until the rotation comes round, so that they rotate too
    results = deque(maxlen=len(calls))
    for _ in range(repeats):
        for call in calls:
            results.append(call())


def _replay_of(calls: Sequence[Call], repeats: int, captured: bool) -> Call:
    if not captured:
        return lambda: _run(calls, repeats)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side_stream()):
        _run(calls, repeats)
    return graph.replay


class _Prepared(NamedTuple):
    """An operation ready to be timed: what a replay runs, how many calls that is, how often."""

    replay: Call
    num_calls: int
    replays: int


def _times(replays: Sequence[Call]) -> list[float]:
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in replays
    ]
    # all are queued before one is awaited, so that no replay waits for Python; what is timed first
    # would, between its events, on an idle GPU
    replays[0]()
    for replay, (start, end) in zip(replays, events, strict=True):
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _prepare(calls: Sequence[Call], captured: bool) -> _Prepared:
    # compiles, loads modules, makes workspaces
    _run(calls)
    replay = _replay_of(calls, 1, captured)
    rotation_ms = _times([replay] * 3)[-1]
    repeats, replays = plan(rotation_ms, len(calls))
    if repeats > 1:
        replay = _replay_of(calls, repeats, captured)
        _times([replay])
    return _Prepared(replay, repeats * len(calls), replays)


class Operation(NamedTuple):
    """One operation, as calls over different input sets.

    `captured`: replay the calls from a CUDA graph. Otherwise Python issues each, as a user's
    program would: for an operation that copies from the host or waits for the device.
    """

    calls: Sequence[Call]
    captured: bool = True


def measure_in_turns(operations: Sequence[Operation]) -> list[Quantiles]:
    """Time one call of each operation, a replay of each in turn: a GPU that slows down as it warms
    up slows all of them down alike.

    Note:
        Synchronizes, and runs the calls some hundreds of times.
    """
    torch.cuda.synchronize()
    with torch.cuda.stream(side_stream()):
        prepared = [_prepare(operation.calls, operation.captured) for operation in operations]
        times: list[list[float]] = [[] for _ in prepared]
        for turn in range(max(one.replays for one in prepared)):
            playing = [index for index, one in enumerate(prepared) if turn < one.replays]
            took = _times([prepared[index].replay for index in playing])
            for index, ms in zip(playing, took, strict=True):
                times[index].append(ms / prepared[index].num_calls)
    return [quantiles(ms) for ms in times]


def measure(calls: Sequence[Call], captured: bool = True) -> Quantiles:
    """Time one call of one operation; see `measure_in_turns`."""
    return measure_in_turns([Operation(calls, captured)])[0]


def peak_bytes(call: Call) -> int:
    """Measure the device memory that a call takes at most: its result and its temporaries."""
    # the first call of an operation makes what later ones share: modules, tables, workspaces
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_gbps(device: torch.device, num_bytes: int = 2**30) -> float:
    """Measure what a device-to-device copy moves, bytes read and bytes written, in GB/s."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_(256)
    target = torch.empty_like(source)
    # issued, as a program would: a graph may leave a copy to another engine
    ms = measure([lambda: target.copy_(source)], captured=False).ms_p50
    return 2 * num_bytes / ms / 1e6


def matmul_tflops(device: torch.device, size: int = 8192) -> float:
    """Measure the rate of a large square bf16 product, on random numbers, in TFLOP/s."""
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    b = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    ms = measure([lambda: a @ b], captured=False).ms_p50
    return 2 * size**3 / ms / 1e9
