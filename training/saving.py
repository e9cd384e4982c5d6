"""Checkpoints of a run under way, and the room that they need on the disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from data import audit
from foreign.terminal import first_line
from lora.adapter_file import save_adapter
from optim.adamw import moment_bytes_per_element
from prepare.job import Job
from run.atomic import write_text
from run.checkpoint import checkpoint_name, remove_old_checkpoints, save_checkpoint
from run.flags import EPOCH
from run.folder import DEFAULT_PARENT, open_output
from run.log import RunLog
from run.room import check_room, checkpoint_bytes, num_checkpoints, reserved
from step.preflight import next_setting
from training.ending import CannotGoOn, cannot_save, last_checkpoint
from training.figures import settle
from training.run import Run


def check_disk(job: Job) -> None:
    """Refuse a disk without room for the run's checkpoints and its adapter.

    Raises:
        ValueError: the disk has fewer bytes free.
    """
    config = job.config
    every = job.epochs.num_steps if config.save_steps == EPOCH else config.save_steps
    count = num_checkpoints(every, config.save_total_limit, job.steps_done, job.num_steps)
    advice = "--save-total-limit, " if count > 1 else ""
    # one more for the adapter at the end, which is a part of a checkpoint
    num_bytes = (count + 1) * _size_of_checkpoint(job)
    check_room(Path(config.output or DEFAULT_PARENT), num_bytes, advice)


def _size_of_checkpoint(job: Job) -> int:
    num_parameters = sum(p.numel() for p in job.work.model.trainable_parameters())
    moment_bytes = moment_bytes_per_element(job.config.optim == "paged_adamw_8bit")
    return checkpoint_bytes(job.config, num_parameters, moment_bytes)


@contextmanager
def opened_output(run: Run) -> Iterator[None]:
    """Hold the output folder while the first rank writes into it, with room kept for the end.

    Raises:
        ValueError: another process writes the folder.
        OSError: the disk has no room for a checkpoint.
    """
    job = run.job
    if not run.ranks.is_first:
        yield
        return
    with open_output(job.config, job.resumed, job.damaged, job.undecided) as config:
        if not job.config.output:
            print(f"output: {config.output}")
        run.job = job = replace(job, config=config)
        write_text(job.output / audit.AUDIT_FILE, audit.to_json(job.audits), job.data_mode)
        with reserved(job.output, _size_of_checkpoint(job)) as run.make_room:
            yield


def save(run: Run, log: RunLog) -> Path:
    """Write a checkpoint of the run as it stands, unless it is there already.

    Raises:
        OSError: the disk refused; the checkpoints before it are as they were.
        RankError: the ranks have different adapters.
    """
    if run.pending:
        settle(run, log)
    if run.ranks.size > 1:
        run.ranks.check_same("the adapter", run.optimizer.checksum())
    output = run.job.output
    path = output / checkpoint_name(run.state)
    if run.ranks.is_first and not path.exists():
        log.flush()
        save_checkpoint(
            path,
            run.state,
            run.optimizer.state_tensors(),
            lambda folder: write_adapter(folder, run),
            run.best,
        )
        if run.config.save_total_limit:
            remove_old_checkpoints(output, run.config.save_total_limit)
    return path


def save_if_disk_allows(run: Run, log: RunLog) -> None:
    """Write a checkpoint; where the disk refuses it, say so and let the run go on."""
    with run.ranks.sharing_shortage():
        try:
            save(run, log)
        except OSError as error:
            log.say(f"step {run.state.step}: no checkpoint, the run goes on: {error}")


def save_stopped(run: Run, log: RunLog, stopped_by: str) -> None:
    """Save a run that a signal stopped, and say how to go on.

    Raises:
        CannotGoOn: the disk refused.
    """
    try:
        path = save(run, log)
    except OSError as error:
        raise cannot_save(run.job, error) from None
    log.say(
        f"stopped by {stopped_by} after step {run.state.step:,} of {run.job.num_steps:,}: "
        f"{path} has the run as it stands, --resume goes on from there"
    )


def save_after_shortage(run: Run, log: RunLog, shortage: str) -> CannotGoOn:
    """Save a run whose device ran out of memory, and say how to go on."""
    job = run.job
    why = f"the GPU's memory must suffice for step {run.state.step + 1}: {shortage}"
    run.micro_step.release()
    run.make_room()
    try:
        path = save(run, log)
        # a launcher ends all ranks when one does: those that write nothing wait
        run.ranks.largest(0)
    except (RuntimeError, OSError) as error:
        return CannotGoOn(
            f"{why}; and it could not be saved: {first_line(error)}; {last_checkpoint(job)}"
        )
    advice = next_setting(job.work, job.policies, job.device)
    return CannotGoOn(f"{why}; {path} has the run as it stands; try {advice}")


def write_adapter(folder: Path, run: Run) -> None:
    """Write the adapter with the place of its base, so that any program finds the base again."""
    job, tensors = run.job, run.model.adapter_tensors()
    # absolute: the adapter may be read from any working folder
    base = str(job.checkpoint.folder.absolute()) if job.is_base_local else job.config.model
    # PEFT looks for targets in the whole model, where an encoder may have modules of the same names
    model = job.checkpoint.config
    lora = job.lora.beneath(model.decoder) if model.is_tower else job.lora
    save_adapter(folder, tensors, lora, base, job.base.original)
