"""Fine-tune a Llama checkpoint with QLoRA: read this file top to bottom.

    python train.py                                          the bundled model and data
    python train.py --model DIR --data FILE --output OUT     your own

`main` tells the story; its steps follow.
"""

import functools
import hashlib
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint.loading import load_model
from data import audit
from foreign.terminal import guard_output, one_line
from hub.push import push_folder
from kernels.launch import KernelDoesNotFit
from llama.generation import generate_greedy
from llama.model import Llama
from lora.adapter_file import load_adapter, rename_base, save_adapter
from optim.adamw import AdamW, moment_bytes_per_element
from optim.loss_scale import LossScale
from optim.schedule import learning_rate_at, num_warmup_steps
from optim.state_memory import OrdinaryMemory
from optim.unified_memory import paged_memory
from prepare.job import SAMPLE_TOKENS, Job, check
from prepare.quantization import quantization_of
from run.atomic import new_files, new_folder, remove_folder, write_text
from run.bad_batch import bad_batch_name, write_bad_batch
from run.checkpoint import (
    RunState,
    checkpoint_name,
    list_checkpoints,
    remove_old_checkpoints,
    save_checkpoint,
)
from run.config import TrainConfig
from run.folder import DEFAULT_PARENT, open_output
from run.last_door import LastDoor
from run.log import RunLog
from run.metrics import Row
from run.model_card import CARD_FILE, model_card
from run.ranks import RankError, RankOutOfMemory, Ranks, join_ranks
from run.room import check_room, checkpoint_bytes, num_checkpoints, reserved
from run.shortage import is_device_failure, is_lost, is_shortage
from run.signals import StopRequest, end_at_once
from run.watching import Watching
from step.micro_step import MicroStep
from step.preflight import limit_memory, memory_line, next_setting, preflight

# what an int64 holds
HASH_BYTES = 7
# in the output folder: what is on its way to the hub
HUB_FOLDER = "hub"


class CannotGoOn(RuntimeError):
    """A run stops in its middle; the message says why, and how to go on."""


@dataclass(frozen=True)
class PendingStep:
    """A step, counted from 1, whose figures the device may still be computing."""

    step: int
    loss: Tensor  # () float32, in nats per target token
    grad_norm: Tensor  # () float32, before clipping
    learning_rate: float


@dataclass
class Run:
    """A run between two steps: what a step changes, and what it needs."""

    job: Job
    ranks: Ranks
    model: Llama
    micro_step: MicroStep
    optimizer: AdamW
    loss_scale: LossScale
    best: dict[str, Tensor]  # the adapter of the lowest eval_loss, where it is kept
    pending: list[PendingStep] = field(default_factory=list)
    # frees what was kept of the disk for the end
    make_room: Callable[[], None] = lambda: None

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    @property
    def state(self) -> RunState:
        return self.job.state

    @property
    def is_over(self) -> bool:
        state, patience = self.state, self.config.early_stopping_patience
        is_patient = patience == 0 or state.num_evaluations_since_best < patience
        return not state.unevaluated and (state.step == self.job.num_steps or not is_patient)


def main(arguments: Sequence[str]) -> None:
    # torch's allocator then leaves hardly any holes between tensors; it asks once, at its first
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with join_ranks() as ranks:
        # templates may print the time, and must not print several
        now = datetime.fromtimestamp(ranks.largest(int(time.time())))
        with ranks.first_goes_ahead():
            job = check(arguments, ranks, now)
        if job is None:
            return
        try:
            carry_out(job, ranks)
        except (CannotGoOn, RankError):
            raise
        except RuntimeError as error:
            if not is_of_device(error):
                raise
            raise CannotGoOn(
                f"the GPU must go on working: it failed in step {job.state.step + 1}: "
                f"{first_line(error)}; {last_checkpoint(job)}"
            ) from None


