"""What the kernel benchmarks share: green tests first, the machine's limits, the file, the table.

A row is one provider's time for one operation on one layer. Beside what is measured stands the
limit: the bytes that the operation cannot do without over the bandwidth of a copy, or its FLOPs
over the rate of a large product, whichever takes longer; both measured in the same process.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.bitsandbytes_peer import Bitsandbytes, bitsandbytes
from benchmarks.measure import (
    Operation,
    Quantiles,
    copy_gbps,
    matmul_tflops,
    measure_in_turns,
    peak_bytes,
)
from benchmarks.record import ROOT, head, write
from benchmarks.tables import Row


@dataclass(frozen=True)
class Machine:
    """What is measured on: a device, its two limits, and the peer if it is installed."""

    device: torch.device
    copy_gbps: float
    matmul_tflops: float
    peer: Bitsandbytes | None


@dataclass(frozen=True)
class Work:
    """One operation on one layer, with the bytes and FLOPs that it cannot do without."""

    mode: str
    layer: str
    m: int | None
    n: int
    k: int
    dtype: torch.dtype
    num_bytes: float
    num_flops: float


def limit_ms(work: Work, machine: Machine) -> float:
    """Compute the shortest time that the machine's bandwidth and arithmetic allow."""
    return max(
        work.num_bytes / machine.copy_gbps / 1e6, work.num_flops / machine.matmul_tflops / 1e9
    )


def is_memory_bound(work: Work, machine: Machine) -> bool:
    """Tell whether the limit is that of the bytes."""
    return limit_ms(work, machine) == work.num_bytes / machine.copy_gbps / 1e6


def row_of(
    work: Work, provider: str, timing: str, times: Quantiles, num_peak_bytes: int, machine: Machine
) -> Row:
    """Record what one provider took for a piece of work."""
    gbps = work.num_bytes / times.ms_p50 / 1e6
    percent = 100 * gbps / machine.copy_gbps
    return {
        "provider": provider,
        "mode": work.mode,
        "layer": work.layer,
        "m": work.m,
        "n": work.n,
        "k": work.k,
        "dtype": str(work.dtype).removeprefix("torch."),
        "timing": timing,
        "ms_p20": round(times.ms_p20, 6),
        "ms_p50": round(times.ms_p50, 6),
        "ms_p80": round(times.ms_p80, 6),
        "gbps": round(gbps, 1),
        "tflops": round(work.num_flops / times.ms_p50 / 1e9, 2) if work.num_flops else None,
        "percent_of_copy": round(percent, 1) if is_memory_bound(work, machine) else None,
        "peak_bytes": num_peak_bytes,
    }


def limit_row(work: Work, machine: Machine) -> Row:
    """Record the limit as if somebody reached it."""
    ms = limit_ms(work, machine)
    return row_of(work, "limit", "model", Quantiles(ms, ms, ms), 0, machine)


class Candidate(NamedTuple):
    """One provider's way to do a piece of work."""

    work: Work
    provider: str
    operation: Operation


def measured_rows(candidates: Sequence[Candidate], machine: Machine) -> list[Row]:
    """Measure providers in turns."""
    peaks = [peak_bytes(candidate.operation.calls[0]) for candidate in candidates]
    times = measure_in_turns([candidate.operation for candidate in candidates])
    return [
        row_of(work, provider, "graph" if operation.captured else "eager", time, peak, machine)
        for (work, provider, operation), time, peak in zip(candidates, times, peaks, strict=True)
    ]


@dataclass(frozen=True)
class Result:
    """What a benchmark found: its rows, what more belongs into the file, and what to print."""

    rows: list[Row]
    more: dict[str, Any]
    text: str


def run_tests(operation: str, room: str = "kernels") -> None:
    """Run the GPU tests of an operation, or of another file of a room.

    Raises:
        RuntimeError: one fails, or there is none.
    """
    tests = f"tests/test_{room}_{operation}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", tests]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code != 0:
        raise RuntimeError(
            f"{tests} must pass before what it tests is measured: pytest's exit code is {code}"
        )


def main(operation: str, run: Callable[[Machine], Result]) -> int:
    """Run one benchmark from the command line.

    Raises:
        RuntimeError: there is no GPU, or the operation's tests fail.
    """
    parser = argparse.ArgumentParser(description=f"Measure {operation} on a GPU.")
    parser.add_argument("--json", type=Path, help="result file to write")
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise RuntimeError("a benchmark needs a CUDA GPU: torch.cuda.is_available() is False")
    run_tests(operation)
    # first, so that no measurement is lost where it fails
    record = head(operation, arguments.commit)
    start = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    peer = bitsandbytes()
    if peer is None:
        print("bitsandbytes is not installed: its rows are missing")
    machine = Machine(device, copy_gbps(device), matmul_tflops(device), peer)
    record |= {
        "bitsandbytes": peer.version if peer else None,
        "copy_gbps": round(machine.copy_gbps, 1),
        "matmul_tflops": round(machine.matmul_tflops, 1),
    }
    result = run(machine)
    record["seconds"] = round(time.monotonic() - start, 1)
    record |= result.more | {"rows": result.rows}
    print(f"\n{record['device']}, torch {record['torch']}, triton {record['triton']}")
    rates = f"copy {machine.copy_gbps:,.0f} GB/s, product {machine.matmul_tflops:,.0f} TFLOP/s"
    print(f"{rates}; {record['seconds']} s; medians in microseconds\n")
    print(result.text)
    if arguments.json:
        write(arguments.json, record)
    return 0
