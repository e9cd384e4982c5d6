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
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import audit
from data.batches import Batch, collate, epoch_order, epoch_steps, step_micro_batches
from data.dataset import Dataset, load_dataset
from data.packing import Packing, collate_packed, mean_sample_tokens
from data.sources import Use, find_data
from data.tokenizer import Tokenizer
from hub.push import check_push, push_folder
from llama.checkpoint import find_checkpoint, frozen_bytes, load_model, settle_quantization
from llama.config import LlamaConfig, LongRopeScaling, read_config
from llama.generation import generate_greedy
from llama.memory_plan import CONTEXT_BYTES, GIB, MemoryPlan, plan_memory, plan_within
from llama.micro_step import POLICIES, MicroStep, padded_tokens
from llama.model import Llama, projection_shapes, projections, update_sizes
from llama.step_time import measure_rates, step_seconds
from llama.workload import Workload
from lora.adapter_file import find_adapter, load_adapter, read_adapter_config, save_adapter
from lora.config import LoRAConfig, resolve_target_modules
from optim.adamw import AdamW, moment_bytes_per_element
from optim.loss_scale import LossScale
from optim.schedule import learning_rate_at, num_warmup_steps
from optim.state_memory import OrdinaryMemory
from optim.unified_memory import paged_memory
from run.atomic import new_files, write_text
from run.checkpoint import RunState, load_checkpoint, save_checkpoint
from run.config import TrainConfig, parse_config
from run.folder import check_output, choose_output, open_output, resume_point
from run.machine import choose_device, choose_dtype
from run.metrics import MetricsFile, Progress, Row, peak_memory_bytes, read_rows
from run.model_card import CARD_FILE, model_card

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
    "sample_prompt": "Write a verse about Ember.",
}
DEFAULT_MAX_LENGTH = 2048
SAMPLE_TOKENS = 100
# float16's loss scale finds its level within fewer
MAX_SKIPPED_IN_A_ROW = 30

# asked for at every step, made once an epoch: shuffling a million samples takes 30 ms
order_of_epoch = functools.lru_cache(maxsize=1)(epoch_order)


@dataclass
class Run:
    """A run between two steps: what a step changes, and what it needs."""

    config: TrainConfig
    lora: LoRAConfig
    model: Llama
    micro_step: MicroStep
    optimizer: AdamW
    loss_scale: LossScale
    train_data: Dataset
    packing: Packing | None
    eval_data: Dataset | None
    state: RunState
    num_steps: int

    @property
    def num_rows(self) -> int:
        """Of an epoch: samples, or rows of several."""
        return self.packing.num_rows if self.packing else len(self.train_data.samples)


@dataclass(frozen=True)
class PendingResult:
    """A step whose figures the device may still be computing."""

    step: int
    loss: Tensor  # () float32
    grad_norm: Tensor  # () float32
    learning_rate: float


