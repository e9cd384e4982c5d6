"""How much memory a run will need, and which layers may keep their activations.

Nothing here knows what a layer allocates. `step/walk.py` runs the code of a run's passes on the
meta device, `step/caching_allocator.py` computes what torch's allocator would hold for that, and
this file adds measured constants for what neither can see. So the answer comes before the
checkpoint is loaded; trying a mix of policies takes some hundredths of a second.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from step.allocations import DEFAULT_POOL, Event
from step.caching_allocator import CachingAllocator
from step.micro_step import Policy
from step.walk import PASSES, STEP, TOKENS, StepWalk
from step.workload import Workload

MIB, GIB = 1 << 20, 1 << 30
# of cuBLAS for each stream with products: the setting that run/machine.py makes, eight times
# 4,096 KiB
WORKSPACE_BYTES = 32 << 20
# of cublasLt, for products with a bias, on the stream of the passes
LT_WORKSPACE_BYTES = 1 << 20
# the driver's context with its loaded kernels, outside of torch's allocator; measured on an H200
CONTEXT_BYTES = 600 << 20
# outside of torch's allocator for each shape that is captured: 32 shapes took 324 MiB on an H200,
# Llama-3-8B with 32 layers
GRAPHS_BYTES_PER_LAYER = 320 << 10
# the same for each shape that is evaluated, a forward pass alone
EVALUATED_BYTES_PER_LAYER = 100 << 10
# NCCL's buffers on each GPU from the first reduction on, measured on two H200s
NCCL_BYTES = 842 << 20


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:.1f} MiB"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device, by what they are for, and the policies they are for.

    Attributes:
        expanded: weights that stay expanded from pass to pass.
        step: activations and scratch of the passes, at the most.
        loss: hidden states, logits and inputs, at the most.
        sampling: for sampled text, at the most.
        reserved: by torch's allocator, holes included.
        graphs, nccl: outside of torch's allocator.
        kept_per_layer: of a layer that keeps its activations.
        input_per_layer: of a layer that computes them again.
        host: pinned for inputs that are offloaded.
    """

    policies: tuple[Policy, ...]
    weights: int
    adapter: int
    gradients: int
    moments: int
    expanded: int
    step: int
    loss: int
    sampling: int
    reserved: int
    graphs: int
    nccl: int
    kept_per_layer: int
    input_per_layer: int
    host: int

    @property
    def device(self) -> int:
        """What the process takes of the device, its context included."""
        return self.reserved + self.moments + self.graphs + self.nccl + CONTEXT_BYTES

    @property
    def _tensors(self) -> int:
        standing = self.weights + self.adapter + self.gradients + self.expanded
        return standing + self.step + self.loss + self.sampling

    def table(self) -> str:
        """Say what a plan takes, line by line."""
        lines = [
            ("weights", self.weights, "frozen, as loaded"),
            ("adapter", self.adapter, "float32"),
            ("gradients", self.gradients, "float32"),
            ("optimizer", self.moments, "moments, on the device for every step"),
            ("expanded weights", self.expanded, "kept for all passes of their layers"),
            (
                "activations and scratch",
                self.step,
                f"at the peak; a layer keeps {_size(self.kept_per_layer)}, "
                f"or its input, {_size(self.input_per_layer)}",
            ),
            ("loss", self.loss, "hidden states, and logits of one chunk"),
            ("sampled text", self.sampling, "keys, values and a pass over the prompt"),
            ("workspaces and holes", self.reserved - self._tensors, "of torch's allocator"),
            ("CUDA graphs", self.graphs, "measured"),
            ("NCCL", self.nccl, "measured"),
            ("CUDA context", CONTEXT_BYTES, "measured"),
            ("in all", self.device, f"of it in torch's allocator {_size(self.reserved)}"),
        ]
        text = [f"  {name:<24} {_size(size):>10}   {note}" for name, size, note in lines if size]
        text.append(f"  {'layers':<24} {self.layers()}")
        if self.host:
            text.append(f"  {'pinned on the host':<24} {_size(self.host):>10}   layer inputs")
        return "\n".join(text)

    def layers(self) -> str:
        """Count the layers of each policy."""
        counts = {policy: self.policies.count(policy) for policy in dict.fromkeys(self.policies)}
        return ", ".join(f"{count} {policy}" for policy, count in counts.items())


class DoesNotFit(ValueError):
    """A run needs more memory than there is; the message names the nearest settings that fit.

    Attributes:
        num_bytes: what it needs at the least.
    """

    def __init__(self, message: str, num_bytes: int) -> None:
        super().__init__(message)
        self.num_bytes = num_bytes


