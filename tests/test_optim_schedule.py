"""optim/schedule.py and optim/loss_scale.py."""

import math

import pytest
import torch

from optim.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE, LossScale
from optim.schedule import SCHEDULES, learning_rate_at, num_warmup_steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_to_the_rate_without_a_wasted_step(schedule: str) -> None:
    rates = [learning_rate_at(step, 20, 4, 1.0, schedule) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert all(0 < rate <= 1 for rate in rates)


def test_decay_is_transformers() -> None:
    # transformers.get_{linear,cosine}_schedule_with_warmup's factors at step 12 of 20, 4 of warm-up
    assert learning_rate_at(12, 20, 4, 2.0, "constant") == 2.0
    assert learning_rate_at(12, 20, 4, 2.0, "linear") == 2.0 * (20 - 12) / (20 - 4)
    expected = 2.0 * 0.5 * (1 + math.cos(math.pi * 8 / 16))
    assert learning_rate_at(12, 20, 4, 2.0, "cosine") == pytest.approx(expected, rel=1e-15)


def test_warm_up_is_rounded_up_and_may_be_all_or_nothing() -> None:
    assert [num_warmup_steps(10, ratio) for ratio in (0.0, 0.01, 0.3, 1.0)] == [0, 1, 3, 10]
    assert num_warmup_steps(10, 0.0, 4) == 4
    assert learning_rate_at(9, 10, 10, 1.0, "cosine") == 1.0
    assert learning_rate_at(0, 1, 0, 1.0, "linear") == 1.0


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="cosine, linear, constant: got 'polynomial'"):
        learning_rate_at(5, 10, 0, 1.0, "polynomial")


CPU = torch.device("cpu")
FINITE, OVERFLOWN = torch.tensor(3.0), torch.tensor(float("inf"))


def test_an_overflow_halves_the_scale_and_good_steps_double_it() -> None:
    scale = LossScale.for_dtype(torch.float16, CPU)
    assert scale.state() == (INITIAL_SCALE, 0)
    scale.update(FINITE)
    assert scale.state() == (INITIAL_SCALE, 1)
    scale.update(OVERFLOWN)
    assert scale.state() == (INITIAL_SCALE / 2, 0)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.update(FINITE)
    assert scale.state() == (INITIAL_SCALE / 2, GROWTH_INTERVAL - 1)
    scale.update(FINITE)
    assert scale.state() == (INITIAL_SCALE, 0)
    scale.update(torch.tensor(float("nan")))
    assert scale.state() == (INITIAL_SCALE / 2, 0)


def test_a_restored_scale_goes_on_where_it_was() -> None:
    scale = LossScale.for_dtype(torch.float16, CPU)
    scale.load_state(512.0, GROWTH_INTERVAL - 1)
    scale.update(FINITE)
    assert scale.state() == (1024.0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_are_not_scaled(dtype: torch.dtype) -> None:
    scale = LossScale.for_dtype(dtype, CPU)
    scale.update(OVERFLOWN)
    assert scale.state() == (1.0, 0)