def carry_out(job: Job, ranks: Ranks) -> None:
    """Load the model, train it, and leave the results in the output folder.

    Raises:
        CannotGoOn: the run ended in its middle.
    """
    config, state = job.config, job.state
    ranks.check_same("the model", hash_of(state.base))
    if ranks.is_first and job.num_steps:
        check_disk(job)
    run = begin(job, ranks)
    described = run.optimizer.describe()
    # but for what is each machine's own: where the folder is, what time it is
    shared = (replace(config, output=""), replace(state, started=""), job.audits)
    ranks.check_same("the run", hash_of(str(shared)))

    # only now, when nothing that was given can be wrong any more, is anything written
    is_first = ranks.is_first
    opened = open_output(config, job.resumed, job.damaged) if is_first else nullcontext(config)
    with opened as job.config:
        if not is_first:
            train_and_save(run, described)
            return
        write_text(job.output / audit.AUDIT_FILE, audit.to_json(job.audits), job.data_mode)
        with reserved(job.output, size_of_checkpoint(job)) as run.make_room:
            train_and_save(run, described)


def check_disk(job: Job) -> None:
    """Refuse a disk without room for the run's checkpoints and its adapter.

    Raises:
        ValueError: the disk has fewer bytes free.
    """
    config = job.config
    count = num_checkpoints(config, job.state.step, job.num_steps)
    advice = "--save-total-limit, " if count > 1 else ""
    # the adapter at the end is a part of a checkpoint
    num_bytes = (count + 1) * size_of_checkpoint(job)
    check_room(Path(config.output or DEFAULT_PARENT), num_bytes, advice)


def size_of_checkpoint(job: Job) -> int:
    num_parameters = sum(p.numel() for p in job.work.model.trainable_parameters())
    moment_bytes = moment_bytes_per_element(job.config.optim == "paged_adamw_8bit")
    return checkpoint_bytes(job.config, num_parameters, moment_bytes)


def train_and_save(run: Run, described: str) -> None:
    """Train a run, and leave what it has learned and looked like in the output folder.

    Args:
        described: the optimizer, before the first step.
    """
    job, ranks, config, state = run.job, run.ranks, run.config, run.state
    log = RunLog(
        config,
        state,
        job.num_steps,
        data_mode=job.data_mode,
        is_resumed=job.resumed is not None,
        writes=ranks.is_first,
    )
    stopped_by = shortage = ""
    with log:
        with StopRequest(says=ranks.is_first) as stop:
            try:
                if job.prompt and ranks.largest(ranks.is_first and not log.answers()):
                    answer(run, log)
                stopped_by = train(run, log, stop)
            except RankOutOfMemory as error:
                shortage = str(error)
            if shortage:
                raise ranks.said_once(after_shortage(run, log, shortage))
            run.make_room()
            if stopped_by:
                try:
                    path = save(run, log)
                except OSError as error:
                    raise cannot_save(job, error) from None
                log.say(
                    f"stopped by {stopped_by} after step {state.step:,} of {job.num_steps:,}: "
                    f"{path} has the run as it stands, --resume goes on from there"
                )
                return
            restore_best(run, log)
            # the adapter first: whatever comes after it only watches
            names = save_results(run, log)
        write_card(run, log, names)
        last_answer(run, log)
    if run.optimizer.describe() != described:
        log.say(f"optimizer: {run.optimizer.describe()}")
    if job.plan:
        log.say(memory_line(job.plan))
    if len(answers := log.answers()) > 1:
        log.say(compared(config.sample_prompt, answers[0], answers[-1]))
    push(run, log, names)


def begin(job: Job, ranks: Ranks) -> Run:
    """Load a run onto its device, and on a GPU try out what its steps take of the memory.

    Raises:
        ValueError: the memory does not suffice.
    """
    shape = f"{job.work.batch} x {job.work.tokens:,} tokens"
    try:
        with ranks.sharing_shortage():
            run = load_run(job, ranks)
            print(f"optimizer: {run.optimizer.describe()}")
            if job.plan and job.num_steps:
                try_micro_batch(run)
    except RankOutOfMemory as error:
        message = (
            f"the model and its longest micro-batch, {shape}, must fit the GPU: {error}; lower "
            "--max-memory, --batch-size or --max-length"
        )
        raise ranks.said_once(ValueError(message)) from None
    if job.plan and job.num_steps:
        try_step(run)
        print(memory_line(job.plan))
    return run


