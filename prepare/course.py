"""The course of a run: its batches, its evaluations, its steps, and the largest micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from data.epochs import Epochs
from data.shares import Share
from data.tokens.stored_samples import StoredSamples
from optim.schedule import learning_rate_at, num_warmup_steps
from prepare.asked import Asked
from prepare.base import evaluated_at_once, num_shapes, workload
from run.config import TrainConfig
from step.workload import Workload

# the most tokens of an answer to --sample-prompt
SAMPLE_TOKENS = 100


@dataclass(frozen=True)
class Course:
    """What a run goes through.

    Attributes:
        evaluation: the batches of an evaluation, if there is evaluation data.
        work: the largest micro-batch, and what else takes memory beside it.
    """

    epochs: Epochs
    evaluation: Epochs | None
    num_steps: int
    work: Workload

    @property
    def num_tokens(self) -> float:
        """Tokens of all steps, without padding."""
        return self.epochs.num_tokens * self.num_steps / self.epochs.num_steps


def course_of(
    asked: Asked,
    samples: StoredSamples,
    evaluated: StoredSamples | None,
    prompt: list[int] | None,  # tokens of --sample-prompt
    num_ranks: int,
    shares: Sequence[Share] = (),
) -> Course:
    """Put samples into batches, and size the largest of them."""
    config = asked.config
    row_length = config.max_length if config.packing else 0
    num_own = config.gradient_accumulation_steps
    epochs = Epochs(
        samples,
        config.seed,
        config.shuffle,
        config.batch_size,
        num_own * num_ranks,
        row_length=row_length,
        group_by_length=config.group_by_length,
        shares=shares,
    )
    if config.packing:
        print(epochs.describe())
    if num_ranks > 1:
        print(f"{num_ranks} ranks x {num_own} micro-batches x {config.batch_size} rows a step")
    work = workload(config, asked.lora, asked.checkpoint, epochs, num_ranks)
    work = replace(work, planned_gpu=asked.gpu.facts if asked.gpu else None)
    if prompt:
        work = replace(work, prompt_tokens=len(prompt) + SAMPLE_TOKENS)
    evaluation = None
    if evaluated:
        fixed_order = partial(Epochs, evaluated, config.seed, False)
        evaluation = fixed_order(config.batch_size, 1, row_length=row_length)
        num_rows = evaluated_at_once(work, evaluation, config.batch_size)
        work = replace(work, evaluation=(num_rows, evaluation.row_length))
        evaluation = fixed_order(num_rows, 1, row_length=row_length)
        work = replace(work, num_evaluated_shapes=num_shapes(evaluation, asked.device))
    num_steps = config.max_steps
    if num_steps < 0:
        num_steps = epochs.steps_in(config.epochs)
    return Course(epochs, evaluation, num_steps, work)


def schedule_lines(config: TrainConfig, num_steps: int) -> list[str]:
    """Say that the run ends before the learning rate has risen; no line where it does not."""
    num_warmup = num_warmup_steps(num_steps, config.warmup_ratio, config.warmup_steps)
    if not 0 < num_steps < num_warmup:
        return []
    rate, schedule = config.learning_rate, config.lr_scheduler
    highest = learning_rate_at(num_steps - 1, num_steps, num_warmup, rate, schedule)
    steps = f"{num_steps:,} step{'' if num_steps == 1 else 's'}"
    return [
        f"warning: --warmup-steps {num_warmup:,} is more than the {steps} of the run: the learning "
        f"rate rises to {highest:.2e}, and never to --learning-rate {rate:g}"
    ]
