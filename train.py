"""Fine-tune a Llama checkpoint with QLoRA: read this file top to bottom.

    python train.py                                          the bundled model and data
    python train.py --model DIR --data FILE --output OUT     your own

`main` tells the story; its steps follow.
"""

import functools
import hashlib
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import audit
from data.batches import Batch, collate, epoch_steps
from data.dataset import Dataset, load_dataset
from data.epochs import Epochs
from data.prompt import encode_prompt
from data.sources import Use, find_data
from data.tokenizer import Tokenizer
from hub.push import check_push, push_folder
from llama.checkpoint import find_checkpoint, frozen_bytes, load_model, settle_quantization
from llama.config import LlamaConfig, LongRopeScaling, read_config
from llama.generation import generate_greedy
from llama.micro_step import MicroStep, padded_tokens
from llama.model import Llama, projection_shapes, projections, update_sizes
from llama.preflight import describe_plan, memory_line, next_setting, plan_run, preflight
from llama.workload import Workload
from lora.adapter_file import find_adapter, load_adapter, read_adapter_config, save_adapter
from lora.config import LoRAConfig, resolve_target_modules
from optim.adamw import AdamW, moment_bytes_per_element
from optim.loss_scale import LossScale
from optim.schedule import learning_rate_at, num_warmup_steps
from optim.state_memory import OrdinaryMemory
from optim.unified_memory import paged_memory
from run.atomic import new_files, write_text
from run.bad_batch import write_bad_batch
from run.checkpoint import RunState, checkpoint_name, remove_old_checkpoints, save_checkpoint
from run.config import TrainConfig, parse_config
from run.folder import check_output, choose_output, open_output, resume_point
from run.log import RunLog
from run.machine import choose_device, choose_dtype
from run.metrics import Row
from run.model_card import CARD_FILE, model_card
from run.signals import StopRequest
from run.trackers import tracker_names

BUNDLED = Path(__file__).parent / "bundled"
# the fields of a run that names neither a model nor data
BUNDLED_RUN = {
    "model": str(BUNDLED / "model"),
    "data": str(BUNDLED / "data.jsonl"),
    "eval_data": str(BUNDLED / "eval.jsonl"),
    "learning_rate": 2e-3,
    "batch_size": 16,
    "gradient_accumulation_steps": 1,
    "epochs": 6.0,
    # rows of several would leave a data set as small as this one too few steps
    "packing": False,
    "sample_prompt": "Write a verse about Ember.",
}
DEFAULT_MAX_LENGTH = 2048
SAMPLE_TOKENS = 100


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

    config: TrainConfig
    lora: LoRAConfig
    model: Llama
    tokenizer: Tokenizer
    micro_step: MicroStep
    optimizer: AdamW
    loss_scale: LossScale
    epochs: Epochs
    eval_data: Dataset | None
    prompt: list[int] | None
    state: RunState
    num_steps: int
    pending: list[PendingStep] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)  # the adapter of the lowest eval_loss

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def is_over(self) -> bool:
        patience = self.config.early_stopping_patience
        return self.state.step == self.num_steps or (
            patience > 0 and self.state.num_evaluations_since_best >= patience
        )