def try_micro_batch(run: Run) -> None:
    """Take the longest micro-batch on a GPU, launched and captured, and fetch the moments."""
    batch = run.job.epochs.largest_batch()
    given = (batch.input_ids, batch.labels, batch.positions, batch.lengths)
    print(preflight(run.micro_step, *given, run.loss_scale.scale))
    run.optimizer.prefetch()


def try_step(run: Run) -> None:
    """Add gradients up and take an optimizer step on a GPU that changes nothing.

    NCCL and the optimizer's kernels take memory at their first use. The kernels leave parameters
    and moments alone where a gradient is not finite. A rank that fails in here ends, and the others
    with it: while they wait for its gradients they cannot be told.
    """
    run.optimizer.gradients.fill_(math.nan)
    run.ranks.add_up(run.optimizer.gradients)
    run.optimizer.step(0.0)
    torch.cuda.synchronize()


def after_shortage(run: Run, log: RunLog, shortage: str) -> CannotGoOn:
    """Save a run whose memory has ended, and say how to go on."""
    job = run.job
    why = f"the GPU's memory must suffice for step {run.state.step + 1}: {shortage}"
    run.micro_step.release()
    run.make_room()
    try:
        path = save(run, log)
        # a launcher ends all ranks when one does: those that write nothing wait
        run.ranks.largest(0)
    except (RuntimeError, OSError) as error:
        return CannotGoOn(f"{why}; nor was it saved: {first_line(error)}; {last_checkpoint(job)}")
    advice = next_setting(job.work, job.policies, job.device)
    return CannotGoOn(f"{why}; {path} has the run as it stands; try {advice}")


def cannot_save(job: Job, error: OSError) -> CannotGoOn:
    """Say where a run goes on whose end the disk refused."""
    return CannotGoOn(
        f"{job.output} must take the results: got {error}; {last_checkpoint(job)}; make room, or "
        "move the folder to another disk and give its place as --output, with --resume"
    )


def last_checkpoint(job: Job) -> str:
    """Say where a run goes on that could not be saved."""
    found = list_checkpoints(job.output)
    return (
        f"{found[-1]} is the last checkpoint, for --resume" if found else "no checkpoint is there"
    )


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:HASH_BYTES], "big")


