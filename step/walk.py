"""A run's passes on the meta device: which memory they take and give back, for any policies.

The model has its real sizes and no values, and what walks through it is the code that trains:
`step.micro_step`'s loops, the layers, the host's stash, the loss. So a tensor that the code
allocates is in the plan, and one that it gives back early is not. Layers that are alike are walked
once and then repeated: a walk through 80 layers costs a few hundredths of a second.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch

from generation.prompt_pass import PADDED_TOKENS
from generation.sampling import Sampling
from generation.token_step import TokenStep
from kernels.constants import no_new_constants
from kernels.device import meta_stands_for
from llama.balance import Balance
from llama.layer import DecoderLayer
from llama.model import Llama
from llama.served import as_served
from lora.expert_group import ExpertGroup
from lora.frozen_group import FrozenGroup
from lora.linear_group import LinearGroup
from nf4.weight import NF4Weight
from optim.arena import GradientArena
from rows.batch import Batch
from step.allocations import Allocations, Event
from step.micro_step import KEEPS_ACTIVATIONS, MicroStep, Policy, expand_once
from step.repeated_calls import RepeatedCalls
from step.workload import Workload

META = torch.device("meta")
# what a run takes memory from: weights and adapter lie in the allocator's own pool; hidden states
# and loss in its pool for the step's stream; all passes in a pool of theirs, and what is captured
# of a sampled text too
STEP, PASSES, TOKENS = "step", "passes", "tokens"


class _WalkedStep(MicroStep):
    """A training step on the meta device that says which pool its memory is of."""

    def __init__(
        self,
        recorded: Allocations,
        model: Llama,
        gradients: GradientArena,
        policies: Sequence[Policy],
        noise_alpha: float,
        has_aux_loss: bool,
    ) -> None:
        super().__init__(model, gradients, policies, noise_alpha, has_aux_loss=has_aux_loss)
        self._recorded = recorded

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with self._recorded.taking_from(STEP):
            yield

    @contextmanager
    def _pooled(self) -> Iterator[None]:
        with no_new_constants(), self._recorded.taking_from(PASSES):
            yield


class StepWalk:
    """Walks through the passes of a workload, for one mix of policies after the other.

    Attributes:
        weights: what the model takes, weight by weight.
        sampling: what the text takes and gives back that is sampled, if one is.
    """

    def __init__(self, work: Workload, repeats: bool = True) -> None:
        """Prepare.

        Args:
            repeats: what was recorded of a layer for the layers like it, instead of walking through
                them too; the events are the same.
        """
        model = work.model
        assert model.device == META
        self._work = work
        self._calls = RepeatedCalls() if repeats else None
        adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._gradients = GradientArena(adapter)
        recorded = Allocations()
        with meta_stands_for(work.gpu):
            model.make_tables()
            for tensor in model.frozen_tensors():
                recorded.note(tensor)
            self.weights = list(recorded.events)
            if work.prompt_tokens:
                with recorded:
                    self._sample(recorded)
        self.sampling = recorded.events[len(self.weights) :]
        self._num_blocks = recorded.num_blocks

    def _sample(self, recorded: Allocations) -> None:
        """Walk through a pass over the longest text, padded as on a GPU, and the pass for one token
        more, which is launched once and then captured."""
        num_tokens = self._work.prompt_tokens
        with as_served(self._work.model):
            step = TokenStep(self._work.model, Sampling(), num_tokens, 1, captures=False)
            step.begin(0, [0] * (num_tokens + -num_tokens % PADDED_TOKENS), 0)
            step()
            with recorded.taking_from(TOKENS):
                step()

    def expanded(self, policies: Sequence[Policy]) -> list[int]:
        """List the bytes of the weights that stay expanded from pass to pass."""
        with meta_stands_for(self._work.gpu):
            expand_once(self._work.model, policies)
        return [tensor.nbytes for tensor in self._work.model.expanded_tensors()]

    def events(self, policies: Sequence[Policy]) -> list[Event]:
        """Record a micro-step, and the evaluation of a batch if there is one.

        Where samples begin makes no difference to the memory, nor does what is in them.
        """
        work, recorded = self._work, Allocations(num_blocks=self._num_blocks)
        is_packed, noise_alpha = work.sample_tokens is not None, float(work.has_noise)
        with meta_stands_for(work.gpu):
            step = _WalkedStep(
                recorded, work.model, self._gradients, policies, noise_alpha, work.has_aux_loss
            )
        with meta_stands_for(work.gpu), self._repeating(recorded), recorded:
            factor = torch.zeros((), device=META)
            step(_batch(work.batch, work.tokens, is_packed), factor, aux_factor=factor)
            # captured graphs hold on to it, where an evaluation needs a larger one
            hidden = step._hidden
            if work.evaluation:
                step.evaluate(_batch(*work.evaluation, is_packed))
            del hidden
        return recorded.events

    def kept_by(self, policy: Policy) -> list[Event]:
        """Record what a layer's forward pass takes, but for what it gives back by the time that the
        next layer begins."""
        work, recorded = self._work, Allocations()
        model = work.model
        x = torch.empty(work.M, work.config.hidden_size, dtype=work.dtype, device=META)
        with meta_stands_for(work.gpu), torch.no_grad():
            ids = torch.empty(work.batch, work.tokens, dtype=torch.int64, device=META)
            seed = torch.empty(1, dtype=torch.int64, device=META)
            shared = model.shared(ids, dropout_seed=seed)
            if work.has_aux_loss:
                assert work.config.experts is not None
                is_token = torch.empty(work.M, device=META)
                shared = shared._replace(balance=Balance.of(is_token, work.config.experts))
            with recorded:
                has_backward = policy in KEEPS_ACTIVATIONS
                kept = model.layers[-1].forward(x, x, shared, has_backward=has_backward)[2]
            # what it keeps goes only now
            events = list(recorded.events)
            del kept
        return events

    @contextmanager
    def _repeating(self, recorded: Allocations) -> Iterator[None]:
        """Let the model's layers repeat what others like them did."""
        if self._calls is None:
            yield
            return
        layers = self._work.model.layers
        names = ("forward", "recompute", "backward")
        for layer in layers:
            for name in names:
                kind = (name, _kind_of(layer))
                setattr(layer, name, self._calls.of(getattr(layer, name), kind, recorded))
        try:
            yield
        finally:
            for layer in layers:
                for name in names:
                    delattr(layer, name)