def main(arguments: Sequence[str]) -> None:
    # torch's allocator then leaves hardly any holes between tensors; it asks once, at its first
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    config = parse_config(arguments, without_model=BUNDLED_RUN)
    checkpoint_folder = find_checkpoint(config.model)
    llama_config = read_config(checkpoint_folder)
    lora = lora_config(config, projections(llama_config))
    init_adapter = (
        find_adapter(config.init_adapter, "--init-adapter") if config.init_adapter else None
    )
    if init_adapter:
        lora = lora_of_init_adapter(init_adapter, config, lora, projection_shapes(llama_config))
    config = resolve(follow_checkpoint(config, checkpoint_folder), llama_config)
    check_output(config)
    tracker_names(config)
    if config.push_to_hub and not config.plan:
        check_push(config.push_to_hub)
    device = torch.device(config.device)
    prepare(device, config.deterministic)

    resumed, damaged = resume_point(config)
    for complaint in damaged.values():
        print(f"{complaint}; going back to the one before it")
    state = resumed.state if resumed else RunState(started=datetime.now().isoformat())
    if resumed:
        print(f"resumed from {resumed.path}: {state.step:,} steps done")
    elif config.resume:
        print(f"nothing to resume in {config.output}: starting from the first step")

    tokenizer = Tokenizer.from_folder(checkpoint_folder, config.chat_template)
    train_data, eval_data = load_data(config, tokenizer, llama_config, state)
    if config.inspect:
        return
    sets = {"train": train_data} | ({"eval": eval_data} if eval_data else {})
    audits = {name: audit.facts_of(dataset, tokenizer) for name, dataset in sets.items()}
    if resumed:
        audit.check_same(Path(config.output) / audit.AUDIT_FILE, audits)
    prompt = encode_prompt(config.sample_prompt, tokenizer) if config.sample_prompt else None

    epochs = Epochs(
        train_data.samples,
        train_data.samples.lengths.tolist(),
        config.seed,
        config.shuffle,
        row_length=config.max_length if config.packing else 0,
        group=config.batch_size if config.group_by_length else 0,
    )
    if config.packing:
        print(epochs.describe())
    num_steps = count_steps(config, epochs)
    work = workload(config, lora, llama_config, checkpoint_folder, epochs)
    plan = plan_run(work, device, config.activations, config.max_memory_bytes)
    if config.plan:
        num_tokens = epochs.num_tokens * num_steps / steps_of_epoch(config, epochs)
        print(describe_plan(work, plan, device, num_steps, num_tokens))
        return

    model = load(checkpoint_folder, config, device)
    model.attach_lora(lora, config.seed)
    print(model.describe_trainable_parameters())
    if start := resumed.path if resumed else init_adapter:
        load_adapter(start, model.adapter_tensors())
    optimizer = make_optimizer(model, config)
    described = optimizer.describe()
    print(f"optimizer: {described}")
    loss_scale = LossScale.for_dtype(model.compute_dtype, device)
    if resumed:
        optimizer.load_state(resumed.moments, state.num_updates)
        loss_scale.load_state(state.loss_scale, state.num_good_steps)

    micro_step = MicroStep(
        model, plan.policies, config.neftune_noise_alpha, captures=device.type == "cuda"
    )
    if device.type == "cuda" and num_steps:
        batch = epochs.largest_batch(config.batch_size)
        given = (batch.input_ids, batch.labels, batch.positions, batch.lengths)
        preflight(micro_step, *given, loss_scale.scale)
        print(memory_line(plan))

    # only now, when nothing that was given can be wrong any more, is anything written
    open_output(config, damaged)
    write_text(Path(config.output) / audit.AUDIT_FILE, audit.to_json(audits))
    run = Run(
        config,
        lora,
        model,
        tokenizer,
        micro_step,
        optimizer,
        loss_scale,
        epochs,
        eval_data,
        prompt,
        state,
        num_steps,
        best=resumed.best if resumed else {},
    )
    shortage = ""
    with StopRequest() as stop, RunLog(config, state, num_steps) as log:
        if run.prompt and not log.answers():
            log.add_answer(state.step, answer(run))
        try:
            train(run, log, stop)
        except torch.OutOfMemoryError as error:
            shortage = str(error).partition("\n")[0]
        if shortage or not run.is_over:
            path = save(run, log)
        else:
            restore_best(run, log)
            if run.prompt:
                log.add_answer(state.step, answer(run))
    if shortage:
        raise CannotGoOn(
            f"the GPU's memory must suffice for step {state.step + 1}: {shortage}; {path} has the "
            f"run as it stands; try {next_setting(work, plan, device)}"
        )
    if not run.is_over:
        print(
            f"stopped by {stop.signal} after step {state.step:,} of {num_steps:,}: {path} has the "
            "run as it stands, --resume goes on from there"
        )
        return
    if optimizer.describe() != described:
        print(f"optimizer: {optimizer.describe()}")
    if device.type == "cuda":
        print(memory_line(plan))
    if num_steps:
        save_results(run, log.rows)
    if answers := log.answers():
        print(f"\nprompt  {config.sample_prompt}\nbefore  {answers[0]}\nafter   {answers[-1]}")


