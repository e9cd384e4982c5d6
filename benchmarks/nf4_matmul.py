"""Measure products with an NF4 weight over the rows of x: ours, bitsandbytes, bf16 cuBLAS.

    python -m benchmarks nf4_matmul --json benchmarks/results/nf4_matmul.h100.json

Forward is y = x W^T. Our paths are timed beside what the dispatch chooses, and where each is
overtaken by the next is looked for between the listed numbers of rows: the dispatch table is filled
from that. Transposed is grad_x = grad_y W, which training computes with the expanded weight. Few
rows are limited by the weight's bytes, many by arithmetic.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.bitsandbytes_peer import Bitsandbytes
from benchmarks.command import Candidate, Machine, Result, Work, limit_row, main, measured_rows
from benchmarks.layers import BLOCK_SIZE, LAYERS, WEIGHT_STD, nf4_bytes
from benchmarks.measure import Operation, num_input_sets
from benchmarks.tables import Row, aligned, by_case, matmul_table, short_name
from kernels.nf4_dequantize import nf4_dequantize
from kernels.nf4_matmul import (
    PathName,
    matmul_path,
    nf4_matmul,
    path_obstacle,
)
from nf4.weight import NF4Weight, quantize

DTYPE = torch.bfloat16
NUM_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# kernels that decode inside the product are no candidates beyond
DECODING_MOST_ROWS = 256
DECODING: tuple[PathName, ...] = ("fused", "warpgroup")
# the crossover is looked for to this many rows, a tile of the tensor cores
CROSSOVER_STEP = 16
# of the list of cases that are slower, on the terminal
MOST_LINES = 20
MODES = ("forward", "transposed")


def matmul_bytes(m: int, n: int, k: int, itemsize: int, weight_bytes: float) -> float:
    """Count the bytes of a product: W read, M K itemsize read and M N itemsize written.

    W is N K (1/2 + 1/B + 4 / (256 B)) as NF4, N K itemsize expanded.
    """
    return weight_bytes + m * (n + k) * itemsize


def work_of(layer: str, mode: str, m: int) -> Work:
    """Say what a product with the NF4 weight of a layer cannot do without."""
    n, k = LAYERS[layer]
    num_bytes = matmul_bytes(m, n, k, DTYPE.itemsize, nf4_bytes(n, k))
    return Work(mode, layer, m, n, k, DTYPE, num_bytes, 2 * m * n * k)


@dataclass(frozen=True)
class Operand:
    """One weight as every provider wants it."""

    weight: NF4Weight
    expanded: Tensor  # (N, K)
    theirs: tuple[Tensor, Any] | None  # packed and state of bitsandbytes


# two bf16 roundings of results, and one of levels and scales, lie well below
LARGEST_DIFFERENCE = 2**-6

Product = Callable[[Tensor, Operand], Tensor]


def operand(layer: str, machine: Machine) -> Operand:
    """Quantize a random weight as both libraries do, and expand it for cuBLAS."""
    n, k = LAYERS[layer]
    matrix = (torch.randn(n, k, device=machine.device) * WEIGHT_STD).to(DTYPE)
    weight = quantize(matrix, BLOCK_SIZE)
    theirs = machine.peer.quantize(matrix) if machine.peer else None
    return Operand(weight, nf4_dequantize(weight, DTYPE), theirs)


def products(mode: str, paths: Sequence[PathName], peer: Bitsandbytes | None) -> dict[str, Product]:
    """Name the ways to multiply in a mode: what ours chooses, some of its paths, the peers."""

    def torch_product(x: Tensor, operand: Operand) -> Tensor:
        return x @ (operand.expanded.T if mode == "forward" else operand.expanded)

    def peer_product(x: Tensor, operand: Operand) -> Tensor:
        assert peer is not None
        assert operand.theirs is not None
        if mode == "forward":
            return peer.matmul(x, *operand.theirs)
        return x @ peer.dequantize(*operand.theirs)

    found: dict[str, Product] = {}
    if mode == "forward":
        found["ours"] = lambda x, operand: nf4_matmul(x, operand.weight)
        for path in paths:
            found[f"ours-{path}"] = lambda x, operand, path=path: nf4_matmul(
                x, operand.weight, path=path
            )
    else:
        found["ours"] = lambda x, operand: x @ nf4_dequantize(operand.weight, DTYPE)
    if peer:
        found["bitsandbytes"] = peer_product
    return found | {"torch": torch_product}


def check_agreement(provider: str, actual: Tensor, expected: Tensor) -> None:
    """Refuse to time a provider that computes something else.

    Raises:
        RuntimeError: the results differ by more than rounding explains.
    """
    assert actual.shape == expected.shape
    difference = float((actual.float() - expected.float()).norm() / expected.float().norm())
    # not <=: a NaN must not pass
    if not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(
            f"{provider} must agree with cuBLAS on the expanded weight within "
            f"{LARGEST_DIFFERENCE}: got a relative difference of {difference:.2e} at "
            f"shape {tuple(actual.shape)}"
        )


class LayerBench:
    """One layer's weights, made once, and the measurements over them."""

    def __init__(self, layer: str, machine: Machine) -> None:
        self.layer, self.machine = layer, machine
        n, k = LAYERS[layer]
        # one row of x moves the fewest bytes, so it needs the most sets
        moved = work_of(layer, MODES[0], 1).num_bytes
        resident = 2 * nf4_bytes(n, k) + n * k * DTYPE.itemsize
        num_sets = num_input_sets(moved, resident, machine.device)
        self.operands = [operand(layer, machine) for _ in range(num_sets)]

    def measure(self, mode: str, m: int, only: tuple[str, ...] = ()) -> dict[str, Row]:
        """Measure a product by every provider, or by some, over the same inputs."""
        work, machine = work_of(self.layer, mode, m), self.machine
        num_columns = work.k if mode == "forward" else work.n
        resident = m * (work.n + work.k) * DTYPE.itemsize
        num_sets = num_input_sets(work.num_bytes, resident, machine.device)
        operands = self.operands[:num_sets]
        inputs = [torch.randn(m, num_columns, dtype=DTYPE, device=machine.device) for _ in operands]
        rows = {} if only else {"limit": limit_row(work, machine) | {"path": None}}
        weight = operands[0].weight
        paths: list[PathName] = [
            path
            for path in DECODING
            if m <= DECODING_MOST_ROWS and not path_obstacle(path, weight, DTYPE)
        ]
        ways = products(mode, [*paths, "expand"], machine.peer)
        expected = ways["torch"](inputs[0], operands[0])
        candidates = []
        for provider, product in ways.items():
            if only and provider not in only:
                continue
            check_agreement(provider, product(inputs[0], operands[0]), expected)
            moved = work
            if provider == "torch":
                weight_bytes = work.n * work.k * DTYPE.itemsize
                moved = replace(
                    work,
                    num_bytes=matmul_bytes(m, work.n, work.k, DTYPE.itemsize, weight_bytes),
                )
            calls = [partial(product, x, w) for x, w in zip(inputs, operands, strict=True)]
            candidates.append(Candidate(moved, provider, Operation(calls)))
        measured = measured_rows(candidates, machine)
        rows |= {row["provider"]: row | {"path": None} for row in measured}
        if "ours" in rows:
            is_forward = mode == "forward"
            path = matmul_path(m, weight, DTYPE).name if is_forward else "expand"
            rows["ours"]["path"] = path
        return rows


