"""The loss on the evaluation data, and the adapter that had the lowest."""

from run.bars import progress_bar
from run.log import RunLog
from run.metrics import Row
from run.signals import StopRequest
from training.run import Run


def evaluate_and_log(run: Run, log: RunLog, stop: StopRequest, row: Row) -> bool:
    """Evaluate, and log a row of metrics with its eval_loss.

    A run that is stopped or runs out of memory here takes the row with it in its state, and begins
    with this evaluation when it is resumed. Where the run may end early, the adapter is kept if
    none before it had a lower loss.

    Returns:
        Whether the evaluation came to its end; False where a signal stopped it.
    """
    state = run.state
    state.unevaluated = row
    eval_loss = evaluate(run, stop)
    if eval_loss is None:
        return False
    state.unevaluated = {}
    if state.note_evaluation(eval_loss) and run.config.early_stopping_patience:
        # in the host's memory: the device need not have room for a second adapter
        run.best = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in run.model.adapter_tensors().items()
        }
    log.add(row | {"eval_loss": eval_loss})
    return True


def evaluate(run: Run, stop: StopRequest) -> float | None:
    """Compute the mean loss over the evaluation's target tokens, in nats, dropout off.

    Returns:
        The loss; None where a signal came before the end.
    """
    evaluation, ranks = run.job.evaluation, run.ranks
    assert evaluation is not None
    total, is_cut = 0.0, False
    own = ranks.share(range(evaluation.num_steps))
    with (
        ranks.sharing_shortage(),
        progress_bar("evaluating", "batches", len(own), is_shown=ranks.is_first) as bar,
    ):
        for _, step in own:
            is_cut = stop.number > 0
            if is_cut:
                break
            (rows,) = evaluation.micro_batches(step)
            batch = evaluation.batch(rows)
            loss = run.micro_step.evaluate(batch)
            total += float(loss)
            bar.update()
    total = ranks.sum_of(total)
    return None if ranks.largest(is_cut) else total / evaluation.num_target_tokens


def restore_best(run: Run, log: RunLog) -> None:
    """Go back to the adapter with the lowest eval_loss, where one was kept."""
    if not run.best:
        return
    for name, tensor in run.model.adapter_tensors().items():
        tensor.detach().copy_(run.best[name])
    log.say(
        f"the adapter of step {run.state.best_step} is taken: its eval_loss "
        f"{run.state.best_eval_loss:.4f} is the lowest"
    )