def _kind_of(layer: DecoderLayer) -> Hashable:
    """What the memory of a layer's passes depends on, beside what they are given."""
    groups = [module for module in layer.modules() if isinstance(module, FrozenGroup)]
    return layer.scores, *(_form_of(group) for group in groups)


def _form_of(group: FrozenGroup) -> Hashable:
    """What the memory of a group's passes depends on."""
    weight = group.weight
    if isinstance(weight, NF4Weight):
        form = (weight.rows, weight.in_features, weight.block_size, weight.is_double_quantized)
    else:
        form = (tuple(weight.shape), weight.dtype)
    bias_dtype = None if group.bias is None else group.bias.dtype
    # slices are no keys
    updates = None
    if isinstance(group, LinearGroup):
        formats = [group.product_format(is_backward) for is_backward in (False, True)]
        updates = (str(group.updates), group.dropout, *formats)
    elif isinstance(group, ExpertGroup) and group.update is not None:
        updates = group.update.rank
    return type(group), form, bias_dtype, updates, group.expanded is not None


def _batch(num_rows: int, num_tokens: int, is_packed: bool) -> Batch:
    """Make rows in which every token has a label; packed: with positions."""
    ids = torch.zeros(num_rows, num_tokens, dtype=torch.int64)
    positions = torch.arange(num_tokens).expand_as(ids) if is_packed else None
    return Batch(ids, ids, positions, torch.ones_like(ids))
