"""Measure the training step on one GPU and on several of one machine, under torchrun.

    python -m benchmarks data_parallel --json benchmarks/results/data_parallel.2xh100.json

Llama-3-8B with random weights, rank 16 on all linear layers, AdamW in 32 bits. A step is
--micro-batches of a shape on every rank, the sum of all ranks' gradients as train.py takes it, and
the optimizer's step; steps follow each other in blocks that begin and end with idle devices. What
one GPU does, times their number, is the limit. `sum` is the reduction alone, of the arena of
gradients.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.random_model import CONFIGS, random_model
from benchmarks.record import ROOT, head, write
from benchmarks.step_timing import parse_shape, random_ids, synchronize
from benchmarks.tables import Row, aligned, data_parallel_table
from llama.model import PROJECTIONS, Llama
from lora.config import LoRAConfig
from optim.adamw import AdamW
from optim.arena import GradientArena
from rows.batch import Batch
from run.machine import configure_torch
from run.ranks import Ranks, join_ranks
from step.micro_step import MicroStep, Policy

RANK = 16
LEARNING_RATE = 1e-4
SEED = 0
NUM_WARM_UPS = 2
NUM_BLOCKS = 3
NUM_SUMS = 20
# a line of a rank's output that is a row
MARK = "row: "


def seconds_of(ranks: Ranks, work: Callable[[], None]) -> float:
    """Time work that all ranks begin and end together."""
    synchronize()
    ranks.largest(0)
    start = time.perf_counter()
    work()
    synchronize()
    ranks.largest(0)
    return time.perf_counter() - start


def learner(model: Llama) -> AdamW:
    """Put an adapter beside a model, and an optimizer over it."""
    model.attach_lora(LoRAConfig(RANK, 2 * RANK, 0.0, PROJECTIONS), SEED)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return AdamW(GradientArena(parameters), weight_decay=0.0)


def measure(
    ranks: Ranks,
    model: Llama,
    optimizer: AdamW,
    shape: tuple[int, int],
    num_micro_batches: int,
    num_steps: int,
) -> Row:
    """Measure a shape on the ranks there are."""
    policies: list[Policy] = ["keep"] * len(model.layers)
    micro_step = MicroStep(
        model, optimizer.gradients, policies, captures=model.device.type == "cuda"
    )
    factor = torch.ones((), device=model.device) / (shape[0] * shape[1])

    def step() -> None:
        optimizer.gradients.zero_()
        with ranks.sharing_shortage():
            for index in range(num_micro_batches):
                ids = random_ids(shape, model.config.vocab_size, index)
                micro_step(Batch(ids, ids), factor, SEED)
        ranks.add_up(optimizer.gradients.values)
        optimizer.step(LEARNING_RATE, max_norm=1.0)

    def block() -> None:
        for _ in range(num_steps):
            step()

    for _ in range(NUM_WARM_UPS):
        seconds_of(ranks, step)
    seconds = sorted(seconds_of(ranks, block) / num_steps for _ in range(NUM_BLOCKS))
    sums = [
        seconds_of(ranks, lambda: ranks.add_up(optimizer.gradients.values)) for _ in range(NUM_SUMS)
    ]
    num_tokens = ranks.size * num_micro_batches * shape[0] * shape[1]
    return {
        "provider": "ours",
        "ranks": ranks.size,
        "shape": f"{shape[0]}x{shape[1]}",
        "micro_batches": num_micro_batches,
        "ms_p50": round(1e3 * median(seconds), 3),
        "ms_min": round(1e3 * seconds[0], 3),
        "ms_max": round(1e3 * seconds[-1], 3),
        "tokens_per_second": round(num_tokens / median(seconds), 1),
        "sum_ms_p50": round(1e3 * median(sums), 3),
        "sum_bytes": optimizer.gradients.values.nbytes,
    }


def be_rank(arguments: argparse.Namespace) -> None:
    """Measure every shape as one of the ranks, and print the rows."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with join_ranks() as ranks:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        configure_torch(device, ranks.local_rank, is_deterministic=False)
        model = random_model(CONFIGS[arguments.model], device)
        optimizer = learner(model)
        for shape in map(parse_shape, arguments.shapes.split(",")):
            for number in map(int, arguments.micro_batches.split(",")):
                row = measure(ranks, model, optimizer, shape, number, arguments.steps)
                print(MARK + json.dumps(row), flush=True)


def start(num_ranks: int, arguments: argparse.Namespace) -> list[Row]:
    """Start the ranks, each in a process of its own, and read the first one's rows."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command += ["-m", "benchmarks.data_parallel", "--is-rank", "--model", arguments.model]
    command += ["--shapes", arguments.shapes, "--steps", str(arguments.steps)]
    command += ["--micro-batches", arguments.micro_batches]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.splitlines()
    return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the training step on several GPUs.")
    parser.add_argument("--model", choices=CONFIGS, default="llama-3-8b")
    parser.add_argument("--shapes", default="1x2048,4x2048", help="SAMPLESxTOKENS, with commas")
    parser.add_argument("--micro-batches", default="1,4", help="of a rank's step, with commas")
    parser.add_argument("--steps", type=int, default=4, help="of a block")
    parser.add_argument("--is-rank", action="store_true", help="be one of the measured processes")
    parser.add_argument("--json", type=Path, help="result file to write")
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    arguments = parser.parse_args()
    if arguments.is_rank:
        be_rank(arguments)
        return 0
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        raise RuntimeError(f"this benchmark needs several CUDA GPUs: torch sees {num_gpus}")
    record = head("data_parallel", arguments.commit)
    rows = [row for size in (1, num_gpus) for row in start(size, arguments)]
    print(aligned(*data_parallel_table(rows)))
    if arguments.json:
        write(arguments.json, record | {"num_gpus": num_gpus, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
