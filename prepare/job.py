"""A run before it begins: its flags, checkpoint, adapter, data, batches and plan, checked.

No model is loaded yet, and nothing is written into the output folder: a mistake costs seconds. The
tokens of the data are kept for the next start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from checkpoint.identity import Identity
from checkpoint.loading import describe_loading
from checkpoint.opening import Checkpoint
from data import audit
from data.answer_text import Opening, opening_of_words
from data.epochs import Epochs
from data.prompt import stop_ids
from data.tokenizer import Tokenizer
from foreign.terminal import one_line
from hub.fetch import HubId, parse_hub_id, snapshot_id
from hub.push import check_push
from lora.config import LoRAConfig
from prepare.asked import ask
from prepare.base import identify_base
from prepare.base_compute import describe_base_compute
from prepare.course import course_of, schedule_lines
from prepare.data import load_data, prompt_of
from prepare.first_lines import first_lines
from prepare.plan import say_plan
from prepare.resuming import find_checkpoint_to_resume, finished_lines
from run.checkpoint import ResumePoint
from run.config import TrainConfig
from run.folder import DEFAULT_PARENT, check_output, check_writable
from run.ranks import Ranks
from run.trackers import tracker_names
from step.memory_plan import MemoryPlan
from step.micro_step import Policy
from step.preflight import cpu_policies, plan_run
from step.workload import Workload

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
# the fields of a run that names neither a model nor data
BUNDLED_RUN = {
    "model": str(BUNDLED / "model"),
    "data": str(BUNDLED / "data.jsonl"),
    "eval_data": str(BUNDLED / "eval.jsonl"),
    "learning_rate": 2e-3,
    "batch_size": 16,
    "gradient_accumulation_steps": 1,
    "epochs": 6.0,
    # packing would leave a data set as small as this one too few steps
    "packing": False,
    "sample_prompt": "Write a verse about Ember.",
}


@dataclass(frozen=True)
class Job:
    """What a run will do, checked.

    Attributes:
        config: its output is empty until the output folder is made, unless --output names one.
        checkpoint: the base model's folder, opened.
        base: the checkpoint's identity.
        undecided: as in Asked.
        start: the adapter to begin with, if any.
        resumed: the run's own checkpoint to go on from, if any.
        damaged: the run's later checkpoints, and the damage of each.
        started: ISO time of the run's first start, which chat templates may print.
        data_mode: the permissions of files that hold text of the data.
        evaluation: the batches of an evaluation, if there is evaluation data.
        prompt: the tokens of --sample-prompt, if there is one.
        stop_ids: what ends the answer to it.
        opening: the tokens that the answer has before its words.
        plan: the memory plan, on a GPU.
        policies: whether each layer keeps, recomputes or offloads its activations.
    """

    config: TrainConfig
    checkpoint: Checkpoint
    base: Identity
    undecided: dict[str, Any]
    lora: LoRAConfig
    start: Path | None
    resumed: ResumePoint | None
    damaged: dict[Path, str]
    started: str
    tokenizer: Tokenizer
    audits: dict[str, dict[str, Any]]
    data_mode: int
    epochs: Epochs
    evaluation: Epochs | None
    prompt: list[int] | None
    stop_ids: frozenset[int]
    opening: Opening
    num_steps: int
    work: Workload
    plan: MemoryPlan | None
    policies: tuple[Policy, ...]

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    @property
    def is_base_local(self) -> bool:
        """Whether --model is a folder."""
        return self.checkpoint.folder == Path(self.config.model)

    @property
    def base_id(self) -> HubId | None:
        """The base model's id on the hub; None if it is not from there."""
        if self.is_base_local:
            return snapshot_id(self.checkpoint.folder)
        return parse_hub_id(self.config.model)

    @property
    def base_name(self) -> str:
        """The base model's public name: its hub id, or else the name of its folder alone."""
        return str(self.base_id or self.checkpoint.folder.resolve().name)

    @property
    def steps_done(self) -> int:
        """The number of steps before this start of the run."""
        return self.resumed.state.step if self.resumed else 0

    @property
    def output(self) -> Path:
        return Path(self.config.output)


def check(arguments: Sequence[str], ranks: Ranks, now: datetime) -> Job | None:
    """Check everything that the user gave, and describe it in lines.

    Returns:
        The run to carry out; None after --plan or --inspect, or where --resume finds the run
        finished.

    Raises:
        FileNotFoundError, ValueError: a flag, the data or the checkpoint is not as it must be.
    """
    asked = ask(arguments, BUNDLED_RUN, ranks)
    config, checkpoint, start = asked.config, asked.checkpoint, asked.start
    if config.plan:
        say_plan(asked, ranks.size, now)
        return None
    _check_places(config, ranks)
    if not config.inspect:
        ended = finished_lines(config)
        for line in [*first_lines(config, asked.lora, checkpoint), *ended]:
            print(one_line(line))
        if ended:
            return None
    resumed, damaged = find_checkpoint_to_resume(config, ranks.size)
    started = resumed.state.started if resumed else now.isoformat()
    start = resumed.path if resumed else start

    tokenizer = Tokenizer.from_folder(checkpoint.folder, config.chat_template)
    train_data, eval_data = load_data(config, tokenizer, checkpoint, started)
    if config.inspect:
        return None
    sets = {"train": train_data} | ({"eval": eval_data} if eval_data else {})
    audits = {name: audit.facts_of(dataset, tokenizer) for name, dataset in sets.items()}
    if resumed:
        audit.check_same(Path(config.output) / audit.AUDIT_FILE, audits)
    prompt, stops, opening = prompt_of(config, tokenizer, checkpoint), frozenset[int](), Opening()
    if prompt:
        stops = stop_ids(tokenizer, checkpoint.config.eos_token_ids)
        opening = opening_of_words(tokenizer)

    evaluated = eval_data.samples if eval_data else None
    course = course_of(asked, train_data.samples, evaluated, prompt, ranks.size, train_data.shares)
    work, num_steps = course.work, course.num_steps
    if resumed and resumed.state.step > num_steps:
        raise ValueError(
            f"--resume must go on from a step of the run: {start} is of step "
            f"{resumed.state.step:,}, and the run has {num_steps:,} steps; start a new run in "
            "another --output"
        )
    plan = None
    if asked.device.type == "cuda":
        plan = plan_run(work, asked.device, config.activations, config.max_memory_bytes)
    described = [*describe_loading(checkpoint, work.dtype), *describe_base_compute(work.model)]
    for line in [*described, *schedule_lines(config, num_steps)]:
        print(one_line(line))
    return Job(
        config=config,
        checkpoint=checkpoint,
        base=identify_base(config, checkpoint, resumed, start),
        undecided=asked.undecided,
        lora=asked.lora,
        start=start,
        resumed=resumed,
        damaged=damaged,
        started=started,
        tokenizer=tokenizer,
        audits=audits,
        data_mode=train_data.mode & (eval_data or train_data).mode,
        epochs=course.epochs,
        evaluation=course.evaluation,
        prompt=prompt,
        stop_ids=stops,
        opening=opening,
        num_steps=num_steps,
        work=work,
        plan=plan,
        policies=(
            plan.policies
            if plan
            else cpu_policies(config.activations, checkpoint.config.num_hidden_layers)
        ),
    )


def _check_places(config: TrainConfig, ranks: Ranks) -> None:
    """Check where the run writes and whom it tells."""
    check_output(config)
    if ranks.is_first and not config.inspect:
        check_writable(Path(config.output or DEFAULT_PARENT))
    tracker_names(config)
    if config.push_to_hub and ranks.is_first:
        check_push(config.push_to_hub)
