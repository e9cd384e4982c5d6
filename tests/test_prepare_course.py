"""prepare/course.py: what a run says of its learning rate before it begins."""

from datetime import datetime

import pytest

from prepare.course import schedule_lines
from prepare.job import BUNDLED, check
from run.config import TrainConfig
from run.ranks import Ranks


@pytest.mark.parametrize(
    ("num_steps", "warmup_steps", "highest"),
    [(3, 10, "6.00e-05"), (1, 2, "1.00e-04"), (3, 4, "1.50e-04")],
)
def test_a_warm_up_that_does_not_end_is_told(
    num_steps: int, warmup_steps: int, highest: str
) -> None:
    config = TrainConfig(warmup_steps=warmup_steps, warmup_ratio=0.0)
    (line,) = schedule_lines(config, num_steps)
    assert f"--warmup-steps {warmup_steps} is more than the {num_steps} step" in line
    assert line.endswith(f"rises to {highest}, and never to --learning-rate 0.0002")


@pytest.mark.parametrize(
    ("num_steps", "given"),
    [
        (3, {"warmup_steps": 3, "warmup_ratio": 0.0}),
        (3, {"warmup_ratio": 1.0}),
        (3, {}),
        # an evaluation alone
        (0, {"warmup_steps": 10, "warmup_ratio": 0.0}),
    ],
)
def test_a_rate_that_rises_in_time_is_not_told(num_steps: int, given: dict) -> None:
    assert schedule_lines(TrainConfig(**given), num_steps) == []


@pytest.mark.parametrize("flag", ["", "--plan"])
def test_a_run_and_its_plan_say_it(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = f"--model {BUNDLED / 'model'} --data {BUNDLED / 'eval.jsonl'} --max-steps 3 {flag}"
    check(f"{given} --warmup-steps 10 --device cpu".split(), Ranks(), datetime.now())
    assert "warning: --warmup-steps 10 is more than the 3 steps" in capsys.readouterr().out
