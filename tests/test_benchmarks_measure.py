"""benchmarks/measure.py: what is rotated, repeated and divided, on a stand-in GPU."""

import pytest
import torch
from support.stand_in_gpu import L2_BYTES, Clock, install

from benchmarks.measure import (
    BUDGET_MS,
    FEWEST_REPLAYS,
    MOST_CALLS,
    MOST_REPLAYS,
    MOST_SETS,
    SHORTEST_REPLAY_MS,
    Operation,
    copy_gbps,
    matmul_tflops,
    measure,
    measure_in_turns,
    num_input_sets,
    peak_bytes,
    plan,
    quantiles,
)

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return install(monkeypatch)


def test_quantiles_are_interpolated() -> None:
    assert quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    assert quantiles([4.0, 1.0, 2.0, 3.0]) == pytest.approx((1.6, 2.5, 3.4))


@pytest.mark.parametrize("num_calls", [1, 2, 48, 64, 200])
@pytest.mark.parametrize("rotation_ms", [0.003, 0.09, 1.0, 7.3, 400.0])
def test_a_plan_keeps_its_bounds(rotation_ms: float, num_calls: int) -> None:
    repeats, replays = plan(rotation_ms, num_calls)
    assert repeats == 1 or repeats * num_calls <= MOST_CALLS
    if rotation_ms < SHORTEST_REPLAY_MS and (repeats + 1) * num_calls <= MOST_CALLS:
        assert repeats * rotation_ms >= SHORTEST_REPLAY_MS
    assert FEWEST_REPLAYS <= replays <= MOST_REPLAYS
    if replays > FEWEST_REPLAYS:
        assert replays * repeats * rotation_ms <= BUDGET_MS


def test_a_replays_time_is_divided_by_its_calls(clock: Clock) -> None:
    made = []
    calls = [lambda i=i: made.append(i) for i in range(4)]
    # what goes before each timing; three replays of one rotation, one to warm the longer graph up,
    # then what counts
    clock.replay_ms = [8.0, 9.0, 9.0, 0.25, 8.0, 9.0, 8.0, 1.6]
    assert measure(calls) == pytest.approx((0.1, 0.1, 0.1))
    # 0.25 ms a rotation: four of them make a replay
    assert made == [0, 1, 2, 3] * (1 + 1 + 4)
    assert clock.num_captures == 2


def test_a_long_rotation_is_captured_once(clock: Clock) -> None:
    clock.replay_ms = [8.0]
    assert measure([lambda: None] * 2) == (4.0, 4.0, 4.0)
    assert clock.num_captures == 1


def test_results_live_for_one_rotation(clock: Clock) -> None:
    class Result:
        alive = 0

        def __init__(self) -> None:
            Result.alive += 1
            most.append(Result.alive)

        def __del__(self) -> None:
            Result.alive -= 1

    most: list[int] = []
    clock.replay_ms = [0.1]
    measure([Result] * 3)
    # the fourth is made before the first is dropped, so that it lies elsewhere
    assert max(most) == 4
    assert Result.alive == 0


def test_calls_that_cannot_be_captured_are_issued(clock: Clock) -> None:
    def call() -> None:
        clock.ms += 0.5

    assert measure([call, call], captured=False) == (0.5, 0.5, 0.5)
    assert clock.num_captures == 0


def test_operations_take_turns(clock: Clock) -> None:
    order = []

    def operation(name: str, ms: float) -> Operation:
        def call() -> None:
            order.append(name)
            clock.ms += ms

        return Operation([call], captured=False)

    slow, fast = measure_in_turns([operation("slow", 9.0), operation("fast", 6.0)])
    assert (slow.ms_p50, fast.ms_p50) == (9.0, 6.0)
    # each was run once, not timed once and timed three times before; the first slow one of a turn
    # is not timed
    turns = order[10 : 10 + 3 * FEWEST_REPLAYS - 3]
    assert turns == ["slow", "slow", "fast"] * (FEWEST_REPLAYS - 1)


def test_a_rotation_exceeds_twice_the_cache(clock: Clock) -> None:
    for moved in (64, 100, 512, 1000):
        assert moved * num_input_sets(moved, 1, CPU) > 2 * L2_BYTES
        assert moved * (num_input_sets(moved, 1, CPU) - 1) <= 2 * L2_BYTES or moved > L2_BYTES
    assert num_input_sets(10 * L2_BYTES, 1, CPU) == 2
    assert num_input_sets(1, 1, CPU) == MOST_SETS
    # half of the free memory holds three sets
    assert num_input_sets(64, 2**30 / 2 / 3.5, CPU) == 3
    with pytest.raises(RuntimeError, match=r"2 sets of 0\.5 GiB in half of the free device memory"):
        num_input_sets(64, 2**29, CPU)


def test_peak_is_above_what_was_there(clock: Clock) -> None:
    assert peak_bytes(lambda: None) == 64


def test_rates_count_reads_and_writes_and_two_operations_a_product(clock: Clock) -> None:
    clock.tick_ms = 2.0
    # 1 kB read and 1 kB written in 2 ms; 2 * 8^3 operations in 2 ms
    assert copy_gbps(CPU, 1000) == pytest.approx(1e-3)
    assert matmul_tflops(CPU, 8) == pytest.approx(2 * 8**3 / 2e-3 / 1e12)
    assert clock.num_captures == 0
