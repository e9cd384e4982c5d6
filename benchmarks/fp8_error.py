"""Measure what FP8 products err on a model's own activations and gradients, layer by layer.

    python -m benchmarks fp8_error --model DIR --data FILE --json FILE

Some steps of train.py in bfloat16 make an adapter. All that the next step multiplies by a frozen
weight is then kept, and multiplied again in four ways:

    y = x W^T       grad_x = grad_y W       error = |Y - exact| / |exact|, over a layer's projection

    exact           the NF4 weight and sums in float32
    bf16            the weight rounded to bfloat16
    fp8             as FP8 products do: both operands in E4M3, one scale for the weight
    fp8-by-row      the same with a scale for each row of the weight, in grad_x of its transpose

`largest` is the largest magnitude of an operand's row over that row's root mean square. Last, the
adapter's gradient of that step is computed with all base products in float32, bfloat16 and FP8:
bf16 is compared with float32, FP8 with bf16, and the gradient of the step behind it, in bf16, tells
how far two batches are apart. `--base-compute fp8` leaves attention's products in 16 bits forward,
and errs less. On a CPU the references compute, which round as the kernels.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import head, write
from benchmarks.tables import Row, aligned, fp8_error_table
from kernels.fp8 import E4M3, Fp8Rows, empty_fp8_rows, scale_of
from kernels.matmul_8bit import matmul_8bit
from kernels.nf4_dequantize import nf4_dequantize
from kernels.nf4_to_fp8 import fp8_scale, nf4_to_fp8
from kernels.rows_8bit import quantize_rows
from llama.model import Llama
from lora.expansion import SixteenBits
from lora.linear_group import LinearGroup
from lora.rows import Rows
from nf4.weight import NF4Weight
from prepare.job import check
from run.ranks import Ranks
from step.micro_step import MicroStep
from train import load_run, train_step
from training.run import Run, first_state

# steps before the one that is measured: where B is zero, A has no gradient
STEPS = 2
# of train.py, beside its four micro-batches a step: full rows
FLAGS = ("--packing", "--max-length", "512", "--batch-size", "4")
PROVIDERS = ("bf16", "fp8", "fp8-by-row")
# of operands, whose zeros are the rows of padding
LEAST_RMS = 1e-30


class Recording(SixteenBits):
    """A group's weight in 16 bits that keeps copies of what it multiplies."""

    def __init__(self, *_: Tensor | int) -> None:
        self.x: list[Tensor] = []
        self.grad_y: list[Tensor] = []

    def multiply(self, x: Rows, bias: Tensor | None, out: Tensor | None) -> Tensor:
        self.x.append(x.ext[:, : self.in_features].clone())
        return super().multiply(x, bias, out)

    def multiply_back(self, grad_ext: Tensor, has_updates: bool) -> Tensor:
        self.grad_y.append(grad_ext[:, : self.num_rows].clone())
        return super().multiply_back(grad_ext, has_updates)


def multiply_by_row(x: Fp8Rows, W: Tensor) -> Tensor:  # (M, K) and (N, K) float32 -> (M, N)
    """Multiply E4M3 rows by a weight in E4M3 with a scale for each row."""
    scales = scale_of(W.abs().amax(dim=1))
    values = (W / scales[:, None]).to(E4M3).float()
    return x.values.float() @ values.T * x.scales[:, None] * scales


def products(
    x: Tensor,  # (M, K), or (M, N) gradients
    weight: NF4Weight,  # (N, K)
    is_transposed: bool,
) -> dict[str, Tensor]:
    """Multiply rows by a weight, or by its transpose, in every way; `exact` is in float32."""
    W = nf4_dequantize(weight, torch.float32)
    W = W.T.contiguous() if is_transposed else W
    rows = quantize_rows(x, empty_fp8_rows(x.shape, x.device))
    of_fp8 = x.new_empty(x.shape[0], W.shape[0])
    matmul_8bit(rows, nf4_to_fp8(weight, fp8_scale(weight), is_transposed), of_fp8)
    return {
        "exact": x.float() @ W.T,
        "bf16": x @ W.to(x.dtype).T,
        "fp8": of_fp8,
        "fp8-by-row": multiply_by_row(rows, W).to(x.dtype),
    }


def relative_error(found: Tensor, exact: Tensor) -> float:
    return round(float((found.double() - exact.double()).norm() / exact.double().norm()), 6)


def cosine(found: Tensor, exact: Tensor) -> float:
    return round(float(F.cosine_similarity(found, exact, dim=0)), 7)


def largest_over_rms(x: Tensor) -> float:
    """Find by how much the largest magnitude of a row exceeds the row's root mean square."""
    rows = x.float()
    rms = rows.square().mean(dim=1).sqrt().clamp(min=LEAST_RMS)
    return round(float((rows.abs().amax(dim=1) / rms).max()), 2)