def load_run(job: Job, ranks: Ranks) -> Run:
    """Load the checkpoint onto the device, quantizing each tensor as it arrives, if it is not, and
    put an adapter, its optimizer and their state beside it."""
    config, state, resumed = job.config, job.state, job.resumed
    dtype, quantization = getattr(torch, config.dtype), quantization_of(config)
    # where nobody looks, and for all ranks but one
    is_off = None if ranks.is_first else True
    with tqdm(desc="loading", unit="tensor", disable=is_off, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if job.plan:
            limit_memory(job.plan, job.device, config.max_memory_bytes)
        model = load_model(job.checkpoint, job.device, dtype, quantization, report)
    model.attach_lora(job.lora, config.seed)
    print(model.describe_trainable_parameters())
    if job.start:
        load_adapter(job.start, model.adapter_tensors(), job.checkpoint.vocabulary_tensors)
    optimizer = make_optimizer(model, config)
    loss_scale = LossScale.for_dtype(model.compute_dtype, job.device)
    if resumed:
        optimizer.load_state(resumed.moments, state.num_updates)
        loss_scale.load_state(state.loss_scale, state.num_good_steps)
    captures = job.device.type == "cuda"
    micro_step = MicroStep(model, job.policies, config.neftune_noise_alpha, captures)
    if captures:
        # what loading has left: an allocation in the pool of the passes does not get it back
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    best = resumed.best if resumed else {}
    return Run(job, ranks, model, micro_step, optimizer, loss_scale, best)


def make_optimizer(model: Llama, config: TrainConfig) -> AdamW:
    """Build the optimizer of --optim over the adapter, lora_B learning faster by LoRA+'s ratio.

    Hayou et al. 2024, "LoRA+".
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    paged = functools.partial(paged_memory, residency=config.optimizer_residency)
    return AdamW(
        parameters,
        weight_decay=config.weight_decay,
        is_8bit=config.optim == "paged_adamw_8bit",
        memory=OrdinaryMemory if config.optim == "adamw" else paged,
        rate_factors={
            name: config.loraplus_lr_ratio for name in parameters if name.endswith("lora_B")
        },
    )


def train(run: Run, log: RunLog, stop: StopRequest) -> str:
    """Take the run's steps until its end or a signal, evaluating, logging and saving on the way.

    Returns:
        The signal's name, empty at the end.
    """
    job, config, state = run.job, run.config, run.state
    if job.evaluation and not job.resumed:
        state.unevaluated = log.row(state, 0.0)
    if state.unevaluated:
        evaluate_row(run, log, stop)
    while not run.is_over:
        if number := run.ranks.largest(stop.number):
            return signal.Signals(number).name
        run.pending.append(train_step(run))
        log.advance()
        is_last = state.step == job.num_steps
        is_eval_due = is_last or is_due(config.eval_steps, state)
        is_row_due = is_eval_due or is_due(config.logging_steps, state)
        is_save_due = is_due(config.save_steps, state) and not is_last
        is_sample_due = job.prompt and is_due(config.sample_steps, state) and not is_last
        is_read_due = is_row_due or is_save_due or is_sample_due
        if not is_read_due and len(run.pending) < config.max_bad_steps:
            continue
        with run.ranks.sharing_shortage():
            figures = settle(run, log)
        if is_row_due:
            row = log.row(state, state.step / job.epochs.num_steps, figures)
            if is_eval_due and job.evaluation:
                state.unevaluated = row
                evaluate_row(run, log, stop)
                if state.unevaluated:
                    continue
            else:
                log.add(row)
        if is_sample_due:
            log.say(one_line(f"step {state.step}: {config.sample_prompt} -> {answer(run, log)}"))
        if is_save_due and not run.is_over:
            with run.ranks.sharing_shortage():
                save_if_disk_allows(run, log)
    return ""


def save_if_disk_allows(run: Run, log: RunLog) -> None:
    """Write a checkpoint, or say why there is none."""
    try:
        save(run, log)
    except OSError as error:
        log.say(f"step {run.state.step}: no checkpoint, the run goes on: {error}")


def is_due(every: int, state: RunState) -> bool:
    return every > 0 and state.step % every == 0


def settle(run: Run, log: RunLog) -> Row:
    """Wait for the device, count the steps whose figures it was computing, and return the last's.

    The one place that waits in the loop.

    Raises:
        CannotGoOn: too many steps in a row could not be learned from.
    """
    state, pending = run.state, run.pending
    rows = torch.stack([torch.stack((p.loss, p.grad_norm)) for p in pending]).tolist()
    if run.loss_scale.is_dynamic:
        state.loss_scale, state.num_good_steps = run.loss_scale.state()
    figures: Row = {}
    for p, (loss, grad_norm) in zip(pending, rows, strict=True):
        figures = {"loss": loss, "grad_norm": grad_norm, "learning_rate": p.learning_rate}
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


def leave_batch(run: Run, step: int, figures: Row) -> Path:
    """Write down what a step was to be learned from, that of all ranks."""
    epochs = run.job.epochs
    path = run.job.output / bad_batch_name(step)
    if run.ranks.is_first:
        batches = epochs.micro_batches(step - 1)
        indices = [index for rows in batches for row in rows for index in row]
        samples = {index: epochs.samples[index] for index in indices}
        write_bad_batch(path, step, figures, samples, run.job.tokenizer, run.job.data_mode)
    return path


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


def train_step(run: Run) -> PendingStep:
    """Take one optimizer step over its micro-batches and count it in the run's state.

        gradient = d/dadapter  sum over all micro-batches of the loss / the step's target tokens

    The divisor counts the tokens of the whole step, so how samples are split into micro-batches,
    and those over ranks, does not change the gradient, in a short last step neither.

    Note:
        Does not wait for the device: the run's counters of updates and skipped steps, and its loss
        scale, are what `settle` last saw.

    Raises:
        RankOutOfMemory: a micro-batch or the moments do not fit; the run is as it was.
    """
    config, state, epochs = run.config, run.state, run.job.epochs
    optimizer, scale = run.optimizer, run.loss_scale
    micro_batches = epochs.micro_batches(state.step)
    num_tokens, num_targets = epochs.count(micro_batches)
    learning_rate = learning_rate_at(
        state.step,
        run.job.num_steps,
        num_warmup_steps(run.job.num_steps, config.warmup_ratio),
        config.learning_rate,
        config.lr_scheduler,
    )
    optimizer.zero_grad()
    total_loss = torch.zeros((), device=run.model.device)
    own = run.ranks.share(micro_batches)
    with run.ranks.sharing_shortage():
        for index, rows in own:
            batch = epochs.batch(rows)
            if index == own[-1][0]:
                # what is paged out comes back beside the last micro-batch
                optimizer.prefetch()
            seed = dropout_seed(config.seed, state.step, index)
            factor = scale.scale / num_targets
            total_loss += run.micro_step(
                batch.input_ids, batch.labels, factor, seed, batch.positions, batch.lengths
            )
        if not own:
            # what can be refused is refused before any rank takes the step
            optimizer.prefetch()
    run.ranks.add_up(optimizer.gradients)
    run.ranks.add_up(total_loss)
    total_loss /= num_targets
    grad_norm = optimizer.step(learning_rate, config.max_grad_norm, scale.scale)
    scale.update(grad_norm)

    state.step += 1
    state.tokens += num_tokens
    state.target_tokens += num_targets
    return PendingStep(state.step, total_loss, grad_norm, learning_rate)


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Draw a micro-batch's seed from its place alone, so that a resumed run needs no random
    state."""
    return hash_of(f"{seed} {step} {micro_batch}")


def evaluate_row(run: Run, log: RunLog, stop: StopRequest) -> None:
    """Log the row that waits for its evaluation, unless a signal comes first: then it still waits.

    Where the run may end early, the adapter is kept if none has had a lower loss.
    """
    state = run.state
    eval_loss = evaluate(run, stop)
    if eval_loss is None:
        return
    if state.note_evaluation(eval_loss) and run.config.early_stopping_patience:
        # two on the device would be one too many
        run.best = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in run.model.adapter_tensors().items()
        }
    log.add(state.unevaluated | {"eval_loss": eval_loss})
    state.unevaluated = {}


