"""Train with base products in bf16, in 8 bits and of an unquantized base, and compare losses.

    python -m benchmarks fp8_curves --model DIR --data NAME TRAIN EVAL [--data ...] --json FILE

Each run is a process of train.py, several at a time: a seed decides the adapter's first values and
the order of the samples, the same for every kind. train.py evaluates in 16 bits, whatever the
products of its training; beside that, a process of its own evaluates each adapter that was trained
in 8 bits with the base products in bf16, as a user loads it:

    train.py --base-compute fp8 --output OUT        train.py --init-adapter OUT --max-steps 0

A row is a run: the losses at each evaluation, and the mean loss of the steps since the one before.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.record import ROOT, head, write
from benchmarks.resume import rows_of
from benchmarks.tables import Row, aligned, fp8_curves_table
from prepare.base_compute import FORWARD_FORMATS

KINDS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "int8": ("--base-compute", "int8"),
    "fp8": ("--base-compute", "fp8"),
    "fp8-backward": ("--base-compute", "fp8-backward"),
    "unquantized": ("--quant", "none"),
}
# of train.py: packed rows, a micro-batch a step
FLAGS = (
    *("--dtype", "bfloat16", "--packing", "--max-length", "2048", "--batch-size", "2"),
    *("--gradient-accumulation-steps", "1", "--save-steps", "0"),
)
# of what a failed process printed
SAID = 3000


class Data(NamedTuple):
    """A data set: its name in the record, its files."""

    name: str
    train: str
    eval: str


class Case(NamedTuple):
    """One run."""

    data: Data
    kind: str
    seed: int


class Course(NamedTuple):
    """What all runs have in common."""

    model: str
    num_steps: int
    eval_steps: int
    flags: Sequence[str]


def train(flags: Sequence[str], output: Path) -> list[dict[str, Any]]:
    """Run train.py, and return its metrics.

    Raises:
        RuntimeError: it fails.
    """
    command = [sys.executable, "train.py", *FLAGS, *flags, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-SAID:]
        raise RuntimeError(f"train.py must succeed: {' '.join(command)} printed\n{said}")
    return rows_of(output)


def run(case: Case, course: Course, folder: Path) -> Row:
    """Train one run, evaluate what it made, and record its losses."""
    data, output = case.data, folder / f"{case.data.name}-{case.kind}-{case.seed}"
    common = ["--model", course.model, "--data", data.train, "--eval-data", data.eval]
    common += course.flags
    steps = ["--max-steps", str(course.num_steps), "--eval-steps", str(course.eval_steps)]
    given = [*common, *steps, "--seed", str(case.seed), *KINDS[case.kind]]
    metrics = train(given, output)
    evaluations = {row["step"]: row["eval_loss"] for row in metrics if "eval_loss" in row}
    losses = {row["step"]: row["loss"] for row in metrics if "loss" in row}
    row: Row = {
        "data": data.name,
        "kind": case.kind,
        "seed": case.seed,
        "steps": [*evaluations],
        "eval_losses": [round(loss, 5) for loss in evaluations.values()],
        "train_losses": [
            round(fmean(losses[step] for step in range(before + 1, at + 1)), 5)
            for before, at in pairwise(evaluations)
        ],
    }
    if case.kind in FORWARD_FORMATS:
        served = ["--init-adapter", str(output), "--max-steps", "0"]
        (evaluated,) = train([*common, *served], output.with_name(f"{output.name}-served"))
        row["served_eval_loss"] = round(evaluated["eval_loss"], 5)
    print(f"{data.name}, {case.kind}, seed {case.seed}: {row['eval_losses']}", flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare losses of training in FP8 and in bf16.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs=3, action="append", metavar="NAME_OR_FILE")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--eval-steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parallel", type=int, default=1, help="processes at a time")
    parser.add_argument("--json", type=Path, required=True, help="result file to write")
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    parser.add_argument("flags", nargs="*", help="more flags for train.py, after --")
    arguments = parser.parse_args()
    record = head("fp8_curves", arguments.commit)
    start = time.monotonic()
    course = Course(arguments.model, arguments.steps, arguments.eval_steps, arguments.flags)
    sets = [Data(*given) for given in arguments.data]
    cases = [Case(data, kind, seed) for data in sets for kind in KINDS for seed in arguments.seeds]
    rows: list[Row] = []
    record |= {
        "model": Path(arguments.model).name,
        "files": {data.name: [Path(data.train).name, Path(data.eval).name] for data in sets},
        "flags": [*FLAGS, *arguments.flags],
        "rows": rows,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(arguments.parallel) as pool,
    ):
        for row in pool.map(lambda case: run(case, course, Path(folder)), cases):
            rows.append(row)
            record["seconds"] = round(time.monotonic() - start, 1)
            # a benchmark that is cut leaves the runs that ended
            write(arguments.json, record)
    print(aligned(*fp8_curves_table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
