"""Fine-tune a Llama checkpoint with QLoRA: read this file top to bottom.

    python train.py                                          the bundled model and data
    python train.py --model DIR --data FILE --output OUT     your own

`main` tells the story; its steps follow. `train` is the loop, `train_step` the arithmetic. A run's
other work (evaluation, answers to a prompt, checkpoints, results) is in training/.
"""

import functools
import hashlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from run.config import answer_mistakes

if __name__ == "__main__":
    # --help and a mistyped flag or setting are answered here: the imports below take seconds
    answer_mistakes(sys.argv[1:])

import torch

from checkpoint.loading import load_model
from foreign.terminal import guard_output
from kernels.launch import KernelDoesNotFit
from llama.model import Llama
from lora.adapter_file import load_adapter
from optim.adamw import AdamW
from optim.arena import GradientArena
from optim.loss_scale import LossScale
from optim.schedule import learning_rate_at, num_warmup_steps
from optim.state_memory import OrdinaryMemory
from optim.unified_memory import paged_memory
from prepare.base_compute import set_base_compute
from prepare.job import Job, check
from prepare.quantization import quantization_of
from run.bars import reporting
from run.checkpoint import RunState
from run.flags import EPOCH, TrainingFlags
from run.last_door import LastDoor
from run.log import RunLog
from run.ranks import RankError, RankOutOfMemory, Ranks, join_ranks
from run.signals import StopRequest, end_at_once
from step.micro_step import MicroStep
from step.preflight import limit_memory, memory_line
from training.answers import compare_answers, first_answer, last_answer, say_answer
from training.ending import CannotGoOn, end, naming_device_failure
from training.evaluation import evaluate_and_log, restore_best
from training.figures import settle
from training.results import push, save_results, say_usage, write_card
from training.run import PendingStep, Run, first_state
from training.saving import (
    check_disk,
    opened_output,
    save_after_shortage,
    save_if_disk_allows,
    save_stopped,
)
from training.trial import compiling_kernels, try_micro_batch, try_step

# a hash of this size fits into an int64
HASH_BYTES = 7


def main(arguments: Sequence[str]) -> None:
    # torch's allocator then leaves hardly any holes between tensors; it reads this once, before its
    # first allocation
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with join_ranks() as ranks:
        # chat templates may print the time: all ranks take the same
        now = datetime.fromtimestamp(ranks.largest(int(time.time())))
        with ranks.first_goes_ahead():
            job = check(arguments, ranks, now)
        if job:
            carry_out(job, ranks)


def carry_out(job: Job, ranks: Ranks) -> None:
    """Load the model, train it, and leave the results in the output folder.

    Raises:
        CannotGoOn: the run ended before its last step.
    """
    ranks.check_same("the model", hash_of(job.base.own))
    if ranks.is_first and job.num_steps:
        check_disk(job)
    state = first_state(job, ranks)
    with naming_device_failure(job, state):
        run = begin(job, ranks, state)
    # each machine has its own output folder and its own time
    shared = (replace(job.config, output=""), replace(state, started=""), job.audits)
    ranks.check_same("the run", hash_of(str(shared)))

    # nothing is written before this line: now nothing that was given can be wrong any more
    with opened_output(run), naming_device_failure(run.job, state):
        train_and_save(run)


def begin(job: Job, ranks: Ranks, state: RunState) -> Run:
    """Load a run onto its device, and on a GPU try out whether its steps fit the memory.

    Raises:
        ValueError: the memory does not suffice.
    """
    shape = f"{job.work.batch} x {job.work.tokens:,} tokens"
    try:
        with ranks.sharing_shortage(), compiling_kernels(job, ranks, make_optimizer):
            run = load_run(job, ranks, state)
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


