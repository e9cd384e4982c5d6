"""Measure products of a mixture of experts: ours, torch's grouped product, a loop, one product.

    python -m benchmarks grouped_matmul --json benchmarks/results/grouped_matmul.h200.json

The products of Qwen3-30B-A3B's 128 experts, of which a token takes 8, forward and for the gradient
of the input. How many rows an expert has is drawn, with some experts preferred. FLOPs are the limit
of many rows, bytes that of few: every matrix is read once.

    torch       torch.nn.functional.grouped_mm
    loop        torch.mm for each expert, whose numbers of rows the host must know
    dense       one product with the first expert's matrix, of as many FLOPs
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import Candidate, Machine, Result, Work, limit_row, main, measured_rows
from benchmarks.layers import WEIGHT_STD
from benchmarks.measure import Operation, num_input_sets
from benchmarks.tables import Row, aligned, grouped_matmul_table
from kernels.grouped_matmul import grouped_matmul, grouped_matmul_backward_input

NUM_EXPERTS = 128
EXPERTS_PER_TOKEN = 8
# (out_features, in_features) of an expert
EXPERT_LAYERS = {
    "qwen3-30b-a3b.gate_up_proj": (1536, 2048),
    "qwen3-30b-a3b.down_proj": (2048, 768),
}
NUM_TOKENS = (512, 2048, 8192)
# of the logarithm of how likely an expert is taken
PREFERENCE_STD = 0.5
DTYPE = torch.bfloat16

OURS: dict[str, Callable[..., Tensor]] = {
    "forward": grouped_matmul,
    "backward": grouped_matmul_backward_input,
}


def expert_sizes(num_rows: int, num_experts: int) -> list[int]:
    """Draw how many rows each expert has, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    preferences = (PREFERENCE_STD * torch.randn(num_experts, generator=generator)).exp()
    taken = torch.multinomial(preferences, num_rows, replacement=True, generator=generator)
    return torch.bincount(taken, minlength=num_experts).tolist()


def grouped_matmul_work(
    mode: str, layer: str, sizes: Sequence[int], n: int, k: int, dtype: torch.dtype
) -> Work:
    """Count what a product cannot do without: the rows, the matrices of experts that have some."""
    m, num_read = sum(sizes), sum(size > 0 for size in sizes)
    num_bytes = dtype.itemsize * (m * (n + k) + num_read * n * k)
    return Work(mode, layer, m, n, k, dtype, num_bytes, 2 * m * n * k)


def by_loop(x: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    """Multiply expert by expert."""
    out = x.new_empty(len(x), right.shape[2])
    for rows, matrix, result in zip(x.split(sizes), right, out.split(sizes), strict=True):
        torch.mm(rows, matrix, out=result)
    return out


def measure_grouped_matmul(
    mode: str, layer: str, sizes: Sequence[int], n: int, k: int, machine: Machine
) -> list[Row]:
    """Measure one layer's product by every provider."""
    work = grouped_matmul_work(mode, layer, sizes, n, k, DTYPE)
    width = n if mode == "backward" else k
    offsets = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=machine.device)
    calls: dict[str, list[Callable[[], Any]]] = {}
    for _ in range(num_input_sets(work.num_bytes, work.num_bytes, machine.device)):
        x = torch.randn(sum(sizes), width, device=machine.device, dtype=DTYPE)
        W = torch.randn(len(sizes), n, k, device=machine.device, dtype=DTYPE) * WEIGHT_STD
        right = W if mode == "backward" else W.mT
        for provider, call in {
            "ours": partial(OURS[mode], x, W, offsets),
            "torch": partial(torch.nn.functional.grouped_mm, x, right, offs=offsets[1:]),
            "loop": partial(by_loop, x, right, sizes),
            "dense": partial(torch.mm, x, right[0]),
        }.items():
            calls.setdefault(provider, []).append(call)
    candidates = [
        # torch's waits for the device where it has no kernel of its own
        Candidate(work, provider, Operation(found, captured=provider != "torch"))
        for provider, found in calls.items()
    ]
    return [limit_row(work, machine), *measured_rows(candidates, machine)]


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    spans = {}
    for num_tokens in NUM_TOKENS:
        sizes = expert_sizes(num_tokens * EXPERTS_PER_TOKEN, NUM_EXPERTS)
        spans[str(sum(sizes))] = [min(sizes), max(sizes)]
        for layer, (n, k) in EXPERT_LAYERS.items():
            for mode in OURS:
                rows += measure_grouped_matmul(mode, layer, sizes, n, k, machine)
        print(f"measured {num_tokens} tokens", flush=True)
    more = {"num_experts": NUM_EXPERTS, "fewest_and_most_rows": spans}
    return Result(rows, more, aligned(*grouped_matmul_table(rows)))


if __name__ == "__main__":
    sys.exit(main("grouped_matmul", run))