@dataclass(frozen=True)
class StepResult:
    step: int
    loss: float  # nats per target token
    grad_norm: float  # before clipping
    learning_rate: float

    @property
    def is_skipped(self) -> bool:
        """The gradients were not finite."""
        return not math.isfinite(self.grad_norm)


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
    if config.push_to_hub and not config.plan:
        check_push(config.push_to_hub)
    device = torch.device(config.device)
    prepare(device, config.deterministic)

    resumed = resume_point(config)
    saved = load_checkpoint(resumed) if resumed else None
    state = saved[0] if saved else RunState(started=datetime.now().isoformat())
    if resumed:
        print(f"resumed from {resumed}: {state.step:,} steps done")
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
    prompt = encode_prompt(config.sample_prompt, tokenizer)

    packing = pack(config, train_data) if config.packing else None
    num_rows = packing.num_rows if packing else len(train_data.samples)
    work = workload(config, lora, llama_config, checkpoint_folder, train_data, num_rows)
    plan = plan_run(config, work)
    if config.plan:
        print(describe_plan(config, work, plan, train_data, num_rows))
        return

    model = load(checkpoint_folder, config, device)
    model.attach_lora(lora, config.seed)
    print(model.describe_trainable_parameters())
    if start := resumed or init_adapter:
        load_adapter(start, model.adapter_tensors())
    optimizer = make_optimizer(model, config)
    described = optimizer.describe()
    print(f"optimizer: {described}")
    loss_scale = LossScale.for_dtype(model.compute_dtype, device)
    if saved:
        optimizer.load_state(saved[1], state.num_updates)
        loss_scale.load_state(state.loss_scale, state.num_good_steps)

    num_steps = count_steps(config, num_rows)
    micro_step = MicroStep(model, plan.policies, captures=device.type == "cuda")
    if device.type == "cuda" and num_steps:
        preflight(longest_batch(config, train_data, packing), micro_step, loss_scale)
        print(memory_line(plan))

    # only now, when nothing that was given can be wrong any more, is anything written
    open_output(config)
    write_text(Path(config.output) / audit.AUDIT_FILE, audit.to_json(audits))
    run = Run(
        config,
        lora,
        model,
        micro_step,
        optimizer,
        loss_scale,
        train_data,
        packing,
        eval_data,
        state,
        num_steps,
    )
    before = answer(run, tokenizer, prompt)
    train(run)
    if optimizer.describe() != described:
        print(f"optimizer: {optimizer.describe()}")
    if device.type == "cuda":
        print(memory_line(plan))
    if num_steps:
        save_results(run, tokenizer)
    after = answer(run, tokenizer, prompt)
    if before is not None:
        print(f"\nprompt  {config.sample_prompt}\nbefore  {before}\nafter   {after}")


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
    if config.max_steps == 0 and not (config.eval_data or config.eval_fraction):
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
        packing = device == "cuda" and max_length <= longest_row
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
    data: Dataset,
    num_rows: int,
) -> Workload:
    """Size the largest micro-batch of the run."""
    longest = len(data.longest.input_ids)
    sample_tokens = None
    if config.packing:
        longest = config.max_length
        sample_tokens = mean_sample_tokens(data.samples.lengths.tolist())
    on_device = config.device == "cpu" or config.optimizer_residency != "host"
    return Workload(
        config=llama,
        lora=lora,
        frozen_bytes=frozen_bytes(folder, quantization_of(config)),
        moment_bytes=moment_bytes_per_element(config.optim == "paged_adamw_8bit") * on_device,
        batch=min(config.batch_size, num_rows),
        tokens=padded_tokens(longest, torch.device(config.device)),
        dtype=getattr(torch, config.dtype),
        sample_tokens=sample_tokens,
    )


def plan_run(config: TrainConfig, work: Workload) -> MemoryPlan:
    """Choose what every layer does with its activations, so that the run fits the GPU.

    Raises:
        ValueError: it does not; the message names the nearest settings that would.
    """
    if config.device == "cpu":
        policy = POLICIES.get(config.activations, POLICIES["keep"])
        return plan_memory(work, (policy,) * work.config.num_hidden_layers)
    # the context is there already; a plan has been 2 % too low
    available = int(0.97 * torch.cuda.mem_get_info()[0]) + CONTEXT_BYTES
    budget = min(config.max_memory_bytes or available, available)
    return plan_within(work, POLICIES.get(config.activations), budget)


def describe_plan(
    config: TrainConfig, work: Workload, plan: MemoryPlan, data: Dataset, num_rows: int
) -> str:
    """Say what the run will take: memory, tokens and, where there is a GPU, time."""
    text = f"plan for micro-batches of {work.batch} x {work.tokens:,} tokens\n{plan.table()}"
    num_steps, epoch_length = count_steps(config, num_rows), steps_of_epoch(config, num_rows)
    total = data.num_tokens * num_steps / epoch_length
    text += f"\n{num_steps:,} steps over about {total:,.0f} tokens"
    if config.device == "cuda":
        rates = measure_rates(torch.device("cuda"), work.dtype)
        seconds = step_seconds(work, plan.policies, rates)
        speed = work.M / seconds
        text += f", {speed:,.0f} tokens/s: about {total / speed / 60:,.0f} min without padding"
    return text


def pack(config: TrainConfig, data: Dataset) -> Packing:
    """Distribute the samples over rows of --max-length tokens, and say how full they are."""
    lengths = data.samples.lengths.tolist()
    packing = Packing(lengths, config.max_length, config.seed, config.shuffle)
    share = sum(lengths) / (packing.num_rows * packing.row_length)
    print(
        f"packed into {packing.num_rows:,} rows of {packing.row_length:,} tokens, {share:.1%} full"
    )
    return packing


def longest_batch(config: TrainConfig, data: Dataset, packing: Packing | None) -> Batch:
    """Make the largest micro-batch that may come, of the longest sample."""
    longest = data.longest
    if packing:
        num_rows = min(config.batch_size, packing.num_rows)
        return collate_packed([[longest]] * num_rows, packing.row_length)
    return collate([longest] * min(config.batch_size, len(data.samples)))


