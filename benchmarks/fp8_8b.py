"""Train an 8B model's shape with base products in bf16 and in 8 bits, and compare.

    python -m benchmarks fp8_8b --json benchmarks/results/fp8_8b.h200.json

Does anything diverge where sums are as long and layers as many as in an 8B model? Weights are
random (`random_model.py`), and so need no file; the adapter, rank 16 on all linear layers, is
trained with AdamW at a constant rate, clipped. There are two kinds of data:

    random    every token is drawn from the whole vocabulary, so there is nothing to learn: the
              loss stays above ln 128,256 = 11.8
    chain     a Markov chain over 512 tokens, in which each is followed by one of two: the loss can
              fall to ln 2 = 0.69

A seed decides weights, adapter and tokens, the same ones in bf16 and in 8 bits. A row is a run; of
each ten steps it has the mean loss and the largest norm of the adapter's gradient before clipping.
A step whose norm is not finite changes nothing, and is counted.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.random_model import LLAMA_3_8B, random_model
from benchmarks.record import head, write
from benchmarks.step_timing import NUM_WARM_UPS, parse_shape, random_ids, synchronize
from benchmarks.tables import Row, aligned, fp8_8b_table
from llama.config import LlamaConfig
from llama.model import PROJECTIONS
from lora.config import LoRAConfig
from optim.adamw import AdamW
from optim.arena import GradientArena
from prepare.base_compute import FORWARD_FORMATS
from rows.batch import Batch
from run.machine import configure_torch
from step.micro_step import MicroStep, Policy

BASE_COMPUTES = ("bf16", "int8", "fp8")
DATA = ("random", "chain")
RANK = 16
LEARNING_RATE = 2e-4
MAX_NORM = 1.0
SEED = 0
NUM_STATES = 512
NUM_NEXT = 2
STEPS_OF_A_POINT = 10


def chain_ids(shape: tuple[int, int], vocab_size: int, index: int) -> Tensor:
    """Draw the micro-batch of a step from the Markov chain, which is the same in every step."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randperm(vocab_size, generator=generator)[:NUM_STATES]
    num_states = len(tokens)
    following = torch.randint(num_states, (num_states, NUM_NEXT), generator=generator).tolist()
    generator.manual_seed(1 + index)
    rows = []
    for choices in torch.randint(NUM_NEXT, shape, generator=generator).tolist():
        state = int(torch.randint(num_states, (), generator=generator))
        states = []
        for choice in choices:
            states.append(state)
            state = following[state][choice]
        rows.append(states)
    return tokens[torch.tensor(rows)]


def batches_of(data: str, num_steps: int, shape: tuple[int, int], vocab_size: int) -> list[Tensor]:
    """Draw the micro-batches of all steps."""
    draw = random_ids if data == "random" else chain_ids
    return [draw(shape, vocab_size, index) for index in range(num_steps)]


def train(
    config: LlamaConfig, base_compute: str, batches: Sequence[Tensor], device: torch.device
) -> tuple[list[float], list[float], float]:
    """Train an adapter beside the model that the seed draws, a micro-batch a step.

    Returns:
        the mean loss and the gradient's norm of each step, and the seconds of those after the
        steps that warm up.
    """
    torch.manual_seed(SEED)
    model = random_model(config, device)
    if base_compute != "bf16":
        model.multiply_in_8_bits(FORWARD_FORMATS[base_compute])
    model.attach_lora(LoRAConfig(RANK, 2 * RANK, 0.0, PROJECTIONS), SEED)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamW(GradientArena(parameters), weight_decay=0.0)
    policies: list[Policy] = ["expand"] * len(model.layers)
    micro_step = MicroStep(model, optimizer.gradients, policies, captures=device.type == "cuda")
    losses, norms, start = [], [], 0.0
    for index, ids in enumerate(batches):
        if index == NUM_WARM_UPS:
            synchronize()
            start = time.perf_counter()
        num_targets = ids.shape[0] * (ids.shape[1] - 1)
        factor = torch.full((), 1 / num_targets, device=device)
        optimizer.gradients.zero_()
        loss = micro_step(Batch(ids, ids), factor, SEED)
        # both may be parts of what the next step writes
        norms.append(optimizer.step(LEARNING_RATE, MAX_NORM).clone())
        losses.append(loss / num_targets)
    synchronize()
    seconds = time.perf_counter() - start
    return torch.stack(losses).tolist(), torch.stack(norms).tolist(), seconds


def row_of(
    data: str, base_compute: str, losses: Sequence[float], norms: Sequence[float], rate: float
) -> Row:
    """Record a run, of which each ten steps become one point."""
    ends = [*range(STEPS_OF_A_POINT, len(losses) + 1, STEPS_OF_A_POINT)]
    points = [slice(end - STEPS_OF_A_POINT, end) for end in ends]
    return {
        "data": data,
        "base_compute": base_compute,
        "first_loss": round(losses[0], 5),
        "steps": ends,
        "losses": [round(fmean(losses[point]), 5) for point in points],
        # a NaN would not be the largest of anything
        "grad_norms": [
            round(max(norm if math.isfinite(norm) else math.inf for norm in norms[point]), 5)
            for point in points
        ],
        "num_skipped": sum(not math.isfinite(norm) for norm in norms),
        "tokens_per_second": round(rate, 1),
    }


def run(
    config: LlamaConfig,
    data: str,
    base_compute: str,
    num_steps: int,
    shape: tuple[int, int],
    device: torch.device,
) -> Row:
    """Train once, and record it."""
    batches = batches_of(data, num_steps, shape, config.vocab_size)
    losses, norms, seconds = train(config, base_compute, batches, device)
    # the model that is gone, before the next one is made
    gc.collect()
    torch.cuda.empty_cache()
    rate = (num_steps - NUM_WARM_UPS) * shape[0] * shape[1] / seconds
    return row_of(data, base_compute, losses, norms, rate)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="Train an 8B model's shape in bf16 and in 8 bits.")
    result.add_argument("--steps", type=int, default=300, help="of a micro-batch each")
    result.add_argument("--shape", default="1x2048", help="of a micro-batch, SAMPLESxTOKENS")
    result.add_argument("--json", type=Path, required=True, help="result file to write")
    result.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    return result


def measure_all(
    config: LlamaConfig, arguments: argparse.Namespace, device: torch.device
) -> list[Row]:
    """Run all pairs of data and products, and write the file after each."""
    record, start = head("fp8_8b", arguments.commit), time.monotonic()
    rows: list[Row] = []
    for data in DATA:
        for base_compute in BASE_COMPUTES:
            shape = parse_shape(arguments.shape)
            rows.append(run(config, data, base_compute, arguments.steps, shape, device))
            seconds = round(time.monotonic() - start, 1)
            record |= {"shape": arguments.shape, "seconds": seconds, "rows": rows}
            write(arguments.json, record)
    return rows


def main() -> int:
    arguments = parser().parse_args()
    if arguments.steps < STEPS_OF_A_POINT:
        raise ValueError(f"--steps must be at least {STEPS_OF_A_POINT}: got {arguments.steps}")
    if not torch.cuda.is_available():
        raise RuntimeError("a benchmark needs a CUDA GPU: torch.cuda.is_available() is False")
    device = torch.device("cuda", torch.cuda.current_device())
    configure_torch(device, local_rank=0, is_deterministic=False)
    print(aligned(*fp8_8b_table(measure_all(LLAMA_3_8B, arguments, device))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
