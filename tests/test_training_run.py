"""training/run.py: the state that a run begins with, which is the run's own."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from prepare.job import Job
from run.checkpoint import Checkpoint, RunState
from run.ranks import Ranks
from training.run import first_state


def job(resumed: RunState | None) -> Job:
    """As much of a job as a state is made of."""
    checkpoint = resumed and Checkpoint(Path("checkpoint-3"), resumed, moments={}, best={})
    base = SimpleNamespace(own="the base")
    return cast(Job, SimpleNamespace(resumed=checkpoint, started="2026-01-01", base=base))


def test_a_new_run_begins_with_its_job_and_its_ranks() -> None:
    state = first_state(job(None), Ranks(rank=1, size=2))
    assert state == RunState("2026-01-01", num_ranks=2, base="the base")


def test_a_resumed_run_leaves_the_state_of_its_checkpoint_as_it_was() -> None:
    resumed = RunState("2025-12-31", step=3, tokens=40, num_skipped=1)
    state = first_state(job(resumed), Ranks())
    assert state == RunState("2025-12-31", step=3, tokens=40, num_skipped=1, base="the base")
    state.step += 1
    state.count(is_skipped=True)
    assert resumed == RunState("2025-12-31", step=3, tokens=40, num_skipped=1)
