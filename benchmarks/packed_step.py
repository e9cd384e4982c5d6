"""Measure training on samples that share rows: beside full rows, and beside padded ones.

    python -m benchmarks packed_step --json benchmarks/results/packed_step.h100.json
    python -m benchmarks packed_step --model smollm2-135m ...

    limit     the products and the attention of full rows alone (`train_step_limit.py`)
    full      one sample of 2,048 tokens a row, 4 rows a micro-batch
    packed    samples as long as GSM8K's, in rows of 2,048 tokens, 4 rows a micro-batch
    padded    the same samples, 4 a micro-batch, each padded to the longest of them

A named shape with random weights, Llama-3-8B's by default, rank 16 on all linear layers, AdamW in
32 bits; a step is one micro-batch, laid out by train.py's own `Epochs`, and the optimizer's step.
Tokens are counted without padding. Every shape has come twice before anything is timed, so all are
captured.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.random_model import CONFIGS, random_model
from benchmarks.record import head, write
from benchmarks.step_timing import synchronize
from benchmarks.tables import Row, aligned, packed_step_table
from benchmarks.train_step_limit import rows_of
from data.epochs import Epochs
from data.tokens.pieces import ROW
from data.tokens.stored_samples import StoredSamples
from llama.config import LlamaConfig
from llama.model import PROJECTIONS, Llama
from lora.config import LoRAConfig
from optim.adamw import AdamW
from optim.arena import GradientArena
from run.machine import configure_torch
from step.micro_step import MicroStep, Policy

RANK = 16
LEARNING_RATE = 1e-4
BATCH_SIZE = 4
ROW_LENGTH = 2048
NUM_SAMPLES = 400
SEED = 0
# tokens of GSM8K's 7,473 training samples in Llama-3's chat template, 168.6 on average: so many at
# most have the share beside them
GSM8K_LENGTHS = (62, 83, 95, 104, 119, 132, 144, 158, 173, 191, 212, 248, 279, 338, 412, 469)
GSM8K_SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1)
NUM_WARM_UPS = 2
NUM_PASSES = 3


def random_samples(lengths: Sequence[int], vocab_size: int) -> StoredSamples:
    """Draw samples of these lengths, of which every token but the first is learned."""
    rows = np.zeros(len(lengths), dtype=ROW)
    rows["length"] = lengths
    rows["num_targets"] = rows["length"] - 1
    ids = np.random.default_rng(SEED).integers(0, vocab_size, sum(lengths), dtype=np.int32)
    return StoredSamples(ids, ids, rows)


def draw_lengths(num_samples: int) -> list[int]:
    """Draw lengths that are distributed as GSM8K's, between the shares evenly."""
    drawn = np.random.default_rng(SEED).random(num_samples)
    return np.interp(drawn, GSM8K_SHARES, GSM8K_LENGTHS).astype(int).tolist()


def cases(num_samples: int, row_length: int, vocab_size: int) -> dict[str, Epochs]:
    """Lay out an epoch of each kind, of about as many tokens."""
    lengths = draw_lengths(num_samples)
    num_rows = sum(lengths) // row_length
    short, full = (random_samples(x, vocab_size) for x in (lengths, [row_length] * num_rows))
    order = (SEED, True, BATCH_SIZE, 1)
    return {
        "full": Epochs(full, *order),
        "packed": Epochs(short, *order, row_length=row_length),
        "padded": Epochs(short, *order),
    }


def limit_row(config: LlamaConfig, shape: str, device: torch.device) -> Row:
    """Measure what full rows cannot do without, with all activations kept."""
    limit, _ = rows_of(config, shape, device)
    torch.cuda.empty_cache()
    return {"provider": "limit", "mode": "limit", "tokens_per_second": limit["tokens_per_second"]}


def measure(mode: str, epochs: Epochs, micro_step: MicroStep, optimizer: AdamW) -> Row:
    """Take the steps of an epoch some times over."""
    device = micro_step.model.device
    factor = torch.ones((), device=device) / 1000

    def take(step: int) -> int:
        (rows,) = epochs.micro_batches(step)
        batch = epochs.batch(rows)
        optimizer.gradients.zero_()
        optimizer.prefetch()
        micro_step(batch, factor, SEED)
        optimizer.step(LEARNING_RATE, max_norm=1.0)
        return batch.input_ids.numel()

    seconds, num_places = [], 0
    for _ in range(NUM_WARM_UPS + NUM_PASSES):
        synchronize()
        start = time.perf_counter()
        # the first epoch every time, whose shapes are known by then
        num_places = sum(take(step) for step in range(epochs.num_steps))
        synchronize()
        seconds.append(time.perf_counter() - start)
    timed = sorted(seconds[NUM_WARM_UPS:])
    return {
        "provider": "ours",
        "mode": mode,
        "samples": len(epochs.samples),
        "steps": epochs.num_steps,
        "tokens": epochs.num_tokens,
        "share_of_padding": round(1 - epochs.num_tokens / num_places, 4),
        "tokens_per_second": round(epochs.num_tokens / median(timed), 1),
        "s_min": round(timed[0], 3),
        "s_max": round(timed[-1], 3),
    }


def measure_all(model: Llama, epochs: dict[str, Epochs]) -> list[Row]:
    """Measure every kind, after an adapter is put beside the model."""
    model.attach_lora(LoRAConfig(RANK, 2 * RANK, 0.0, PROJECTIONS), SEED)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamW(GradientArena(parameters), weight_decay=0.0)
    policies: list[Policy] = ["keep"] * len(model.layers)
    micro_step = MicroStep(
        model, optimizer.gradients, policies, captures=model.device.type == "cuda"
    )
    return [measure(mode, some, micro_step, optimizer) for mode, some in epochs.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure training on rows of several samples.")
    parser.add_argument("--model", choices=CONFIGS, default="llama-3-8b", help="a named shape")
    parser.add_argument("--json", type=Path, help="result file to write")
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise RuntimeError("a benchmark needs a CUDA GPU: torch.cuda.is_available() is False")
    device = torch.device("cuda", torch.cuda.current_device())
    configure_torch(device, local_rank=0, is_deterministic=False)
    record = head("packed_step", arguments.commit) | {"model": arguments.model}
    config = CONFIGS[arguments.model]
    epochs = cases(NUM_SAMPLES, ROW_LENGTH, config.vocab_size)
    rows = [limit_row(config, f"{BATCH_SIZE}x{ROW_LENGTH}", device)]
    rows += measure_all(random_model(config, device), epochs)
    print(aligned(*packed_step_table(rows)))
    if arguments.json:
        write(arguments.json, record | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