def product_rows(layer: int, group: LinearGroup, recording: Recording) -> Iterator[Row]:
    """Measure the products of a group: y of each projection, grad_x of all together."""
    assert isinstance(group.weight, NF4Weight)
    parts: dict[str, dict[str, slice]] = {
        "y": dict(zip(group.names, group.row_slices(), strict=True)),
        "grad_x": {", ".join(group.names): slice(None)},
    }
    for product, operands in (("y", recording.x), ("grad_x", recording.grad_y)):
        # the first layer's input has no gradient
        if not operands:
            continue
        x = torch.cat(operands)
        found = products(x, group.weight, is_transposed=product == "grad_x")
        for projection, part in parts[product].items():
            exact = found["exact"][:, part]
            yield {
                "product": product,
                "projection": projection,
                "layer": layer,
                **{name: relative_error(found[name][:, part], exact) for name in PROVIDERS},
                "largest": largest_over_rms(x),
            }


def recordings(model: Llama) -> Iterator[tuple[int, LinearGroup, Recording]]:
    """Go back to products in 16 bits where they are in FP8, and prepare to record them."""
    for layer in model.layers:
        for group in layer.modules():
            if isinstance(group, LinearGroup) and group.fp8_scale is not None:
                group.fp8_scale = None
                expansion = group.expand(model.compute_dtype)
                assert isinstance(expansion, SixteenBits)
                yield layer.index, group, Recording(*expansion)


def take_step(
    run: Run, recorded: Sequence[tuple[int, LinearGroup, Recording]] = ()
) -> list[Tensor]:
    """Compute the gradient of a run's next step, of every layer; the run stays as it is."""
    arena, epochs = run.optimizer.gradients, run.job.epochs
    # launched kernel by kernel: a captured graph would go on with the weights that it knows
    micro_step = MicroStep(run.model, arena, run.micro_step.policies)
    for _, group, recording in recorded:
        group.expanded = (recording, recording)
    arena.zero_()
    micro_batches = epochs.micro_batches(run.state.step)
    _, num_targets = epochs.count(micro_batches)
    for rows in micro_batches:
        micro_step(epochs.batch(rows), torch.tensor(1 / num_targets, device=run.model.device))
    return [
        torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]).double()
        for layer in run.model.layers
    ]


def gradient_rows(
    exact: Sequence[Tensor], bf16: Sequence[Tensor], fp8: Sequence[Tensor]
) -> Iterator[Row]:
    """Compare the adapter's gradients, of every layer and of all, whose layer is None."""
    wholes = [torch.cat([*layers]) for layers in (exact, bf16, fp8)]
    compared = [*enumerate(zip(exact, bf16, fp8, strict=True)), (None, wholes)]
    for layer, (of_exact, of_bf16, of_fp8) in compared:
        yield {
            "product": "gradient",
            "projection": "all",
            "layer": layer,
            "bf16": relative_error(of_bf16, of_exact),
            "fp8": relative_error(of_fp8, of_bf16),
            "cosine-bf16": cosine(of_bf16, of_exact),
            "cosine-fp8": cosine(of_fp8, of_bf16),
        }


def begin(flags: Sequence[str], dtype: str) -> Run:
    """Load a run of train.py."""
    ranks = Ranks()
    job = check([*flags, "--dtype", dtype, "--activations", "keep"], ranks, datetime.now())
    assert job is not None
    return load_run(job, ranks, first_state(job, ranks))


def measure(flags: Sequence[str], steps: int) -> tuple[list[Row], dict[str, Any]]:
    """Measure the step behind some steps of a run: its products, then its gradient.

    Returns:
        The rows, and what was measured.
    """
    run, exact = begin(flags, "bfloat16"), begin(flags, "float32")
    for _ in range(steps):
        train_step(run)
    exact.state.step = run.state.step
    adapters = exact.model.trainable_parameters(), run.model.trainable_parameters()
    for own, given in zip(*adapters, strict=True):
        own.detach().copy_(given.detach())
    of_exact = take_step(exact)
    # all of them, attention's forward too
    for _, group in run.model.groups():
        group.multiply_in_8_bits(forward=E4M3)
    of_fp8 = take_step(run)
    recorded = [*recordings(run.model)]
    of_bf16 = take_step(run, recorded)
    num_tokens, num_targets = run.job.epochs.count(run.job.epochs.micro_batches(run.state.step))
    rows = [row for each in recorded for row in product_rows(*each)]
    rows += gradient_rows(of_exact, of_bf16, of_fp8)
    run.state.step += 1
    of_next = take_step(run)
    return rows, {
        "steps_before": steps,
        "tokens": num_tokens,
        "target_tokens": num_targets,
        "cosine_of_next_batch": cosine(torch.cat(of_next), torch.cat(of_bf16)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the errors of FP8 products.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="before the one measured")
    parser.add_argument("--json", type=Path, help="result file to write")
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    parser.add_argument("flags", nargs="*", help="more flags for train.py, after --")
    arguments = parser.parse_args()
    record = head("fp8_error", arguments.commit)
    start = time.monotonic()
    flags = [*FLAGS, "--model", arguments.model, "--data", arguments.data, *arguments.flags]
    rows, measured = measure(flags, arguments.steps)
    record |= {name: Path(getattr(arguments, name)).name for name in ("model", "data")} | measured
    record |= {"seconds": round(time.monotonic() - start, 1), "rows": rows}
    print(aligned(*fp8_error_table(rows)))
    if arguments.json:
        write(arguments.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
