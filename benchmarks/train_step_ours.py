"""Our training step in a process of its own; `benchmarks/train_step.py` starts it.

As train.py runs it: planned, prepared and optimized by its own functions, micro-steps captured.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train
from benchmarks.layers import BLOCK_SIZE
from benchmarks.random_model import CONFIGS, random_model
from benchmarks.step_timing import Step, measure_shapes, parse_shape
from checkpoint.loading import load_model, load_sizes
from checkpoint.opening import open_checkpoint
from llama.model import Llama, projections
from nf4.weight import Quantization
from optim.adamw import moment_bytes_per_element
from prepare.adapter import lora_config
from prepare.base_compute import set_base_compute
from rows.batch import Batch
from run.config import TrainConfig
from run.machine import configure_torch
from step.memory_plan import MemoryPlan, plan_memory
from step.micro_step import POLICIES, MicroStep, Policy
from step.preflight import plan_run
from step.workload import Workload

SEED = 0
QUANTIZATION = Quantization(BLOCK_SIZE, True)


def workload_of(source: str, config: TrainConfig, shape: tuple[int, int]) -> Workload:
    """Size a shape's micro-step as train.py's plan wants it."""
    model = load(source, config, torch.device("meta"))
    model.attach_lora(lora_config(config, projections(model.config)), SEED)
    return Workload(
        model=model,
        moment_bytes=moment_bytes_per_element(config.optim == "paged_adamw_8bit"),
        batch=shape[0],
        tokens=shape[1],
        device=torch.device(config.device),
    )


def plan_of(policy: str, config: TrainConfig, work: Workload) -> MemoryPlan:
    """Plan a step: `keep`, `recompute` or `offload` for every layer, `auto` as train.py decides it,
    "auto:8GiB" as it does with that --max-memory.

    Raises:
        ValueError: there is no such policy, or `auto` does not fit.
    """
    name, _, size = policy.partition(":")
    if name == "auto":
        budget = replace(config, max_memory=size).max_memory_bytes
        return plan_run(work, torch.device(config.device), "auto", budget)
    if policy not in POLICIES:
        raise ValueError(f"a policy must be auto or one of {', '.join(POLICIES)}: got {policy!r}")
    return plan_memory(work, (POLICIES[policy],) * work.config.num_hidden_layers)


def make_step(
    model: Llama, config: TrainConfig, policies: Sequence[Policy], optimizer: train.AdamW
) -> Step:
    """Make a training step of one micro-batch, in which every token has a label."""
    micro_step = MicroStep(
        model, optimizer.gradients, policies, captures=model.device.type == "cuda"
    )

    def step(ids: Tensor) -> Tensor:
        num_targets = ids.shape[0] * (ids.shape[1] - 1)
        factor = torch.full((), 1 / num_targets, device=model.device)
        optimizer.gradients.zero_()
        optimizer.prefetch()
        loss = micro_step(Batch(ids, ids), factor, SEED)
        optimizer.step(config.learning_rate, config.max_grad_norm)
        return loss / num_targets

    return step


def load(source: str, config: TrainConfig, device: torch.device) -> Llama:
    """Load a checkpoint folder, or draw a model of one of the shapes that have a name; on the meta
    device, without values."""
    dtype = getattr(torch, config.dtype)
    if source in CONFIGS:
        model = random_model(CONFIGS[source], device, dtype)
    else:
        checkpoint = open_checkpoint(Path(source))
        if device.type == "meta":
            model = load_sizes(checkpoint, dtype, QUANTIZATION)
        else:
            model = load_model(checkpoint, device, dtype, QUANTIZATION)
    set_base_compute(model, config)
    return model


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="Measure our training step.")
    result.add_argument("--policy", required=True)
    result.add_argument("--model", required=True, help="checkpoint folder or name of a shape")
    result.add_argument("--shapes", required=True)
    result.add_argument("--steps", type=int, required=True)
    result.add_argument("--started", type=float, required=True)
    result.add_argument("--target-modules", required=True)
    result.add_argument("--rank", type=int, required=True)
    result.add_argument("--alpha", type=float, required=True)
    result.add_argument("--dropout", type=float, required=True)
    result.add_argument("--optim", required=True)
    result.add_argument("--base-compute", required=True)
    return result


def main() -> int:
    arguments = parser().parse_args()
    # as train.py does, before the first allocation
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig(
        device=device.type,
        dtype="bfloat16",
        target_modules=arguments.target_modules,
        lora_r=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.dropout,
        optim=arguments.optim,
        base_compute=arguments.base_compute,
    )
    configure_torch(device, 0, config.deterministic)
    shapes = arguments.shapes.split(",")
    # while the device is empty, as train.py does; what does not fit is told with its shape
    plans: dict[tuple[int, int], MemoryPlan | ValueError] = {}
    for shape in map(parse_shape, shapes):
        work = workload_of(arguments.model, config, shape)
        try:
            plans[shape] = plan_of(arguments.policy, config, work)
        except ValueError as error:
            plans[shape] = error
    start = time.perf_counter()
    model = load(arguments.model, config, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    load_s = time.perf_counter() - start
    model.attach_lora(lora_config(config, projections(model.config)), SEED)
    optimizer = train.make_optimizer(model, config)

    def make(shape: tuple[int, int]) -> tuple[Step, dict[str, Any]]:
        plan = plans[shape]
        if isinstance(plan, ValueError):
            raise plan
        planned = {"layers": plan.layers(), "planned_gib": round(plan.reserved / 2**30, 3)}
        return make_step(model, config, plan.policies, optimizer), planned

    facts = {"provider": "ours", "policy": arguments.policy, "load_s": round(load_s, 2)}
    facts |= {"optimizer": optimizer.describe()}
    vocab_size, num_steps = model.config.vocab_size, arguments.steps
    measure_shapes(facts, shapes, vocab_size, num_steps, arguments.started, make)
    return 0


if __name__ == "__main__":
    sys.exit(main())