def preflight(batch: Batch, micro_step: MicroStep, loss_scale: LossScale) -> None:
    """Run the longest micro-batch once on a GPU, so that what does not fit fails before step 1.

    Raises:
        ValueError: the GPU has not the memory.
    """
    shape = f"{len(batch.input_ids)} x {batch.input_ids.shape[1]:,} tokens"
    start = time.perf_counter()
    try:
        micro_step(batch.input_ids, batch.labels, loss_scale.scale * 0, positions=batch.positions)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the longest micro-batch, {shape}, must fit the GPU: {error}; lower --max-memory, "
            "--batch-size or --max-length"
        ) from None
    seconds = time.perf_counter() - start
    print(f"longest micro-batch: {shape} in {seconds:.1f} s with what is compiled")


def memory_line(plan: MemoryPlan) -> str:
    """Hold the plan against the allocator's peak."""
    return (
        f"layers: {plan.layers()}; memory {torch.cuda.max_memory_reserved() / GIB:.2f} GiB, "
        f"planned {plan.reserved / GIB:.2f}"
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


def count_steps(config: TrainConfig, num_rows: int) -> int:
    if config.max_steps >= 0:
        return config.max_steps
    return math.ceil(config.epochs * steps_of_epoch(config, num_rows))


def steps_of_epoch(config: TrainConfig, num_rows: int) -> int:
    return epoch_steps(num_rows, config.batch_size, config.gradient_accumulation_steps)


def train(run: Run) -> None:
    """Take the run's steps, evaluating, logging and saving on the way."""
    config, state = run.config, run.state
    output = Path(config.output)
    metrics = MetricsFile(output, state.step)
    device = run.model.device
    progress = Progress(run.num_steps, state.step)
    if state.step == 0 and run.eval_data and not metrics.last_row:
        row: Row = {"step": 0, "epoch": 0.0, "tokens": 0, "target_tokens": 0}
        row["eval_loss"] = evaluate(run, run.eval_data)
        row["peak_memory_bytes"] = peak_memory_bytes(device)
        metrics.append(row)
        progress.show(row)

    num_skipped_in_a_row = 0
    pending: list[PendingResult] = []
    since, tokens_then = time.perf_counter(), state.tokens
    while state.step < run.num_steps:
        pending.append(train_step(run))
        is_last = state.step == run.num_steps
        progress.advance()
        is_eval_due = is_last or is_due(config.eval_steps, state)
        is_row_due = is_eval_due or is_due(config.logging_steps, state)
        is_save_due = is_due(config.save_steps, state) and not is_last
        if not (is_row_due or is_save_due or len(pending) == MAX_SKIPPED_IN_A_ROW):
            continue
        # the one place that waits for the device
        results = read(pending, run)
        pending.clear()
        for result in results:
            num_skipped_in_a_row = num_skipped_in_a_row + 1 if result.is_skipped else 0
            state.num_skipped += result.is_skipped
            state.num_updates += not result.is_skipped
            if result.is_skipped:
                progress.say(
                    f"step {result.step}: the gradients are not finite, the adapter is left as it "
                    f"was ({state.num_skipped} steps so far, loss scale {state.loss_scale:g})"
                )
            if num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                progress.close()
                raise RuntimeError(
                    f"gradients must be finite: {num_skipped_in_a_row} steps in a row were not, up "
                    f"to step {result.step}; lower --learning-rate or use --dtype bfloat16"
                )
        if is_row_due:
            result = results[-1]
            seconds = time.perf_counter() - since
            row = {
                "step": state.step,
                "epoch": state.step / steps_of_epoch(config, run.num_rows),
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
                "tokens": state.tokens,
                "target_tokens": state.target_tokens,
                "tokens_per_second": (state.tokens - tokens_then) / seconds,
                "peak_memory_bytes": peak_memory_bytes(device),
            }
            if is_eval_due and run.eval_data:
                row["eval_loss"] = evaluate(run, run.eval_data)
            metrics.append(row)
            progress.show(row)
            since, tokens_then = time.perf_counter(), state.tokens
        if is_save_due:
            save_checkpoint(
                output,
                state,
                run.optimizer.state_tensors(),
                lambda folder: write_adapter(folder, run),
            )
    progress.close()


def is_due(every: int, state: RunState) -> bool:
    return every > 0 and state.step % every == 0


def read(pending: list[PendingResult], run: Run) -> list[StepResult]:
    """Wait for the device and take the figures of steps, and into the state the loss scale."""
    figures = torch.stack([torch.stack((result.loss, result.grad_norm)) for result in pending])
    if run.loss_scale.is_dynamic:
        run.state.loss_scale, run.state.num_good_steps = run.loss_scale.state()
    return [
        StepResult(result.step, loss, grad_norm, result.learning_rate)
        for result, (loss, grad_norm) in zip(pending, figures.tolist(), strict=True)
    ]


def train_step(run: Run) -> PendingResult:
    """Take one optimizer step over its micro-batches and count it in the run's state.

        gradient = d/dadapter  sum over all micro-batches of the loss / the step's target tokens

    The divisor counts the tokens of the whole step, so how samples are split into micro-batches
    does not change the gradient, in a short last step neither.

    Note:
        Does not wait for the device: the run's counters of updates and skipped steps, and its loss
        scale, are what `read` last saw.
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
        total_loss += run.micro_step(batch.input_ids, batch.labels, factor, seed, batch.positions)
    total_loss /= num_targets
    grad_norm = optimizer.step(learning_rate, config.max_grad_norm, scale.scale)
    scale.update(grad_norm)

    state.step += 1
    state.tokens += sum(batch.num_tokens for batch in batches)
    state.target_tokens += num_targets
    return PendingResult(state.step, total_loss, grad_norm, learning_rate)


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Draw a micro-batch's seed from its place alone, so that a resumed run needs no random
    state."""
    digest = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()
    # what an int64 holds
    return int.from_bytes(digest[:7], "big")


def step_batches(run: Run) -> list[Batch]:
    """The micro-batches of the next step, a pure function of the seed and the step's number."""
    config, samples = run.config, run.train_data.samples
    epoch, step_in_epoch = divmod(run.state.step, steps_of_epoch(config, run.num_rows))
    sizes = (step_in_epoch, config.batch_size, config.gradient_accumulation_steps)
    if run.packing is not None:
        rows, row_length = run.packing.rows(epoch), run.packing.row_length
        return [
            collate_packed([[samples[i] for i in row] for row in some_rows], row_length)
            for some_rows in step_micro_batches(rows, *sizes)
        ]
    order = order_of_epoch(len(samples), epoch, config.seed, config.shuffle)
    micro_batches = step_micro_batches(order, *sizes)
    return [collate([samples[i] for i in indices]) for indices in micro_batches]


def evaluate(run: Run, dataset: Dataset) -> float:
    """Compute the mean loss over a data set's target tokens, in nats, dropout off."""
    total, size = 0.0, run.config.batch_size
    for start in range(0, len(dataset.samples), size):
        batch = collate(dataset.samples[start : start + size])
        total += float(run.micro_step.evaluate(batch.input_ids, batch.labels))
    return total / dataset.num_target_tokens


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int] | None:
    """Token ids of --sample-prompt, as a user's message where there is a chat template, None where
    there is no prompt."""
    if not prompt:
        return None
    if not tokenizer.has_chat_template:
        return tokenizer.encode(prompt, add_special_tokens=True)
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.chat_template().render(messages, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def answer(run: Run, tokenizer: Tokenizer, prompt: list[int] | None) -> str | None:
    """Answer the prompt with the most probable tokens, None where there is no prompt."""
    if prompt is None:
        return None
    stop_ids = {*run.model.config.eos_token_ids, tokenizer.eos_token_id}
    new_ids = generate_greedy(run.model, prompt, SAMPLE_TOKENS, stop_ids)
    return tokenizer.decode(new_ids).strip()


def write_adapter(folder: Path, run: Run) -> None:
    save_adapter(folder, run.model.adapter_tensors(), run.lora, run.config.model)


def save_results(run: Run, tokenizer: Tokenizer) -> None:
    """Write the adapter, the tokenizer and the model card into the output folder."""
    output = Path(run.config.output)
    with new_files(output) as folder:
        write_adapter(folder, run)
        tokenizer.save(folder)
        (folder / CARD_FILE).write_text(model_card(run.config, read_rows(output)))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in paths]
    print(f"saved the adapter in {output}")
    if run.config.push_to_hub:
        message = f"LoRA of {run.config.model} after {run.state.step:,} steps"
        print(f"pushed it: {push_folder(output, names, run.config.push_to_hub, message)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        # what the user gave, or what the disk refused: the message is enough
        sys.exit(f"error: {error}")
