"""Before the first step on a GPU: kernels are compiled, a micro-batch and a step tried out."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from llama.model import Llama
from optim.adamw import AdamW
from prepare.job import Job
from run.config import TrainConfig
from run.ranks import Ranks
from step.compiling import compiling_beside
from step.preflight import preflight
from step.walk import StepWalk
from training.run import Run


@contextmanager
def compiling_kernels(
    job: Job, ranks: Ranks, make_optimizer: Callable[[Llama, TrainConfig], AdamW]
) -> Iterator[None]:
    """Compile what a run's steps will launch on a GPU, beside what the caller does meanwhile.

    One rank compiles for all of its machine.
    """
    if job.plan is None or not job.num_steps or ranks.local_rank:
        yield
        return
    work = job.work

    def walk() -> None:
        StepWalk(work).events(job.policies)
        make_optimizer(work.model, job.config).step(0.0)

    with compiling_beside(walk, work.gpu):
        yield


def try_micro_batch(run: Run) -> None:
    """Take the longest micro-batch on a GPU, launched and captured, and fetch the moments."""
    batch = run.job.epochs.largest_batch()
    print(preflight(run.micro_step, batch, run.loss_scale.scale))
    run.optimizer.prefetch()


def try_step(run: Run) -> None:
    """Add the gradients up over all ranks and take an optimizer step that changes nothing.

    NCCL and the optimizer's kernels take memory at their first use. The optimizer leaves parameters
    and moments as they are where a gradient is not finite. A rank that fails in here ends, and the
    others end with it: ranks that wait for its gradients cannot be told.
    """
    run.optimizer.gradients.values.fill_(math.nan)
    run.ranks.add_up(run.optimizer.gradients.values)
    run.optimizer.step(0.0)
    torch.cuda.synchronize()
