"""A micro-batch and an optimizer step tried out on a GPU, before the first step is taken."""

import math

import torch

from step.preflight import preflight
from training.run import Run


def try_micro_batch(run: Run) -> None:
    """Take the longest micro-batch on a GPU, launched and captured, and fetch the moments."""
    batch = run.job.epochs.largest_batch()
    given = (batch.input_ids, batch.labels, batch.positions, batch.lengths)
    print(preflight(run.micro_step, *given, run.loss_scale.scale))
    run.optimizer.prefetch()


def try_step(run: Run) -> None:
    """Add the gradients up over all ranks and take an optimizer step that changes nothing.

    NCCL and the optimizer's kernels take memory at their first use. The optimizer leaves parameters
    and moments as they are where a gradient is not finite. A rank that fails in here ends, and the
    others end with it: ranks that wait for its gradients cannot be told.
    """
    run.optimizer.gradients.fill_(math.nan)
    run.ranks.add_up(run.optimizer.gradients)
    run.optimizer.step(0.0)
    torch.cuda.synchronize()
