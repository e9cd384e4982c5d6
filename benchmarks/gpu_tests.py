"""Run the tests that need a GPU and record what they said: how many, of which file, how long.

    python -m benchmarks gpu_tests --json benchmarks/results/gpu_tests.h100.json

Three stages, each of which begins when the one before it has ended:

    side by side    --jobs files at a time, spread over the GPUs: most of their time is compiling
    slow            they take much memory: a file at a time on each GPU
    alone           they use all GPUs, or read what all processes use: a file at a time

A stage begins with the files that took the longest in the record that is replaced. A line is
printed as each file ends, and the record is written: a run that is cut leaves the files that ended,
and names the others. A failing test makes the command fail, and is recorded too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from benchmarks.record import ROOT, head, text_of

# pytest's exit code where a file has no test of those asked for
NO_TESTS = 5
COUNTS = ("tests", "failures", "errors", "skipped")


@dataclass(frozen=True)
class Stage:
    """Files that run at the same time, and the tests of them that do.

    Attributes:
        gpus: of each file that runs at a time, the GPU that it begins with.
    """

    markers: str
    files: list[str]
    gpus: list[int]


@dataclass(frozen=True)
class Ended:
    """Tests of a file that have ended: which, pytest's exit code, its report if there is one."""

    name: str
    code: int
    suites: list[ElementTree.Element]

    def count(self, name: str) -> int:
        return sum(int(suite.get(name, 0)) for suite in self.suites)


def stages_of(files: Sequence[str], num_gpus: int, jobs: int) -> list[Stage]:
    """Divide the tests of files by what they need of the GPUs."""
    texts = {file: (ROOT / file).read_text() for file in files}
    slow, alone = (
        [file for file in files if f"pytest.mark.{marker}" in texts[file]]
        for marker in ("slow", "alone")
    )
    return [
        Stage("gpu and not slow and not alone", [*files], [i % num_gpus for i in range(jobs)]),
        Stage("gpu and slow and not alone", slow, [*range(num_gpus)]),
        Stage("gpu and alone", alone, [0]),
    ]


def name_of(file: str, markers: str) -> str:
    return f"{file} ({markers})"


def run(file: str, markers: str, first_gpu: int, report: Path) -> Ended:
    """Run those tests of a file that have the markers, in a process whose GPUs begin with one."""
    num_gpus = torch.cuda.device_count()
    order = [(first_gpu + i) % num_gpus for i in range(num_gpus)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, order))}
    command = [sys.executable, "-m", "pytest", "-m", markers, "-q", f"--junitxml={report}", file]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, check=False, env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    suites = [*ElementTree.parse(report).getroot().iter("testsuite")] if report.exists() else []
    ended = Ended(name_of(file, markers), done.returncode, suites)
    counts = ", ".join(f"{ended.count(name)} {name}" for name in COUNTS)
    print(f"{ended.name}: {counts} in {seconds:.1f} s", flush=True)
    if ended.code not in (0, NO_TESTS):
        print(done.stdout[-4000:], flush=True)
    return ended


def run_stage(stage: Stage, folder: Path) -> Iterator[Ended]:
    """Run the files of a stage, each from a GPU that is free, and hand on each as it ends.

    Args:
        folder: for pytest's reports.
    """
    free: SimpleQueue[int] = SimpleQueue()
    for gpu in stage.gpus:
        free.put(gpu)

    def run_on_a_free_gpu(file: str) -> Ended:
        gpu = free.get()
        try:
            return run(file, stage.markers, gpu, folder / f"{Path(file).stem}-{stage.markers}.xml")
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(stage.gpus)) as pool:
        running = [pool.submit(run_on_a_free_gpu, file) for file in stage.files]
        for future in as_completed(running):
            yield future.result()


def summary(ended: Sequence[Ended]) -> dict[str, Any]:
    """Count what the tests said, in all and by file, and name those that failed."""
    per_file: dict[str, int] = {}
    seconds: dict[str, float] = {}
    failed: list[str] = []
    for case in (
        case for each in ended for suite in each.suites for case in suite.iter("testcase")
    ):
        name = case.get("classname", "").rpartition(".")[2]
        per_file[name] = per_file.get(name, 0) + 1
        seconds[name] = round(seconds.get(name, 0) + float(case.get("time", 0)), 1)
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{name}::{case.get('name')}")
    counts = {name: sum(each.count(name) for each in ended) for name in COUNTS}
    return counts | {"per_file": per_file, "seconds_per_file": seconds, "failed": failed}


def longest_first(files: list[str], before: Path) -> list[str]:
    """Sort files by their time in an earlier record; those that it does not have come first."""
    record = json.loads(before.read_text()) if before.exists() else {}
    seconds = record.get("seconds_per_file", {})
    return sorted(files, key=lambda file: -seconds.get(Path(file).stem, float("inf")))


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the GPU tests and record what they said.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="files that run at a time")
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    parser.add_argument("files", nargs="*", help="by default all that have GPU tests")
    arguments = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    files = arguments.files or [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text()
    ]
    stages = stages_of(longest_first(files, arguments.json), num_gpus, arguments.jobs)
    record = head("gpu_tests", arguments.commit) | {"num_gpus": num_gpus, "jobs": arguments.jobs}
    start = time.perf_counter()
    ended: list[Ended] = []
    unfinished = [name_of(file, stage.markers) for stage in stages for file in stage.files]
    with tempfile.TemporaryDirectory() as folder:
        for each in chain.from_iterable(run_stage(stage, Path(folder)) for stage in stages):
            ended.append(each)
            unfinished.remove(each.name)
            seconds = round(time.perf_counter() - start, 1)
            record |= {"seconds": seconds, **summary(ended), "unfinished": unfinished}
            arguments.json.write_text(text_of(record))
    print({name: record[name] for name in (*COUNTS, "seconds", "failed")})
    return int(any(each.code not in (0, NO_TESTS) for each in ended))


if __name__ == "__main__":
    sys.exit(main())