class Planner:
    """Plans a workload's memory, for one mix of policies after the other."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self._walk = StepWalk(work)
        self._plans: dict[tuple[Policy, ...], MemoryPlan] = {}

    @cached_property
    def _kept(self) -> tuple[int, int]:
        """Bytes of a layer that keeps its activations, and of one that keeps its input."""

        def kept_by(policy: Policy) -> int:
            allocator = CachingAllocator()
            allocator.run(self._walk.kept_by(policy))
            return allocator.in_use(DEFAULT_POOL)

        return kept_by("keep"), kept_by("recompute")

    def plan(self, policies: Sequence[Policy]) -> MemoryPlan:
        """Predict what a run needs under given policies."""
        policies = tuple(policies)
        if policies not in self._plans:
            self._plans[policies] = self._plan(policies)
        return self._plans[policies]

    def _plan(self, policies: tuple[Policy, ...]) -> MemoryPlan:
        work, allocator = self.work, CachingAllocator()
        allocator.run(self._walk.weights)
        weights = allocator.in_use(DEFAULT_POOL)
        # what lies there for good beside the weights; the walk's own blocks have numbers from 1
        adapter = 4 * work.num_adapted
        standing = [(adapter, DEFAULT_POOL), (adapter, DEFAULT_POOL)]
        standing += [(WORKSPACE_BYTES, STEP), (LT_WORKSPACE_BYTES, STEP)]
        expanded = self._walk.expanded(policies)
        standing += [(num_bytes, DEFAULT_POOL) for num_bytes in expanded]
        if work.prompt_tokens:
            # text is sampled on the other stream, and captured on a third
            standing += [(WORKSPACE_BYTES, DEFAULT_POOL), (WORKSPACE_BYTES, TOKENS)]
        allocator.run(Event(-1 - i, *block) for i, block in enumerate(standing) if block[0])
        held = allocator.in_use(DEFAULT_POOL)
        allocator.run(self._walk.sampling)
        sampling = allocator.most_in_use(DEFAULT_POOL) - held
        if work.prompt_tokens:
            sampling += allocator.most_in_use(TOKENS) - WORKSPACE_BYTES
        allocator.run(self._walk.events(policies))
        num_offloaded = sum(policy == "offload" for policy in policies)
        row_bytes = work.M * work.config.hidden_size * work.dtype.itemsize
        graphs = work.config.num_hidden_layers * (
            GRAPHS_BYTES_PER_LAYER * work.num_shapes
            + EVALUATED_BYTES_PER_LAYER * work.num_evaluated_shapes
        )
        kept, inputs = self._kept
        return MemoryPlan(
            policies=policies,
            weights=weights,
            adapter=adapter,
            gradients=adapter,
            moments=int(work.moment_bytes * work.num_adapted),
            expanded=sum(expanded),
            step=allocator.most_in_use(PASSES),
            loss=allocator.most_in_use(STEP) - WORKSPACE_BYTES - LT_WORKSPACE_BYTES,
            sampling=sampling,
            reserved=allocator.reserved,
            graphs=graphs,
            nccl=NCCL_BYTES * (work.num_ranks > 1),
            kept_per_layer=kept,
            input_per_layer=inputs,
            # torch rounds what it pins up to a power of two
            host=num_offloaded * (1 << (row_bytes - 1).bit_length()),
        )


def plan_memory(work: Workload, policies: Sequence[Policy]) -> MemoryPlan:
    """Predict what a run needs under given policies."""
    return Planner(work).plan(policies)


def mix(
    num_layers: int, num_kept: int, num_recomputed: int, num_expanded: int = 0
) -> tuple[Policy, ...]:
    """Let the last layers keep their activations, those before keep their inputs, and the rest
    offload them; the last of those that keep activations keep expanded weights too.

    The backward pass begins with the last ones, and what they give back serves the others.
    """
    counts: tuple[tuple[Policy, int], ...] = (
        ("offload", num_layers - num_kept - num_recomputed),
        ("recompute", num_recomputed),
        ("keep", num_kept - num_expanded),
        ("expand", num_expanded),
    )
    return tuple(policy for policy, count in counts for _ in range(count))


def choose_policies(work: Workload, budget: int) -> MemoryPlan | None:
    """Find the fastest mix of policies that fits, or None if none does.

    Keeping a layer's activations saves most of a forward pass, so as many layers keep them as can;
    then as many keep their inputs as can, which saves the bus two copies. Expanded weights save a
    sixth as much time a byte as activations do, so they are kept where all layers keep those.

    Args:
        budget: bytes of the device for the process.
    """
    num_layers, planner = work.config.num_hidden_layers, Planner(work)

    def bytes_of(num_kept: int, num_recomputed: int, num_expanded: int = 0) -> int:
        return planner.plan(mix(num_layers, num_kept, num_recomputed, num_expanded)).device

    num_kept = _most(0, num_layers, budget, lambda n: bytes_of(n, 0))
    if num_kept is None:
        return None
    if num_kept == num_layers:
        num_expanded = _most(0, num_layers, budget, lambda n: bytes_of(num_layers, 0, n)) or 0
        return planner.plan(mix(num_layers, num_layers, 0, num_expanded))
    rest = num_layers - num_kept
    num_recomputed = _most(0, rest, budget, lambda n: bytes_of(num_kept, n)) or 0
    return planner.plan(mix(num_layers, num_kept, num_recomputed))


def evaluated_rows(work: Workload, rows: int, tokens: int) -> int:
    """Find how many rows may be evaluated at once, so that an evaluation takes no more memory than
    training at its leanest; one row if that takes more already.

    What is free does not count: on every machine the same rows are evaluated together, whose loss
    is added up in float32.

    Args:
        rows: wanted at once.
        tokens: of the longest row.
    """
    leanest = mix(work.config.num_hidden_layers, 0, 0)

    def bytes_of(evaluation: tuple[int, int] | None) -> int:
        return plan_memory(replace(work, evaluation=evaluation), leanest).device

    return _most(1, rows, bytes_of(None), lambda n: bytes_of((n, tokens))) or 1


def _most(least: int, limit: int, budget: int, bytes_of: Callable[[int], int]) -> int | None:
    """Find a number from the least to a limit that takes no more than a budget, where one more
    takes more or is beyond the limit; None if the least takes more.

    The bytes grow about evenly, so the guess is where a straight line meets the budget.
    """
    low, high = least, limit
    high_bytes = bytes_of(high)
    if high_bytes <= budget:
        return high
    low_bytes = bytes_of(low)
    if low_bytes > budget:
        return None
    while high - low > 1:
        share = (budget - low_bytes) / (high_bytes - low_bytes)
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        num_bytes = bytes_of(guess)
        if num_bytes <= budget:
            low, low_bytes = guess, num_bytes
        else:
            high, high_bytes = guess, num_bytes
    return low


def nearest_that_fits(work: Workload, budget: int) -> Workload | None:
    """Find the largest batch, or for a batch of one the most tokens, that would fit."""
    leanest = mix(work.config.num_hidden_layers, 0, 0)

    def bytes_of(smaller: Workload) -> int:
        return plan_memory(smaller, leanest).device

    def with_tokens(num_tokens: int) -> Workload:
        """Cut all rows, those that are evaluated too."""
        rows, tokens = work.evaluation or (0, 0)
        evaluation = (rows, min(tokens, num_tokens)) if rows else None
        return replace(work, batch=1, tokens=num_tokens, evaluation=evaluation)

    rows = _most(1, work.batch, budget, lambda n: bytes_of(replace(work, batch=n)))
    if rows is not None:
        return replace(work, batch=rows)
    tokens = _most(1, work.tokens, budget, lambda n: bytes_of(with_tokens(n)))
    return None if tokens is None else with_tokens(tokens)


def plan_within(work: Workload, policy: Policy | None, budget: int) -> MemoryPlan:
    """Plan a step with one policy for all layers, or with the fastest mix, in a budget.

    Args:
        policy: None for the mix.
        budget: bytes of the device for the process.

    Raises:
        DoesNotFit: the run needs more.
    """
    num_layers = work.config.num_hidden_layers
    plan = choose_policies(work, budget) if policy is None else None
    if plan is not None:
        return plan
    leanest = mix(num_layers, 0, 0) if policy is None else (policy,) * num_layers
    least = plan_memory(work, leanest)
    if least.device <= budget:
        return least
    nearest = nearest_that_fits(work, budget)
    advice = (
        f"--activations auto with --batch-size {nearest.batch} --max-length {nearest.tokens} fits"
        if nearest
        else f"no micro-batch fits beside the weights, {_size(least.weights)}"
    )
    raise DoesNotFit(
        f"the run must fit {_size(budget)} of the GPU: micro-batches of {work.batch} x "
        f"{work.tokens:,} tokens need {_size(least.device)}{'' if policy else ' at the least'}; "
        f"{advice}",
        least.device,
    )