def evaluate(run: Run, stop: StopRequest) -> float | None:
    """Compute the mean loss over the evaluation's target tokens, in nats, dropout off.

    None where a signal came before the end.
    """
    evaluation, ranks = run.job.evaluation, run.ranks
    assert evaluation is not None
    total, is_cut = 0.0, False
    with ranks.sharing_shortage():
        for _, step in ranks.share(range(evaluation.num_steps)):
            is_cut = stop.number > 0
            if is_cut:
                break
            (rows,) = evaluation.micro_batches(step)
            batch = evaluation.batch(rows)
            loss = run.micro_step.evaluate(batch.input_ids, batch.labels, batch.positions)
            total += float(loss)
    total = ranks.sum_of(total)
    return None if ranks.largest(is_cut) else total / evaluation.num_target_tokens


def restore_best(run: Run, log: RunLog) -> None:
    """Go back to the adapter with the lowest eval_loss, where one was kept."""
    for name, tensor in run.model.adapter_tensors().items():
        if run.best:
            tensor.detach().copy_(run.best[name])
    if run.best:
        log.say(
            f"the adapter of step {run.state.best_step} is taken: its eval_loss "
            f"{run.state.best_eval_loss:.4f} is the lowest"
        )


def answer(run: Run, log: RunLog) -> str:
    """Answer --sample-prompt with the most probable tokens, and write the answer down.

    The first rank does; the others have no answer.
    """
    text = ""
    with run.ranks.sharing_shortage():
        if run.ranks.is_first:
            with Watching("--sample-prompt", log.say, is_spared=is_of_device):
                prompt, tokenizer = run.job.prompt, run.job.tokenizer
                assert prompt is not None
                stop_ids = {*run.model.config.eos_token_ids, tokenizer.eos_token_id}
                new_ids = generate_greedy(run.model, prompt, SAMPLE_TOKENS, stop_ids)
                text = tokenizer.decode(new_ids).strip()
                log.add_answer(run.state.step, text)
    return text


