"""The figures of the steps that were taken, fetched from the device."""

import math

import torch

from run.log import RunLog
from run.metrics import Row
from training.bad_batch import leave_batch
from training.ending import CannotGoOn
from training.run import Run


def settle(run: Run, log: RunLog) -> Row:
    """Wait for the device, count the pending steps in the run's state, and return the figures of
    the last one.

    The training loop waits for the device nowhere else.

    Raises:
        CannotGoOn: --max-bad-steps steps in a row had gradients that are not finite.
    """
    state, pending = run.state, run.pending
    rows = torch.stack([torch.stack((p.loss, p.aux_loss, p.grad_norm)) for p in pending]).tolist()
    if run.loss_scale.is_dynamic:
        state.loss_scale, state.num_good_steps = run.loss_scale.state()
    figures: Row = {}
    for p, (loss, aux_loss, grad_norm) in zip(pending, rows, strict=True):
        figures = {"loss": loss}
        if run.config.router_aux_loss_coef:
            figures["aux_loss"] = aux_loss
        figures |= {"grad_norm": grad_norm, "learning_rate": p.learning_rate}
        is_skipped = not math.isfinite(grad_norm)
        state.count(is_skipped)
        if is_skipped:
            log.say(
                f"step {p.step}: the gradients are not finite, the adapter is left as it was "
                f"({state.num_skipped} steps so far, loss scale {state.loss_scale:g})"
            )
        if state.num_skipped_in_a_row == run.config.max_bad_steps:
            path = leave_batch(run, p.step, figures)
            error = CannotGoOn(
                f"gradients must be finite: {state.num_skipped_in_a_row} steps in a row were not, "
                f"up to step {p.step} with loss {loss}; its batch is in {path}; look at it, lower "
                "--learning-rate or use --dtype bfloat16"
            )
            raise run.ranks.said_once(error)
    pending.clear()
    return figures
