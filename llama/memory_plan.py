"""What a micro-step will need of the memory, and which layers may keep their activations.

The peak is found by walking through the step as `llama/decoder_layer.py` and `llama/micro_step.py`
write it, taking and giving back the sizes of its tensors. Nothing is allocated, so the answer comes
before the checkpoint is loaded, and a choice of policies costs a millisecond to try.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llama.loss import chunk_rows
from llama.micro_step import Policy
from llama.workload import Group, Workload

MIB, GIB = 1 << 20, 1 << 30
# what the allocator rounds to
ALLOCATION = 512
# cuBLAS's workspaces for two streams, the optimizer's and the loss's small tensors
WORKSPACE_BYTES = 64 << 20
# what torch's allocator holds beyond the peak of what is in use: holes between the tensors of a
# layer's pass, in percent of the most that one layer's pass has in use. Chosen to fit 12 runs of
# Llama-3-8B, which had 26 to 41
HOLES_PERCENT = 38
# the driver's context with its loaded kernels, outside of torch's allocator
CONTEXT_BYTES = 600 << 20


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:.1f} MiB"


class _Memory:
    """Counts what is in use, and the most that was."""

    def __init__(self) -> None:
        self.in_use = self.peak = 0

    def take(self, *sizes: int) -> int:
        total = sum(-(-size // ALLOCATION) * ALLOCATION for size in sizes)
        self.in_use += total
        self.peak = max(self.peak, self.in_use)
        return total

    def give(self, total: int) -> None:
        self.in_use -= total


class _Step:
    """Walks through a micro-step, tensor by tensor, in the order of the code that runs it."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.memory = _Memory()
        config, e = work.config, work.dtype.itemsize
        self.qkv, self.o, self.gate_up, self.down = work.groups
        self.row = work.M * config.hidden_size * e
        self.heads = work.M * config.num_attention_heads * config.head_dim
        # the softmax's denominators
        self.lse = 4 * work.M * config.num_attention_heads
        self.mixed = (self.heads * e, self.lse)
        num_normed = config.num_attention_heads + config.num_key_value_heads
        num_normed *= work.M * config.qk_norm
        self.normed_heads = (num_normed * config.head_dim * e, 4 * num_normed)
        # by our own kernel, not torch's
        self.is_masked = work.is_masked

    def columns(self, count: int) -> int:
        return self.work.M * count * self.work.dtype.itemsize

    def expanded(self, group: Group) -> int:
        return (group.N + group.tail) * (group.K + group.tail) * self.work.dtype.itemsize

    def input_of(self, group: Group) -> int:
        return self.columns(group.K + group.tail)

    def output_of(self, group: Group) -> int:
        return self.columns(group.N + group.tail)

    def attend(self, adds: bool) -> tuple[int, int, int]:
        """Return what the first half holds: r1, what only the backward pass needs, delta."""
        memory, work = self.memory, self.work
        y = memory.take(self.input_of(self.qkv))
        rstd = memory.take(4 * work.M)
        r1 = memory.take(self.row) if adds else 0
        W = memory.take(self.expanded(self.qkv))
        qkv = memory.take(self.columns(self.qkv.N))
        memory.give(W)
        # queries and keys before they are normalized, where they are
        qkv += memory.take(*self.normed_heads)
        mixed = memory.take(*self.mixed)
        mixed_ext = memory.take(self.input_of(self.o)) if self.o.tail else 0
        W = memory.take(self.expanded(self.o))
        delta = memory.take(self.row)
        memory.give(W)
        h = memory.take(self.columns(self.o.tail), self.columns(self.qkv.tail))
        held = 0
        if self.work.config.norms.behind_attention:
            # what o gave stays, and what is added is another
            held, delta = delta + memory.take(4 * work.M), memory.take(self.row)
        memory.give(mixed_ext)
        memory.give(y)
        return r1, rstd + qkv + mixed + h + held, delta

    def gate(self) -> int:
        """Return what the second half holds up to the gates."""
        memory = self.memory
        y = memory.take(self.input_of(self.gate_up))
        held = memory.take(self.row, 4 * self.work.M)
        held += memory.take(self.output_of(self.gate_up))
        W = memory.take(self.expanded(self.gate_up))
        memory.give(W)
        held += memory.take(self.columns(self.gate_up.tail))
        memory.give(y)
        return held

    def project(self) -> tuple[int, int]:
        """Return what the end of the second half holds for the backward pass, and delta."""
        memory = self.memory
        W = memory.take(self.expanded(self.down))
        delta = memory.take(self.row)
        memory.give(W)
        held = memory.take(self.columns(self.down.tail))
        if self.work.config.norms.behind_mlp:
            held, delta = held + delta + memory.take(4 * self.work.M), memory.take(self.row)
        return held, delta

    def forward(self, policy: Policy, is_first: bool) -> int:
        """Return what a layer's forward pass keeps; the stream's two tensors change hands."""
        memory = self.memory
        r1, first, delta = self.attend(adds=not is_first)
        second = self.gate()
        keeps = policy == "keep"
        memory.give(delta)
        if not keeps:
            memory.give(first)
        inner = memory.take(self.input_of(self.down))
        r2 = -(-self.row // ALLOCATION) * ALLOCATION
        if not keeps:
            memory.give(second - r2)
        h, _ = self.project()
        memory.give(inner)
        if not keeps:
            # of a recomputed layer what down gave is computed again too
            memory.give(h)
            h = memory.take(self.columns(self.down.tail))
        # the x and delta that came in; the first layer has no delta, and its x is r1
        memory.give(0 if is_first else 2 * r2)
        if keeps:
            # r2 is the next layer's x, which is counted there
            memory.take(r2)
            return r1 + first + second + h
        if policy == "offload":
            # it is let go a layer later
            memory.give(r1)
            return h
        return r1 + h

    def backward(self, policy: Policy, kept: int) -> None:
        memory, e = self.memory, self.work.dtype.itemsize
        fetched = memory.take(self.row, self.row) if policy == "offload" else 0
        first, delta, second = 0, 0, 0
        if policy != "keep":
            _, first, delta = self.attend(adds=False)
            second = self.gate()
            memory.give(delta)
            if self.work.config.norms.behind_mlp:
                inner = memory.take(self.input_of(self.down))
                held, delta = self.project()
                memory.give(inner + delta)
                second += held
        # gradients of what the halves gave, where that is another than the stream's
        behind = memory.take(self.output_of(self.down)) if self.work.config.norms.behind_mlp else 0
        W = memory.take(self.expanded(self.down))
        grad = memory.take(self.columns(self.down.K))
        memory.give(W + grad + behind)
        W = memory.take(self.expanded(self.gate_up))
        grad = memory.take(self.row)
        memory.give(W + grad)
        released = self.output_of(self.gate_up)
        released += self.row if self.work.config.norms.behind_mlp else 0
        memory.give(second)
        if policy == "keep":
            memory.give(released)
        behind = 0
        if self.work.config.norms.behind_attention:
            behind = memory.take(self.output_of(self.o))
        W = memory.take(self.expanded(self.o))
        grad = memory.take(self.heads * e)
        memory.give(W + behind)
        # gradients of q, k and v; before that, of q in float32 and of k and v for every query head,
        # but by our own kernels
        spread = memory.take(self.lse)
        if not self.is_masked:
            spread += memory.take(4 * self.heads, 2 * self.heads * e)
        grads = memory.take(self.columns(self.qkv.N))
        memory.give(spread + grad)
        grad_qkv = memory.take(self.output_of(self.qkv))
        memory.give(grads)
        W = memory.take(self.expanded(self.qkv))
        grad = memory.take(self.row)
        memory.give(W + grad + grad_qkv + first + fetched)
        memory.give(kept - (released if policy == "keep" else 0))

    def peak(self, policies: Sequence[Policy]) -> int:
        """Walk through all layers and back."""
        memory = self.memory
        memory.take(self.row)
        kept = [self.forward(policy, i == 0) for i, policy in enumerate(policies)]
        memory.take(self.row)
        tail = max(self.o.tail, self.down.tail)
        memory.take(self.columns(self.work.config.hidden_size + tail))
        for policy, held in zip(reversed(policies), reversed(kept), strict=True):
            self.backward(policy, held)
        return memory.peak


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device, by what they are for, and the policies they are for."""

    policies: tuple[Policy, ...]
    weights: int
    adapter: int
    gradients: int
    moments: int
    step: int  # activations and scratch, at the most
    layer: int  # of it a single layer's, if no other kept anything
    loss: int
    kept_per_layer: int  # of a layer that keeps its activations
    input_per_layer: int  # of one that computes them again
    host: int  # pinned for inputs that are offloaded

    @property
    def in_use(self) -> int:
        """Tensors in torch's allocator, at the most; the moments are elsewhere.

        The loss takes its own memory between the passes, where the other is not at its peak.
        """
        return self.weights + self.adapter + self.gradients + self.step + self.loss

    @property
    def reserved(self) -> int:
        """What torch's allocator holds at its peak."""
        return self.in_use + self.layer * HOLES_PERCENT // 100 + WORKSPACE_BYTES

    @property
    def device(self) -> int:
        """What the process takes of the device, its context included."""
        return self.reserved + self.moments + CONTEXT_BYTES

    def table(self) -> str:
        """Say what a plan takes, line by line."""
        lines = [
            ("weights", self.weights, "frozen, as loaded"),
            ("adapter", self.adapter, "float32"),
            ("gradients", self.gradients, "float32"),
            ("optimizer", self.moments, "moments that stay on the device"),
            (
                "activations and scratch",
                self.step,
                f"at the peak; a layer keeps {_size(self.kept_per_layer)}, "
                f"or its input, {_size(self.input_per_layer)}",
            ),
            ("loss", self.loss, "logits of one chunk, and the rows that have a label"),
            ("workspaces and holes", self.reserved - self.in_use, "estimated"),
            ("CUDA context", CONTEXT_BYTES, "estimated"),
            ("in all", self.device, f"of it in torch's allocator {_size(self.reserved)}"),
        ]
        text = [f"  {name:<24} {_size(size):>10}   {note}" for name, size, note in lines]
        text.append(f"  {'layers':<24} {self.layers()}")
        if self.host:
            text.append(f"  {'pinned on the host':<24} {_size(self.host):>10}   layer inputs")
        return "\n".join(text)

    def layers(self) -> str:
        """Count the layers of each policy."""
        counts = {policy: self.policies.count(policy) for policy in dict.fromkeys(self.policies)}
        return ", ".join(f"{count} {policy}" for policy, count in counts.items())


def plan_memory(work: Workload, policies: Sequence[Policy]) -> MemoryPlan:
    """Predict what a micro-step needs under given policies."""
    step = _Step(work)
    V, D, e = work.config.vocab_size, work.config.hidden_size, work.dtype.itemsize
    rows = chunk_rows(V, work.dtype, work.M)
    # the chosen rows, their logits, and the gradient of a chunk in float32
    loss = work.M * D * e + rows * (V * e + 4 * D)
    once = _Step(work)
    return MemoryPlan(
        policies=tuple(policies),
        weights=work.frozen_bytes,
        adapter=4 * work.num_adapted,
        gradients=4 * work.num_adapted,
        moments=int(work.moment_bytes * work.num_adapted),
        step=step.peak(policies),
        layer=_Step(work).peak(["recompute"]),
        loss=loss,
        kept_per_layer=once.forward("keep", is_first=False),
        input_per_layer=once.forward("recompute", is_first=False),
        host=sum(policy == "offload" for policy in policies) * step.row,
    )


def mix(num_layers: int, num_kept: int, num_recomputed: int) -> tuple[Policy, ...]:
    """Let the last layers keep their activations, those before keep their inputs, and the rest
    offload them.

    The backward pass begins with the last ones, and what they give back serves the others.
    """
    counts: tuple[tuple[Policy, int], ...] = (
        ("offload", num_layers - num_kept - num_recomputed),
        ("recompute", num_recomputed),
        ("keep", num_kept),
    )
    return tuple(policy for policy, count in counts for _ in range(count))


def choose_policies(work: Workload, budget: int) -> MemoryPlan | None:
    """Find the fastest mix of policies that fits, or None if none does.

    Keeping a layer's activations saves most of a forward pass, so as many layers keep them as can;
    then as many keep their inputs as can, which saves the bus two copies.

    Args:
        budget: bytes of the device for the process.
    """
    num_layers = work.config.num_hidden_layers

    def fits(policies: tuple[Policy, ...]) -> bool:
        return plan_memory(work, policies).device <= budget

    if not fits(mix(num_layers, 0, 0)):
        return None
    num_kept = _most(num_layers, lambda n: fits(mix(num_layers, n, 0)))
    rest = num_layers - num_kept
    num_recomputed = _most(rest, lambda n: fits(mix(num_layers, num_kept, n)))
    return plan_memory(work, mix(num_layers, num_kept, num_recomputed))


def _most(limit: int, holds: Callable[[int], bool]) -> int:
    """Find the largest number up to a limit for which something holds that holds for 0."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def nearest_that_fits(work: Workload, budget: int) -> Workload | None:
    """Find the largest batch, or for a batch of one the most tokens, that would fit."""
    if work.batch > 1:
        smaller = _most(
            work.batch,
            lambda n: n == 0 or choose_policies(replace(work, batch=n), budget) is not None,
        )
        if smaller:
            return replace(work, batch=smaller)
    single = replace(work, batch=1)
    tokens = _most(
        work.tokens,
        lambda n: n == 0 or choose_policies(replace(single, tokens=n), budget) is not None,
    )
    return replace(single, tokens=tokens) if tokens else None


def plan_within(work: Workload, policy: Policy | None, budget: int) -> MemoryPlan:
    """Plan a step with one policy for all layers, or with the fastest mix, in a budget.

    Args:
        policy: None for the mix.
        budget: bytes of the device for the process.

    Raises:
        ValueError: it does not fit; the message names the nearest settings that would.
    """
    num_layers = work.config.num_hidden_layers
    plan = choose_policies(work, budget) if policy is None else None
    if plan is not None:
        return plan
    leanest = mix(num_layers, 0, 0)
    least = plan_memory(work, leanest if policy is None else (policy,) * num_layers)
    if least.device <= budget:
        return least
    nearest = nearest_that_fits(work, budget)
    advice = (
        f"--activations auto with --batch-size {nearest.batch} --max-length {nearest.tokens} fits"
        if nearest
        else "no micro-batch fits beside the weights"
    )
    raise ValueError(
        f"the run must fit {_size(budget)} of the GPU: micro-batches of {work.batch} x "
        f"{work.tokens:,} tokens need {_size(least.device)}{'' if policy else ' at the least'}; "
        f"{advice}"
    )
