"""optim/loss_scale.py: halved at an overflow, doubled after a long time without one."""

import pytest
import torch

from optim import loss_scale
from optim.loss_scale import INITIAL_SCALE, LossScale

CPU = torch.device("cpu")
DEVICES = pytest.mark.parametrize(
    "device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)


def updated(scale: LossScale, *norms: float) -> list[float]:
    """The scale after each of some norms."""
    scales = []
    for norm in norms:
        scale.update(torch.tensor(norm, device=scale.scale.device))
        scales.append(scale.state()[0])
    return scales


@DEVICES
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_an_overflow_halves_the_scale(device: torch.device, bad: float) -> None:
    scale = LossScale.for_dtype(torch.float16, device)
    start = INITIAL_SCALE
    assert updated(scale, 1.0, bad, bad, 0.0) == [start, start / 2, start / 4, start / 4]
    assert scale.state() == (start / 4, 1)


@DEVICES
def test_enough_steps_without_an_overflow_double_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    scale = LossScale.for_dtype(torch.float16, device)
    inf, start = float("inf"), INITIAL_SCALE
    # an overflow begins the count anew, and so does a doubling
    norms = [1.0, 1.0, inf, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    halves = [start / 2] * 3
    assert updated(scale, *norms) == [start, start, *halves, start, start, start, 2 * start]
    assert scale.state() == (2 * start, 0)


def test_the_interval_is_gradscalers() -> None:
    peer = torch.amp.GradScaler("cpu")
    assert peer.get_growth_interval() == loss_scale.GROWTH_INTERVAL
    assert (peer.get_growth_factor(), peer.get_backoff_factor()) == (2.0, 0.5)
    assert peer.get_scale() == INITIAL_SCALE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_need_none(dtype: torch.dtype) -> None:
    scale = LossScale.for_dtype(dtype, CPU)
    assert updated(scale, 1.0, float("inf"), float("nan")) == [1.0, 1.0, 1.0]


def test_a_saved_state_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 5)
    norms = [1.0, float("inf"), 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    whole = LossScale.for_dtype(torch.float16, CPU)
    expected = updated(whole, *norms)
    first, second = (LossScale.for_dtype(torch.float16, CPU) for _ in range(2))
    start = updated(first, *norms[:4])
    second.load_state(*first.state())
    assert start + updated(second, *norms[4:]) == expected
    assert second.state() == whole.state()