def crossover(times: Mapping[int, tuple[float, float]]) -> tuple[int, int | None]:
    """Find up to how many rows a path is no slower than the next.

    Args:
        times: for numbers of rows, the time of the path and of the next.

    Returns:
        The largest number of rows such that it and all smaller ones in `times` are won, 0 if none
        is; and the smallest that is lost, None if none is.
    """
    won = 0
    for m in sorted(times):
        ms, next_ms = times[m]
        if ms > next_ms:
            return won, m
        won = m
    return won, None


def between(won: int, lost: int | None) -> int | None:
    """Choose the number of rows to measure next, None if the crossover is known well enough."""
    if lost is None or won < CROSSOVER_STEP or lost - won <= CROSSOVER_STEP:
        return None
    return (won + lost) // 2 // CROSSOVER_STEP * CROSSOVER_STEP


def find_crossover(
    bench: LayerBench, mode: str, rows: list[Row], paths: tuple[str, str]
) -> tuple[int, list[Row]]:
    """Narrow down where a path is overtaken by the next, by measuring both in between."""
    times = {
        case.m: (found[paths[0]]["ms_p50"], found[paths[1]]["ms_p50"])
        for case, found in by_case(rows).items()
        if case.m is not None and set(paths) <= set(found)
    }
    won, lost = crossover(times)
    more: list[Row] = []
    while (m := between(won, lost)) is not None:
        found = bench.measure(mode, m, only=paths)
        more += found.values()
        times[m] = (found[paths[0]]["ms_p50"], found[paths[1]]["ms_p50"])
        won, lost = crossover(times)
    return won, more


def slower_than(rows: list[Row]) -> list[str]:
    """List where the dispatched product is more than 2 % slower than another NF4 product."""
    lines = []
    for case, found in by_case(rows).items():
        for other in found:
            if "ours" not in found or other in ("ours", "limit", "torch"):
                continue
            ratio = found["ours"]["ms_p50"] / found[other]["ms_p50"]
            if ratio > 1.02:
                name = f"{short_name(case.layer)} {case.mode} M={case.m}"
                lines.append(f"{name}: {ratio:.2f} x the time of {other}")
    return lines


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    crossovers: list[dict[str, Any]] = []
    for layer in LAYERS:
        bench = LayerBench(layer, machine)
        for mode in MODES:
            listed = [row for m in NUM_ROWS for row in bench.measure(mode, m).values()]
            between_listed: list[Row] = []
            measured = {row["provider"] for row in listed}
            ways = [f"ours-{path}" for path in (*DECODING, "expand")]
            ways = [way for way in ways if way in measured]
            for way, next_way in pairwise(ways):
                up_to, more = find_crossover(bench, mode, listed, (way, next_way))
                crossovers.append(
                    {"layer": layer, "mode": mode, "path": way, "next": next_way, "up_to": up_to}
                )
                between_listed += more
            # with those that were measured in between
            rows += sorted(listed + between_listed, key=lambda row: row["m"])
            print(f"measured {layer} {mode}", flush=True)
        del bench
    listed = [row for row in rows if row["m"] in NUM_ROWS]
    slower = slower_than(rows)
    text = [
        aligned(*matmul_table(listed)),
        "\na path is no slower than the next up to",
        *(
            f"  {short_name(entry['layer'])} {entry['mode']}: {entry['path']} before "
            f"{entry['next']}: M = {entry['up_to']}"
            for entry in crossovers
        ),
        f"\nslower than another way by more than 2 %: {len(slower)}",
        *(f"  {line}" for line in slower[:MOST_LINES]),
    ]
    return Result(rows, {"crossovers": crossovers}, "\n".join(text))


if __name__ == "__main__":
    sys.exit(main("nf4_matmul", run))