def last_answer(run: Run, log: RunLog) -> None:
    """Answer --sample-prompt after the last step, if the device still can."""
    with Watching("--sample-prompt", log.say, is_last=True):
        if run.job.prompt:
            answer(run, log)


def is_of_device(error: BaseException) -> bool:
    """Tell whether an error is of the device, which the steps need as well."""
    return is_shortage(error) or is_device_failure(error)


def write_adapter(folder: Path, run: Run) -> None:
    job, tensors = run.job, run.model.adapter_tensors()
    # from wherever the adapter is read
    base = str(job.checkpoint.folder.absolute()) if job.is_base_local else job.config.model
    save_adapter(folder, tensors, job.lora, base, job.base.original)


def save_results(run: Run, log: RunLog) -> list[str]:
    """Write the adapter and the tokenizer into the output folder, and return the files' names."""
    # they are written whether or not the GPU has memory left
    run.micro_step.release()
    if not (run.job.num_steps and run.ranks.is_first):
        return []
    output = run.job.output
    log.flush()
    try:
        with new_files(output) as folder:
            write_adapter(folder, run)
            names = names_in(folder)
    except OSError as error:
        raise cannot_save(run.job, error) from None
    log.say(f"saved the adapter in {output}")
    # its files are in the model's folder, which may be gone by now
    with Watching("the tokenizer's copy", log.say), new_files(output) as folder:
        run.job.tokenizer.save(folder)
        names += names_in(folder)
    return names


def names_in(folder: Path) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in paths]


def write_card(run: Run, log: RunLog, names: list[str]) -> None:
    """Write the model card of an adapter that was saved, and count it among its files."""
    job = run.job
    if names:
        with Watching(CARD_FILE, log.say, is_last=True):
            is_on_hub = job.base_id is not None
            card = model_card(job.config, log.rows, names, job.base_name, is_on_hub=is_on_hub)
            write_text(job.output / CARD_FILE, card)
            names.append(CARD_FILE)


def compared(prompt: str, before: str, after: str) -> str:
    """Set an answer of the untrained model beside one of the trained, their lines indented so that
    none of them reads as a message."""
    named = {"prompt": prompt, "before": before, "after": after}
    lines = [f"{name:<8}" + text.replace("\n", f"\n{'':8}") for name, text in named.items()]
    return "\n".join(["", *lines])


def push(run: Run, log: RunLog, names: Sequence[str]) -> None:
    """Send the saved files and their card to --push-to-hub; where it refuses them, they stay in a
    folder of their own."""
    job, repository = run.job, run.config.push_to_hub
    if repository and names:
        base = one_line(job.base_name)
        with Watching("--push-to-hub", log.say, is_last=True):
            folder = job.output / HUB_FOLDER
            shutil.rmtree(folder, ignore_errors=True)
            with new_folder(folder) as partial:
                for name in names:
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(job.output / name, partial / name)
                # where the base lies on this disk is nobody else's business
                rename_base(partial, base)
            message = f"LoRA of {base} after {run.state.step:,} steps"
            url = push_folder(folder, repository, message)
            remove_folder(folder)
            log.say(f"pushed it: {url}")


def end(error: Exception) -> NoReturn:
    """Leave with one line on stderr; at once where the GPU is lost, which torch's end would ask."""
    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # a GPU that waits for a rank that has ended would not answer
    if not isinstance(error, RankError) and is_lost(torch.device("cuda")):
        os._exit(1)
    sys.exit(1)


if __name__ == "__main__":
    guard_output()
    try:
        with LastDoor():
            main(sys.argv[1:])
    except (ValueError, OSError, CannotGoOn, RankError, KernelDoesNotFit) as error:
        # what the user gave, or what the disk or the device refused: the message is enough
        end(error)
    except KeyboardInterrupt:
        sys.exit("interrupted: what is not in a checkpoint is lost")
    finally:
        end_at_once()