def load_run(job: Job, ranks: Ranks, state: RunState) -> Run:
    """Load the model onto the device, and put an adapter and its optimizer beside it.

    Each tensor is quantized as it arrives, unless the checkpoint is in NF4 already.
    """
    config, resumed = job.config, job.resumed
    dtype, quantization = getattr(torch, config.dtype), quantization_of(config)
    with reporting("loading", "tensors", is_shown=ranks.is_first) as report:
        if job.plan:
            limit_memory(job.plan, job.device, config.max_memory_bytes)
        model = load_model(job.checkpoint, job.device, dtype, quantization, report)
    set_base_compute(model, config)
    model.attach_lora(job.lora, config.seed)
    if job.start:
        load_adapter(job.start, model.adapter_tensors(), job.checkpoint.vocabulary_tensors)
    optimizer = make_optimizer(model, config)
    loss_scale = LossScale.for_dtype(model.compute_dtype, job.device)
    if resumed:
        optimizer.load_state(resumed.moments, state.num_updates)
        loss_scale.load_state(state.loss_scale, state.num_good_steps)
    captures = job.device.type == "cuda"
    micro_step = MicroStep(
        model, optimizer.gradients, job.policies, config.neftune_noise_alpha, captures
    )
    if captures:
        # the passes allocate in a pool of their own, which cannot use memory cached while loading
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    best = resumed.best if resumed else {}
    return Run(job, ranks, state, model, micro_step, optimizer, loss_scale, best)


