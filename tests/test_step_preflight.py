"""step/preflight.py: what is free decides the plan, and what did not fit has a next setting."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_step_memory_plan import WORK

from step.duration import Rates, step_seconds
from step.memory_plan import CONTEXT_BYTES, GIB, MemoryPlan, plan_memory
from step.preflight import describe_plan, limit_memory, next_setting, plan_run


def planned(
    monkeypatch: pytest.MonkeyPatch,
    free: float,
    activations: str = "auto",
    max_memory: int | None = None,
    device: str = "cuda",
) -> MemoryPlan:
    """The plan for a device with so much memory free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free), 80 * GIB))
    return plan_run(WORK, torch.device(device), activations, max_memory)


def test_what_is_free_decides_which_layers_keep_their_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert planned(monkeypatch, 79 * GIB).policies == ("expand",) * 32
    assert set(planned(monkeypatch, 36 * GIB).policies) == {"keep", "expand"}
    mixed = planned(monkeypatch, 23 * GIB)
    assert set(mixed.policies) == {"keep", "recompute", "offload"}
    assert mixed.reserved + mixed.moments < 23 * GIB
    # no more than is asked for, nor than there is
    assert planned(monkeypatch, 79 * GIB, max_memory=24 * GIB).device <= 24 * GIB
    assert planned(monkeypatch, 23 * GIB, max_memory=80 * GIB) == mixed
    assert planned(monkeypatch, 79 * GIB, activations="offload").policies == ("offload",) * 32


def test_three_percent_of_what_is_free_stay_free(monkeypatch: pytest.MonkeyPatch) -> None:
    policies = ("recompute",) * WORK.config.num_hidden_layers
    needed = plan_memory(WORK, policies).device - CONTEXT_BYTES
    assert planned(monkeypatch, needed / 0.97 + 1, activations="recompute").policies == policies
    with pytest.raises(ValueError, match="must fit"):
        planned(monkeypatch, needed / 0.975, activations="recompute")


def test_a_run_that_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--activations auto with --batch-size 4 --max-length"):
        planned(monkeypatch, 23 * GIB, activations="keep")
    with pytest.raises(ValueError, match=r"need .* at the least; --activations auto with --batch"):
        planned(monkeypatch, 79 * GIB, max_memory=8 * GIB)


@pytest.mark.parametrize(
    ("device", "activations", "advice"),
    [
        ("cpu", "auto", "--resume --activations recompute"),
        ("cuda", "auto", r"--resume --activations auto --max-memory \d+\.\d\dGiB"),
        (
            "cuda",
            "offload",
            r"a new run with --batch-size [123], from this checkpoint by --init-adapter",
        ),
    ],
)
def test_the_next_setting_after_a_plan_is_leaner(
    monkeypatch: pytest.MonkeyPatch, device: str, activations: str, advice: str
) -> None:
    plan = planned(monkeypatch, 79 * GIB, activations, device=device)
    assert re.fullmatch(advice, next_setting(WORK, plan.policies, torch.device(device)))


@pytest.mark.parametrize(("max_memory", "budget"), [(None, 79), (24 * GIB, 24)])
def test_torchs_allocator_is_left_what_a_plan_does_not_need_beside_it(
    monkeypatch: pytest.MonkeyPatch, max_memory: int | None, budget: int
) -> None:
    plan = planned(monkeypatch, 79 * GIB, max_memory=max_memory)
    shares = []
    total = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    limit_memory(plan, torch.device("cuda"), max_memory)
    (share,) = shares
    available = min(budget * GIB, int(0.97 * 79 * GIB) + CONTEXT_BYTES)
    beside = plan.moments + plan.graphs + CONTEXT_BYTES
    assert share == pytest.approx((available - beside) / (80 * GIB))
    assert plan.reserved <= share * 80 * GIB


@pytest.mark.parametrize(
    ("num_steps", "num_tokens", "said"),
    [(1, 32_768, "1 step over about 32,768 tokens"), (9, 9e6, "9 steps over about 9,000,000 ")],
)
def test_a_plan_says_time_where_rates_are_known(
    num_steps: int, num_tokens: float, said: str
) -> None:
    plan = plan_memory(WORK, ("keep",) * 32)
    text = describe_plan(WORK, plan, None, num_steps, num_tokens)
    assert plan.table() in text
    assert text.splitlines()[0] == "plan for micro-batches of 4 x 2,048 tokens"
    assert said in text
    assert "tokens/s" not in text
    rates = Rates(product=789e12, memory=3e12)
    ranks = replace(WORK, num_ranks=2)
    speed = WORK.M / step_seconds(WORK, plan.policies, rates)
    for work, num_gpus in ((WORK, 1), (ranks, 2)):
        text = describe_plan(work, plan, rates, num_steps, num_tokens)
        seconds = num_tokens / (num_gpus * speed)
        time = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:,.0f} min"
        assert text.endswith(f", {num_gpus * speed:,.0f} tokens/s: about {time} without padding")
        assert (num_tokens < 1e6) == time.endswith(" s")
