"""Measure a step of AdamW over an adapter's parameters: ours, torch's, bitsandbytes'.

    python -m benchmarks adamw --json benchmarks/results/adamw.h100.json

The parameters are those of rank 16 on all seven projections of Llama-3-8B: 448 tensors, 41.9M
elements, more than any cache holds, so one set of them is enough. Bandwidth is the limit. Four
pieces of work: the update alone, and with the norm that clips it, each with moments in 32 and in 8
bits. `ours` is the kernels in a CUDA graph, as everywhere; `ours-step` is what train.py calls,
issued by Python; `ours-managed` the same with moments in unified memory, `ours-host` with moments
that come from the host and go back. Those two are measured one after the other and their memory is
given back: unified memory stays at a few hundred MB.
"""

import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command import Candidate, Machine, Result, Work, limit_row, main, measured_rows
from benchmarks.layers import LAYERS
from benchmarks.measure import Operation
from benchmarks.tables import Row, adamw_table, aligned
from kernels.adamw import _launch_adamw
from kernels.adamw_arenas import MOMENT_BLOCK
from kernels.adamw_plan import _launch_adamw_plan
from optim.adamw import AdamW
from optim.arena import GradientArena
from optim.state_memory import OrdinaryMemory, StateMemory
from optim.unified_memory import ManagedMemory

RANK, NUM_LAYERS = 16, 32
ADAPTER = "llama-3-8b.adapter-r16"
# out_features, in_features of what benchmarks/layers.py does not list
PROJECTIONS = {
    **{name.rpartition(".")[2]: shape for name, shape in LAYERS.items()},
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "up_proj": (14336, 4096),
}
RATE, MAX_NORM, WEIGHT_DECAY = 2e-4, 1.0, 0.01

Memory = Callable[[int, torch.device], StateMemory]


def adapter_shapes() -> dict[str, tuple[int, int]]:
    """List the tensors of the adapter."""
    shapes = {}
    for layer in range(NUM_LAYERS):
        for name, (out_features, in_features) in PROJECTIONS.items():
            shapes[f"{layer}.{name}.lora_A"] = (RANK, in_features)
            shapes[f"{layer}.{name}.lora_B"] = (out_features, RANK)
    return shapes


def step_bytes(num_elements: int, is_8bit: bool, clips: bool) -> float:
    """Count the bytes of a step.

    p, g read and p written: 12; m and v read and written: 16, or 4 + 16/256; the norm reads g: 4
    """
    moments = 4 + 16 / MOMENT_BLOCK if is_8bit else 16
    return num_elements * (12 + moments + (4 if clips else 0))


def parameters_on(device: torch.device) -> dict[str, nn.Parameter]:
    """Make the adapter, each parameter with a gradient."""
    parameters = {}
    for name, shape in adapter_shapes().items():
        parameters[name] = nn.Parameter(torch.randn(shape, device=device) * 0.01)
        parameters[name].grad = torch.randn(shape, device=device) * 1e-3
    return parameters


def ours(device: torch.device, is_8bit: bool, memory: Memory = OrdinaryMemory) -> AdamW:
    """Make our optimizer, after a first step."""
    parameters = parameters_on(device)
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    optimizer = AdamW(GradientArena(parameters, is_8bit), weight_decay=WEIGHT_DECAY, memory=memory)
    for name, parameter in parameters.items():
        own, gradient = parameter.grad, gradients[name]
        assert own is not None
        assert gradient is not None
        own.copy_(gradient)
    optimizer.step(RATE, MAX_NORM)
    return optimizer


def launch_with_norm(optimizer: AdamW, loss_scale: Tensor) -> None:
    """Launch all three kernels."""
    arenas = optimizer._arenas
    _launch_adamw_plan(arenas, RATE, MAX_NORM, loss_scale)
    _launch_adamw(arenas)


def step_with_prefetch(optimizer: AdamW) -> Tensor:
    """Take a step as train.py does."""
    optimizer.prefetch()
    return optimizer.step(RATE, MAX_NORM)


def torch_step(device: torch.device, clips: bool, **kind: Any) -> Callable[[], object]:
    """Make a step of torch.optim.AdamW."""
    parameters = list(parameters_on(device).values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=WEIGHT_DECAY, **kind)

    def step() -> None:
        if clips:
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()

    return step


def rows_of(is_8bit: bool, clips: bool, machine: Machine) -> list[Row]:
    """Measure every provider on one piece of work."""
    device = machine.device
    shapes = adapter_shapes().values()
    num_elements = sum(rows * columns for rows, columns in shapes)
    mode = ("8bit" if is_8bit else "32bit") + ("-clip" if clips else "")
    num_bytes = step_bytes(num_elements, is_8bit, clips)
    work = Work(mode, ADAPTER, None, num_elements, len(shapes), torch.float32, num_bytes, 0)

    def candidate(provider: str, call: Callable[[], object], captured: bool = False) -> Candidate:
        return Candidate(work, provider, Operation([call], captured))

    optimizer = ours(device, is_8bit)
    scale = torch.ones((), device=device)
    kernels = partial(launch_with_norm, optimizer, scale)
    if not clips:
        kernels = partial(_launch_adamw, optimizer._arenas)
    candidates = [candidate("ours", kernels, captured=True)]
    if clips:
        candidates.append(candidate("ours-step", partial(step_with_prefetch, optimizer)))
    if not is_8bit:
        candidates.append(candidate("torch-fused", torch_step(device, clips, fused=True)))
        candidates.append(candidate("torch-foreach", torch_step(device, clips, foreach=True)))
    if machine.peer and not clips:
        kinds = (True,) if is_8bit else (False, True)
        for is_paged in kinds:
            theirs = machine.peer.adamw(
                list(parameters_on(device).values()), RATE, WEIGHT_DECAY, is_8bit, is_paged
            )
            provider = "bitsandbytes-paged" if is_paged else "bitsandbytes"
            candidates.append(candidate(provider, theirs.step))
    rows = [limit_row(work, machine), *measured_rows(candidates, machine)]
    del optimizer, kernels, candidates
    if clips:
        for provider, is_host_resident in (("ours-managed", False), ("ours-host", True)):
            gc.collect()
            memory = partial(ManagedMemory, is_host_resident=is_host_resident)
            step = partial(step_with_prefetch, ours(device, is_8bit, memory))
            rows += measured_rows([candidate(provider, step)], machine)
    return rows


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for is_8bit in (False, True):
        for clips in (False, True):
            rows += rows_of(is_8bit, clips, machine)
            print(f"measured {rows[-1]['mode']}", flush=True)
    return Result(rows, {}, aligned(*adamw_table(rows)))


if __name__ == "__main__":
    sys.exit(main("adamw", run))