def follow_checkpoint(config: TrainConfig, folder: Path) -> TrainConfig:
    """Take the quantization of a checkpoint that is in NF4 already.

    Raises:
        ValueError: the flags ask for another one.
    """
    default = (TrainConfig.block_size, TrainConfig.double_quant)
    settled = settle_quantization(folder, quantization_of(config), default)
    if settled is None:
        return config
    block_size, double_quant = settled
    return replace(config, block_size=block_size, double_quant=double_quant)


def resolve(config: TrainConfig, llama_config: LlamaConfig) -> TrainConfig:
    """Replace every `auto` and default by what this machine and this checkpoint make of it.

    Raises:
        ValueError: a device that is not there, a residency without one, or a length beyond the
            model's positions.
    """
    device = choose_device(config.device)
    if device == "cpu" and config.optimizer_residency != "auto":
        raise ValueError(
            "--optimizer-residency must be auto on a CPU, where moments do not move: "
            f"got {config.optimizer_residency}"
        )
    if device == "cpu" and (config.activations == "offload" or config.max_memory):
        raise ValueError(
            "--activations offload and --max-memory must be given for a GPU: the device is the CPU"
        )
    dtype = choose_dtype(config.dtype, device)
    positions = llama_config.max_position_embeddings
    max_length = config.max_length or min(DEFAULT_MAX_LENGTH, positions)
    if max_length > positions:
        raise ValueError(
            f"--max-length must be at most the model's {positions:,} positions: got {max_length:,}"
        )
    has_evaluation = bool(config.eval_data or config.eval_fraction)
    if config.early_stopping_patience and not (has_evaluation and config.eval_steps):
        raise ValueError(
            "--early-stopping-patience must be given with --eval-steps, and --eval-data or "
            f"--eval-fraction: got no {'--eval-steps' if has_evaluation else '--eval-data'}"
        )
    if config.max_steps == 0 and not has_evaluation:
        raise ValueError(
            "--max-steps 0 evaluates only and must be given --eval-data or --eval-fraction: got "
            "none"
        )
    scaling = llama_config.rope_scaling
    # in longer rows the frequencies depend on how long each sample is
    longest_row = (
        scaling.original_max_position_embeddings
        if isinstance(scaling, LongRopeScaling)
        else max_length
    )
    if config.packing and max_length > longest_row:
        raise ValueError(
            f"--packing must be given with a --max-length of at most {longest_row:,}, which this "
            f"model's first frequencies are for: got {max_length:,}"
        )
    packing = config.packing
    if packing is None:
        packing = device == "cuda" and max_length <= longest_row and not config.group_by_length
    return choose_output(
        replace(config, device=device, dtype=dtype, max_length=max_length, packing=packing)
    )


def lora_config(config: TrainConfig, names: Sequence[str]) -> LoRAConfig:
    """The adapter's shape, from the flags.

    Args:
        names: of the model's projections.

    Raises:
        ValueError: an unknown target module, or a number out of range.
    """
    requested = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    return LoRAConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=resolve_target_modules(requested, names),
        use_rslora=config.use_rslora,
    )


