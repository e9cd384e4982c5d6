"""Before a run's first step: choose how it fits its machine, say what it will take, and try it.

On a CPU there is no plan: each layer keeps its activations unless told otherwise.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from rows.batch import Batch
from step.duration import Rates, step_seconds
from step.memory_plan import (
    CONTEXT_BYTES,
    GIB,
    MemoryPlan,
    choose_policies,
    nearest_that_fits,
    plan_memory,
    plan_within,
)
from step.micro_step import KEEPS_ACTIVATIONS, POLICIES, MicroStep, Policy
from step.workload import Workload

# of the memory of a plan that did not fit: the budget of the next one
LEANER_PERCENT = 90


def cpu_policies(activations: str, num_layers: int) -> tuple[Policy, ...]:
    """Choose what every layer does with its activations on a CPU, whose memory is not planned."""
    return (POLICIES.get(activations, POLICIES["keep"]),) * num_layers


def plan_run(
    work: Workload, device: torch.device, activations: str, max_memory: int | None
) -> MemoryPlan:
    """Plan a run: on a GPU with what every layer does with its activations chosen so that it fits.

    Args:
        activations: a policy for all layers, or auto.
        max_memory: bytes of the GPU, None for what is free on it.

    Raises:
        ValueError: it does not fit; the message names the nearest settings that would.
    """
    if device.type == "cpu":
        return plan_memory(work, cpu_policies(activations, work.config.num_hidden_layers))
    return plan_within(work, POLICIES.get(activations), memory_budget(max_memory))


def memory_budget(max_memory: int | None) -> int:
    """Count what the process may take of the GPU: what is free on it, or less where asked for."""
    available = usable_bytes(torch.cuda.mem_get_info()[0])
    return min(max_memory or available, available)


def usable_bytes(free: int) -> int:
    """Count what a process may take of a GPU, its context included, from what is free beside that
    context."""
    # a plan has been 2 % too low
    return int(0.97 * free) + CONTEXT_BYTES


def describe_plan(
    work: Workload,
    plan: MemoryPlan,
    rates: Rates | None,  # of the GPU, if they are known
    num_steps: int,
    num_tokens: float,
) -> str:
    """Say what the run will take: memory of each GPU, tokens and, where rates are known, time."""
    text = f"plan for micro-batches of {work.batch} x {work.tokens:,} tokens\n{plan.table()}"
    steps = "1 step" if num_steps == 1 else f"{num_steps:,} steps"
    text += f"\n{steps} over about {num_tokens:,.0f} tokens"
    if rates:
        speed = work.num_ranks * work.M / step_seconds(work, plan.policies, rates)
        seconds = num_tokens / speed
        time = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:,.0f} min"
        text += f", {speed:,.0f} tokens/s: about {time} without padding"
    return text


def preflight(
    micro_step: MicroStep,
    batch: Batch,  # the longest micro-batch of the run
    factor: Tensor,  # () float32
) -> str:
    """Run a micro-batch on a GPU, launched and then captured, and say how long that took.

    What does not fit fails before step 1, with what torch raises. Gradients are added to: zeros, or
    what is not finite.
    """
    start = time.perf_counter()
    for _ in range(2):
        micro_step(batch, factor * 0, aux_factor=factor * 0)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    num_rows, num_tokens = batch.input_ids.shape
    shape = f"{num_rows} x {num_tokens:,} tokens"
    return f"longest micro-batch: {shape} in {seconds:.1f} s with what is compiled and captured"


def limit_memory(plan: MemoryPlan, device: torch.device, max_memory: int | None) -> None:
    """Let torch's allocator refuse what is beyond a plan's budget.

    Otherwise the driver would move the optimizer's moments out of the way of whatever is asked for
    last: on a full GPU no kernel could reach them any more.

    Args:
        max_memory: bytes of the GPU, None for what is free on it.
    """
    limit = max(memory_budget(max_memory) - (plan.device - plan.reserved), plan.reserved)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))


def memory_line(plan: MemoryPlan) -> str:
    """Hold the plan against the allocator's peak."""
    return (
        f"layers: {plan.layers()}; memory {torch.cuda.max_memory_reserved() / GIB:.2f} GiB, "
        f"planned {plan.reserved / GIB:.2f}"
    )


def next_setting(work: Workload, policies: Sequence[Policy], device: torch.device) -> str:
    """Name what to try when a plan turned out not to fit: the next leaner setting."""
    if device.type == "cpu" and not KEEPS_ACTIVATIONS.isdisjoint(policies):
        return "--resume --activations recompute"
    budget = plan_memory(work, policies).device * LEANER_PERCENT // 100
    if device.type == "cuda" and choose_policies(work, budget) is not None:
        return f"--resume --activations auto --max-memory {budget / GIB:.2f}GiB"
    nearest = nearest_that_fits(work, budget)
    if nearest is None:
        return (
            "--resume where the GPU has more memory free: nothing smaller fits beside the weights"
        )
    size = f"--batch-size {nearest.batch}"
    if nearest.tokens < work.tokens:
        size += f" --max-length {nearest.tokens}"
    return f"a new run with {size}, from this checkpoint by --init-adapter"
