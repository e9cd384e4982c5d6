"""A run between two steps: its state, and the model, optimizer and job that a step needs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from llama.model import Llama
from optim.adamw import AdamW
from optim.loss_scale import LossScale
from prepare.job import Job
from run.checkpoint import RunState
from run.config import TrainConfig
from run.ranks import Ranks
from step.micro_step import MicroStep


@dataclass(frozen=True)
class PendingStep:
    """A step whose loss and gradient norm the device may still be computing."""

    step: int  # counted from 1
    loss: Tensor  # () float32, in nats per target token
    aux_loss: Tensor  # () float32, the mean of the micro-batches; 0 where there is none
    grad_norm: Tensor  # () float32, before clipping
    learning_rate: float


@dataclass
class Run:
    """A model in training, with everything that a step reads or changes.

    Attributes:
        job: names the output folder as soon as that folder is made.
        best: the adapter with the lowest eval_loss, by tensor name; empty where none is kept.
        pending: the steps that were taken and not yet counted in `state`.
        make_room: gives the disk space back that was reserved for the last checkpoint.
    """

    job: Job
    ranks: Ranks
    state: RunState
    model: Llama
    micro_step: MicroStep
    optimizer: AdamW
    loss_scale: LossScale
    best: dict[str, Tensor]
    pending: list[PendingStep] = field(default_factory=list)
    make_room: Callable[[], None] = lambda: None

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    @property
    def is_over(self) -> bool:
        state, patience = self.state, self.config.early_stopping_patience
        has_patience = patience == 0 or state.num_evaluations_since_best < patience
        return state.step == self.job.num_steps or not has_patience


def first_state(job: Job, ranks: Ranks) -> RunState:
    """Make the state that a run begins with: that of the checkpoint that it resumes, or a new one.

    Checkpoints of version 0.1 do not name their base; from this start on the state names it.
    """
    resumed = job.resumed.state if job.resumed else RunState(job.started, num_ranks=ranks.size)
    return replace(resumed, base=job.base.own)