def lora_of_init_adapter(
    folder: Path, config: TrainConfig, lora: LoRAConfig, paths: Iterable[str]
) -> LoRAConfig:
    """The shape of the adapter to start from, which may have patterns that no flag can say.

    Args:
        lora: what the flags ask for.
        paths: of the model's projections.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: it is no plain LoRA of this model, or the flags contradict it.
    """
    given = read_adapter_config(folder)
    names = {path.rpartition(".")[2] for path in update_sizes(given, paths)}
    has = (given.r, given.lora_alpha, given.use_rslora, names)
    asked = (lora.r, lora.lora_alpha, lora.use_rslora, set(lora.target_modules))
    if has != asked:
        raise ValueError(
            f"--init-adapter must have the shape that the flags ask for: it has {given}, the "
            f"flags {lora}; give the adapter's --lora-r, --lora-alpha, --target-modules and "
            "--use-rslora"
        )
    return replace(given, lora_dropout=lora.lora_dropout)


def prepare(device: torch.device, is_deterministic: bool) -> None:
    """Choose how torch computes and takes memory on a GPU, before either begins."""
    if device.type == "cuda":
        # cuBLAS asks for a fixed workspace before its first call: then a product repeats its bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(is_deterministic)
        # that also fills every empty tensor with NaN, which costs a pass over each; the stubs of
        # torch 2.13 do not know the switch
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore


def load_data(
    config: TrainConfig, tokenizer: Tokenizer, llama: LlamaConfig, state: RunState
) -> tuple[Dataset, Dataset | None]:
    """Tokenize what is learned from and what is evaluated on, and say what it is.

    Raises:
        ValueError: data that cannot be read, or would teach the wrong thing.
    """

    def load(flag: str, place: str, use: Use) -> Dataset:
        files = find_data(place, flag, use)
        with tqdm(desc="tokenizing", unit=" records", disable=None, leave=False) as bar:

            def report(num_records: int) -> None:
                bar.update(num_records - bar.n)

            dataset = load_dataset(
                files,
                tokenizer,
                data_format=config.data_format,
                text_field=config.text_field,
                max_length=config.max_length,
                train_on=config.train_on,
                vocab_size=llama.vocab_size,
                now=datetime.fromisoformat(state.started),
                skip_bad_lines=config.skip_bad_lines,
                num_processes=config.dataset_num_proc,
                report=report,
            )
        audit.say(f"{place}: {audit.describe(dataset)}")
        for index in range(min(config.inspect or int(use == "train"), len(dataset.samples))):
            audit.say_sample(dataset, index, tokenizer, is_shortened=not config.inspect)
        audit.check(dataset, flag, allow_truncation=config.allow_truncation)
        return dataset

    train_data = load("--data", config.data, "train")
    if config.eval_fraction:
        train_data, eval_data = train_data.split(config.eval_fraction)
        print(
            f"--eval-fraction {config.eval_fraction:g}: {len(train_data.samples):,} samples to "
            f"learn from, {len(eval_data.samples):,} to evaluate on"
        )
        return train_data, eval_data
    if not config.eval_data:
        return train_data, None
    eval_data = load("--eval-data", config.eval_data, "eval")
    if shared := audit.num_shared(train_data, eval_data):
        print(
            f"{shared:,} of the {len(eval_data.samples):,} samples to evaluate on are among those "
            "to learn from"
        )
    return train_data, eval_data


def quantization_of(config: TrainConfig) -> tuple[int, bool] | None:
    return (config.block_size, config.double_quant) if config.quant == "nf4" else None


