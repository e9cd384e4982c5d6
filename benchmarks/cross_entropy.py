"""Measure cross-entropy over rows of logits: ours, torch, torch.compile, a copy's bandwidth.

    python -m benchmarks cross_entropy --json benchmarks/results/cross_entropy.h100.json

Bandwidth is the limit. `loss` is what an evaluation computes, `gradient` the loss and its gradient
in the logits' place, as a chunk of a training step does; torch is the reference. A call in place
finds what the last one left, as finite as the logits were: its time does not depend on them.
"""

import sys

import torch

from benchmarks.command import Machine, Result, Work, main
from benchmarks.layer_operations import Provided, forward_calls, rows_of
from benchmarks.measure import num_input_sets
from benchmarks.tables import Row, aligned, operation_table
from kernels.cross_entropy import (
    _launch_cross_entropy,
    cross_entropy_reference,
    cross_entropy_reference_,
)

LAYER = "llama-3-8b.lm_head"
VOCAB_SIZE = 128_256
# reads and writes of a row that memory must serve; the gradient's second read may come from L2
TENSORS = {"loss": 1, "gradient": 2}
REFERENCES = {"loss": cross_entropy_reference, "gradient": cross_entropy_reference_}


def shapes() -> list[tuple[int, torch.dtype]]:
    """List what is measured: rows and dtype, of a chunk of llama/loss.py."""
    return [(512, torch.bfloat16)]


def cross_entropy_bytes(mode: str, m: int, vocab_size: int, itemsize: int) -> float:
    """Count the bytes of a pass: M V S for the losses, 2 M V S with the gradient; and 12 M."""
    return TENSORS[mode] * m * vocab_size * itemsize + 12 * m


def measure_cross_entropy(
    m: int, dtype: torch.dtype, machine: Machine, vocab_size: int = VOCAB_SIZE
) -> list[Row]:
    """Measure one chunk: losses alone, then with the gradient."""
    logits_bytes = m * vocab_size * dtype.itemsize
    # torch's temporaries are several copies in float32
    num_sets = num_input_sets(logits_bytes, 8 * logits_bytes, machine.device)
    sets = [
        (
            torch.randn((m, vocab_size), device=machine.device).to(dtype),
            torch.randint(vocab_size, (m,), device=machine.device),
        )
        for _ in range(num_sets)
    ]
    rows: list[Row] = []
    for mode, reference in REFERENCES.items():
        num_bytes = cross_entropy_bytes(mode, m, vocab_size, dtype.itemsize)
        work = Work(mode, LAYER, m, vocab_size, vocab_size, dtype, num_bytes, 0)
        ours = [(*inputs, mode == "gradient") for inputs in sets]
        provided = Provided(
            forward_calls(_launch_cross_entropy, ours),
            forward_calls(reference, sets),
            forward_calls(torch.compile(reference, dynamic=False), sets),
        )
        rows += rows_of(work, provided, machine)
    return rows


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for m, dtype in shapes():
        rows += measure_cross_entropy(m, dtype, machine)
        print(f"measured {m} rows", flush=True)
    return Result(rows, {}, aligned(*operation_table(rows)))


if __name__ == "__main__":
    sys.exit(main("cross_entropy", run))
