"""--plan: what a run would take, said without its weights and without its GPU.

config.json                          is enough for the model
--gpu NAME or --max-memory SIZE      stand for a GPU that is not here
--data                               is counted where it is given, else rows are full
"""

from dataclasses import replace
from datetime import datetime

from checkpoint.loading import describe_loading
from data.tokenizer import Tokenizer
from data.tokens.stored_samples import full_rows
from foreign.terminal import one_line
from prepare.asked import Asked
from prepare.base_compute import describe_base_compute
from prepare.course import Course, course_of, schedule_lines
from prepare.data import load_data, prompt_of
from step.duration import Rates, measure_rates
from step.gpus import smallest_with
from step.memory_plan import GIB, DoesNotFit, MemoryPlan, plan_within
from step.micro_step import POLICIES
from step.preflight import describe_plan, plan_run
from step.workload import Workload


def say_plan(asked: Asked, num_ranks: int, now: datetime) -> None:
    """Plan a run, and print what it would take.

    Raises:
        FileNotFoundError, ValueError: the data are not as they must be, or the run does not fit;
            the message names the nearest settings that would.
    """
    checkpoint, gpu = asked.checkpoint, asked.gpu
    if not checkpoint.shards:
        dtype = str(checkpoint.embeddings.dtype).removeprefix("torch.")
        name = asked.config.model
        print(one_line(f"{name}: planned from config.json alone, as stored in {dtype}"))
    course = _with_data(asked, num_ranks, now) if asked.config.data else _full(asked, num_ranks)
    if asked.config.inspect:
        return
    plan = _plan(asked, course.work)
    work = course.work
    for line in [*describe_loading(checkpoint, work.dtype), *describe_base_compute(work.model)]:
        print(one_line(line))
    if gpu:
        print(
            f"GPU: {gpu.name}, compute capability {'.'.join(map(str, gpu.facts.capability))}, "
            f"{_budget(asked) / GIB:.2f} GiB for the run; {asked.config.dtype}"
        )
    rates = _rates(asked, course.work)
    text = describe_plan(course.work, plan, rates, course.num_steps, course.num_tokens)
    print(text if rates or not gpu else f"{text}; no time: its rates were not measured here")


def _with_data(asked: Asked, num_ranks: int, now: datetime) -> Course:
    config, checkpoint = asked.config, asked.checkpoint
    tokenizer = Tokenizer.from_folder(checkpoint.folder, config.chat_template)
    train_data, eval_data = load_data(config, tokenizer, checkpoint, now.isoformat())
    prompt = prompt_of(config, tokenizer, checkpoint)
    evaluated = eval_data.samples if eval_data else None
    course = course_of(asked, train_data.samples, evaluated, prompt, num_ranks, train_data.shares)
    for line in schedule_lines(config, course.num_steps):
        print(line)
    return course


def _full(asked: Asked, num_ranks: int) -> Course:
    """Let every row be full; without --max-steps a single step is planned."""
    config = replace(asked.config, epochs=1.0)
    print(f"no --data: every row is taken to have {config.max_length:,} tokens")
    num_rows = config.batch_size * config.gradient_accumulation_steps * num_ranks
    samples = full_rows(num_rows, config.max_length)
    return course_of(replace(asked, config=config), samples, None, None, num_ranks)


def _budget(asked: Asked) -> int:
    """Count what the run may take of the GPU that it is planned for."""
    assert asked.gpu
    return min(asked.config.max_memory_bytes or asked.gpu.budget, asked.gpu.budget)


def _plan(asked: Asked, work: Workload) -> MemoryPlan:
    config = asked.config
    if asked.gpu is None:
        return plan_run(work, asked.device, config.activations, config.max_memory_bytes)
    try:
        return plan_within(work, POLICIES.get(config.activations), _budget(asked))
    except DoesNotFit as error:
        larger = smallest_with(error.num_bytes)
        where = f"the smallest known here is {larger.name}" if larger else "none is known here"
        raise ValueError(f"{error}; of GPUs with enough memory {where}") from None


def _rates(asked: Asked, work: Workload) -> Rates | None:
    """Measure the rates of this machine's GPU, or look up those of another."""
    if asked.gpu is None:
        return measure_rates(asked.device, work.dtype) if asked.device.type == "cuda" else None
    # products in 32 bits are slower
    return asked.gpu.rates if work.dtype.itemsize == 2 else None