def load(folder: Path, config: TrainConfig, device: torch.device) -> Llama:
    """Load the checkpoint onto the device, quantizing each tensor as it arrives, if it is not."""
    quantization = quantization_of(config)
    with tqdm(desc="loading", unit="tensor", disable=None, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return load_model(folder, device, getattr(torch, config.dtype), quantization, report)


def workload(
    config: TrainConfig,
    lora: LoRAConfig,
    llama: LlamaConfig,
    folder: Path,
    epochs: Epochs,
) -> Workload:
    """Size the largest micro-batch of the run."""
    on_device = config.device == "cpu" or config.optimizer_residency != "host"
    return Workload(
        config=llama,
        lora=lora,
        frozen_bytes=frozen_bytes(folder, quantization_of(config)),
        moment_bytes=moment_bytes_per_element(config.optim == "paged_adamw_8bit") * on_device,
        batch=min(config.batch_size, epochs.num_rows),
        tokens=padded_tokens(epochs.row_length, torch.device(config.device)),
        dtype=getattr(torch, config.dtype),
        sample_tokens=epochs.packed_sample_tokens,
    )


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


def count_steps(config: TrainConfig, epochs: Epochs) -> int:
    if config.max_steps >= 0:
        return config.max_steps
    return math.ceil(config.epochs * steps_of_epoch(config, epochs))


def steps_of_epoch(config: TrainConfig, epochs: Epochs) -> int:
    return epoch_steps(epochs.num_rows, config.batch_size, config.gradient_accumulation_steps)


def train(run: Run, log: RunLog, stop: StopRequest) -> None:
    """Take the run's steps until its end or a signal, evaluating, logging and saving on the way."""
    config, state = run.config, run.state
    if state.step == 0 and run.eval_data and not log.rows:
        log.add(log.row(state, 0.0) | {"eval_loss": evaluate(run, run.eval_data)})
    while not (run.is_over or stop.signal):
        run.pending.append(train_step(run))
        log.advance()
        is_last = state.step == run.num_steps
        is_eval_due = is_last or is_due(config.eval_steps, state)
        is_row_due = is_eval_due or is_due(config.logging_steps, state)
        is_save_due = is_due(config.save_steps, state) and not is_last
        is_sample_due = run.prompt and is_due(config.sample_steps, state) and not is_last
        is_read_due = is_row_due or is_save_due or is_sample_due
        if not is_read_due and len(run.pending) < config.max_bad_steps:
            continue
        figures = settle(run, log)
        if is_row_due:
            row = log.row(state, state.step / steps_of_epoch(config, run.epochs), figures)
            if is_eval_due and run.eval_data:
                row["eval_loss"] = evaluate(run, run.eval_data)
            log.add(row)
        if is_sample_due:
            log.add_answer(state.step, answer(run))
            log.say(f"step {state.step}: {config.sample_prompt} -> {log.answers()[-1]}")
        if is_save_due and not run.is_over:
            try:
                save(run, log)
            except OSError as error:
                log.say(f"step {state.step}: no checkpoint, the run goes on: {error}")


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
            indices = [i for rows in step_rows(run, p.step - 1) for row in rows for i in row]
            samples = {i: run.epochs.samples[i] for i in indices}
            path = write_bad_batch(run.output, p.step, figures, samples, run.tokenizer)
            raise CannotGoOn(
                f"gradients must be finite: {state.num_skipped_in_a_row} steps in a row were not, "
                f"up to step {p.step} with loss {loss}; its batch is in {path}; look at it, lower "
                "--learning-rate or use --dtype bfloat16"
            )
    pending.clear()
    return figures


def save(run: Run, log: RunLog) -> Path:
    """Write a checkpoint of the run as it stands, unless it is there already.

    Raises:
        OSError: the disk refused; the checkpoints before it are as they were.
    """
    if run.pending:
        settle(run, log)
    path = run.output / checkpoint_name(run.state)
    if not path.exists():
        save_checkpoint(
            path,
            run.state,
            run.optimizer.state_tensors(),
            lambda folder: write_adapter(folder, run),
            run.best,
        )
        if run.config.save_total_limit:
            remove_old_checkpoints(run.output, run.config.save_total_limit)
    return path


def train_step(run: Run) -> PendingStep:
    """Take one optimizer step over its micro-batches and count it in the run's state.

        gradient = d/dadapter  sum over all micro-batches of the loss / the step's target tokens

    The divisor counts the tokens of the whole step, so how samples are split into micro-batches
    does not change the gradient, in a short last step neither.

    Note:
        Does not wait for the device: the run's counters of updates and skipped steps, and its loss
        scale, are what `settle` last saw.
    """
    config, state, optimizer, scale = run.config, run.state, run.optimizer, run.loss_scale
    batches = step_batches(run)
    num_targets = sum(batch.num_target_tokens for batch in batches)
    learning_rate = learning_rate_at(
        state.step,
        run.num_steps,
        num_warmup_steps(run.num_steps, config.warmup_ratio),
        config.learning_rate,
        config.lr_scheduler,
    )
    optimizer.zero_grad()
    total_loss = torch.zeros((), device=run.model.device)
    for index, batch in enumerate(batches):
        if index == len(batches) - 1:
            # what is paged out comes back beside the last micro-batch
            optimizer.prefetch()
        seed = dropout_seed(config.seed, state.step, index)
        factor = scale.scale / num_targets
        total_loss += run.micro_step(
            batch.input_ids, batch.labels, factor, seed, batch.positions, batch.lengths
        )
    total_loss /= num_targets
    grad_norm = optimizer.step(learning_rate, config.max_grad_norm, scale.scale)
    scale.update(grad_norm)

    state.step += 1
    state.tokens += sum(batch.num_tokens for batch in batches)
    state.target_tokens += num_targets
    return PendingStep(state.step, total_loss, grad_norm, learning_rate)


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Draw a micro-batch's seed from its place alone, so that a resumed run needs no random
    state."""
    digest = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()
    # what an int64 holds
    return int.from_bytes(digest[:7], "big")


def step_batches(run: Run) -> list[Batch]:
    """The micro-batches of the next step."""
    return [run.epochs.batch(rows) for rows in step_rows(run, run.state.step)]


def step_rows(run: Run, step: int) -> list[list[list[int]]]:
    """The samples of each row of a step's micro-batches: it follows from the step's number."""
    config = run.config
    epoch, step_in_epoch = divmod(step, steps_of_epoch(config, run.epochs))
    return run.epochs.micro_batches(
        epoch, step_in_epoch, config.batch_size, config.gradient_accumulation_steps
    )


def evaluate(run: Run, dataset: Dataset) -> float:
    """Compute the mean loss over a data set's target tokens, in nats, dropout off.

    Where the run may end early, the adapter is kept if none has had a lower loss.
    """
    total, size = 0.0, run.config.batch_size
    for start in range(0, len(dataset.samples), size):
        batch = collate(dataset.samples[start : start + size])
        total += float(run.micro_step.evaluate(batch.input_ids, batch.labels))
    eval_loss = total / dataset.num_target_tokens
    if run.state.note_evaluation(eval_loss) and run.config.early_stopping_patience:
        # two on the device would be one too many
        run.best = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in run.model.adapter_tensors().items()
        }
    return eval_loss


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


def answer(run: Run) -> str:
    """Answer --sample-prompt with the most probable tokens."""
    assert run.prompt is not None
    stop_ids = {*run.model.config.eos_token_ids, run.tokenizer.eos_token_id}
    new_ids = generate_greedy(run.model, run.prompt, SAMPLE_TOKENS, stop_ids)
    return run.tokenizer.decode(new_ids).strip()


def write_adapter(folder: Path, run: Run) -> None:
    save_adapter(folder, run.model.adapter_tensors(), run.lora, run.config.model)


def save_results(run: Run, rows: Sequence[Row]) -> None:
    """Write the adapter, the tokenizer and the model card into the output folder."""
    output = run.output
    with new_files(output) as folder:
        write_adapter(folder, run)
        run.tokenizer.save(folder)
        (folder / CARD_FILE).write_text(model_card(run.config, rows))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in paths]
    print(f"saved the adapter in {output}")
    if run.config.push_to_hub:
        message = f"LoRA of {run.config.model} after {run.state.step:,} steps"
        print(f"pushed it: {push_folder(output, names, run.config.push_to_hub, message)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, CannotGoOn) as error:
        # what the user gave, or what the disk or the device refused: the message is enough
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what is not in a checkpoint is lost")