def make_optimizer(model: Llama, config: TrainingFlags) -> AdamW:
    """Build the optimizer of --optim over the adapter, lora_B learning faster by LoRA+'s ratio.

    Hayou et al. 2024, "LoRA+".
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    paged = functools.partial(paged_memory, residency=config.optimizer_residency)
    return AdamW(
        GradientArena(parameters, is_8bit=config.optim == "paged_adamw_8bit"),
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        memory=OrdinaryMemory if config.optim == "adamw" else paged,
        rate_factors={
            name: config.loraplus_lr_ratio for name in parameters if name.endswith("lora_B")
        },
    )


def train_and_save(run: Run) -> None:
    """Train a run, and leave the adapter and the course of the run in the output folder.

    Raises:
        CannotGoOn: the run ended before its last step.
    """
    job, ranks = run.job, run.ranks
    described = run.optimizer.describe()
    log = RunLog(
        run.config,
        run.state,
        job.num_steps,
        data_mode=job.data_mode,
        is_resumed=job.resumed is not None,
        writes=ranks.is_first,
    )
    stopped_by = shortage = ""
    with log:
        with StopRequest(says=ranks.is_first) as stop:
            try:
                first_answer(run, log)
                stopped_by = train(run, log, stop)
            except RankOutOfMemory as error:
                shortage = str(error)
            # outside the except block: the error would keep the tensors of the step alive
            if shortage:
                raise ranks.said_once(save_after_shortage(run, log, shortage))
            run.make_room()
            if stopped_by:
                save_stopped(run, log, stopped_by)
                return
            restore_best(run, log)
            # the adapter first: all that follows may fail without harm
            names = save_results(run, log)
        last_answer(run, log)
        log.flush()
    # last of all results: a folder that has it is that of a finished run
    write_card(run, log, names)
    if run.optimizer.describe() != described:
        log.say(f"optimizer: {run.optimizer.describe()}")
    if job.plan:
        log.say(memory_line(job.plan))
    compare_answers(run, log)
    push(run, log, names)
    say_usage(run, log, names)


def train(run: Run, log: RunLog, stop: StopRequest) -> str:
    """Take the run's steps until its end or a signal; once in a while evaluate, log, answer, save.

    Returns:
        The name of the signal that stopped the run; empty where the run came to its end.
    """
    job, config, state = run.job, run.config, run.state

    def is_due(every: int) -> bool:
        if every == EPOCH:
            return job.epochs.is_end(state.step)
        return every > 0 and state.step % every == 0

    # the row of step 0, or the row whose evaluation an earlier process did not finish
    row = state.unevaluated if job.resumed else log.row(state, 0.0)
    if job.evaluation and row and not evaluate_and_log(run, log, stop, row):
        return name_of_signal(run, stop)
    while not run.is_over:
        if name := name_of_signal(run, stop):
            return name
        run.pending.append(train_step(run))
        log.advance()

        is_last = state.step == job.num_steps
        logs = is_last or is_due(config.eval_steps) or is_due(config.logging_steps)
        evaluates = job.evaluation and (is_last or is_due(config.eval_steps))
        answers = job.prompt and is_due(config.sample_steps) and not is_last
        saves = is_due(config.save_steps) and not is_last
        if not (logs or answers or saves or len(run.pending) == config.max_bad_steps):
            continue
        with run.ranks.sharing_shortage():
            figures = settle(run, log)

        if logs:
            row = log.row(state, job.epochs.epochs_after(state.step), figures)
            if not evaluates:
                log.add(row)
            elif not evaluate_and_log(run, log, stop, row):
                return name_of_signal(run, stop)

        if answers:
            say_answer(run, log)

        if saves and not run.is_over:
            save_if_disk_allows(run, log)
    return ""


def name_of_signal(run: Run, stop: StopRequest) -> str:
    """Name the signal that asked any of the ranks to stop; empty where there was none."""
    number = run.ranks.largest(stop.number)
    return signal.Signals(number).name if number else ""


def train_step(run: Run) -> PendingStep:
    """Take one optimizer step over its micro-batches and count it in the run's state.

        gradient = d/dadapter  sum over all micro-batches of the loss / the step's target tokens

    The divisor counts the target tokens of the whole step. So the gradient does not depend on how
    samples are split into micro-batches, nor on how micro-batches are split over ranks; a short
    last step is no exception.

    Note:
        Does not wait for the device: `settle` counts updates and skipped steps, and reads the loss
        scale, later.

    Raises:
        RankOutOfMemory: a micro-batch or the moments do not fit; the run is as it was before.
    """
    config, state, epochs = run.config, run.state, run.job.epochs
    optimizer, scale = run.optimizer, run.loss_scale
    micro_batches = epochs.micro_batches(state.step)
    num_tokens, num_targets = epochs.count(micro_batches)
    learning_rate = learning_rate_at(
        state.step,
        run.job.num_steps,
        num_warmup_steps(run.job.num_steps, config.warmup_ratio, config.warmup_steps),
        config.learning_rate,
        config.lr_scheduler,
    )
    optimizer.gradients.zero_()
    total_loss = torch.zeros((), device=run.model.device)
    own = run.ranks.share(micro_batches)
    with run.ranks.sharing_shortage():
        for index, rows in own:
            batch = epochs.batch(rows)
            if index == own[-1][0]:
                # paged moments come back to the device beside the last micro-batch
                optimizer.prefetch()
            seed = dropout_seed(config.seed, state.step, index)
            factor = scale.scale / num_targets
            total_loss += run.micro_step(batch, factor, seed)
        if not own:
            # a rank without micro-batches runs out of memory here, before any rank takes the step
            optimizer.prefetch()
    run.ranks.add_up(optimizer.gradients.values)
    run.ranks.add_up(total_loss)
    total_loss /= num_targets
    grad_norm = optimizer.step(learning_rate, config.max_grad_norm, scale.scale)
    scale.update(grad_norm)

    state.step += 1
    state.tokens += num_tokens
    state.target_tokens += num_targets
    return PendingStep(state.step, total_loss, grad_norm, learning_rate)


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Derive a micro-batch's seed from its place: a resumed run needs no random state."""
    return hash_of(f"{seed} {step} {micro_batch}")


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:HASH_BYTES], "big")


if __name__ == "__main__":
    guard_output()
    try:
        with LastDoor():
            main(sys.argv[1:])
    except (ValueError, OSError, CannotGoOn, RankError, KernelDoesNotFit) as error:
        # a mistake of the user, a refusal of the disk or the device: no traceback
        end(error)
    except KeyboardInterrupt:
        sys.exit("interrupted: what is not in a checkpoint is lost")
    finally:
        end_at_once()
