"""Run the tests that need a GPU and record what they said: how many, of which file, how long.

    python -m benchmarks gpu_tests --json benchmarks/results/gpu_tests.h100.json

Files run side by side, --jobs at a time, spread over the GPUs: most of a file's time is compiling.
Slow tests take much memory, so they run afterwards, a file at a time on each GPU. A failing test
makes the command fail, and is recorded too.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.record import ROOT, head, write

# pytest's exit code where a file has no test of those asked for
NO_TESTS = 5


def run(file: str, markers: str, report: Path, first_gpu: int) -> int:
    """Run those tests of a file that have the markers, in a process whose GPUs begin with one."""
    num_gpus = torch.cuda.device_count()
    order = [(first_gpu + i) % num_gpus for i in range(num_gpus)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, order))}
    command = [sys.executable, "-m", "pytest", "-m", markers, "-q", f"--junitxml={report}", file]
    done = subprocess.run(
        command, cwd=ROOT, check=False, env=environment, capture_output=True, text=True
    )
    if done.returncode not in (0, NO_TESTS):
        print(done.stdout[-4000:], flush=True)
    return done.returncode


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
    slow = [file for file in files if "pytest.mark.slow" in (ROOT / file).read_text()]
    start = time.perf_counter()
    codes: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for jobs, markers, some in (
            (arguments.jobs, "gpu and not slow", files),
            (num_gpus, "gpu and slow", slow),
        ):
            with ThreadPoolExecutor(jobs) as pool:
                ended = [
                    pool.submit(run, file, markers, Path(folder) / f"{markers}-{i}.xml", i)
                    for i, file in enumerate(some)
                ]
            codes += [future.result() for future in ended]
        suites = [
            suite
            for report in sorted(Path(folder).iterdir())
            for suite in ElementTree.parse(report).getroot().iter("testsuite")
        ]
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    per_file: dict[str, int] = {}
    failed: list[str] = []
    for suite in suites:
        for case in suite.iter("testcase"):
            name = case.get("classname", "").rpartition(".")[2]
            per_file[name] = per_file.get(name, 0) + 1
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(f"{name}::{case.get('name')}")
    seconds = round(time.perf_counter() - start, 1)
    record = head("gpu_tests", arguments.commit) | {"num_gpus": num_gpus, "jobs": arguments.jobs}
    record |= counts | {"seconds": seconds, "per_file": per_file, "failed": failed}
    write(arguments.json, record)
    print(f"{counts} in {seconds} s; failed: {failed}")
    return int(any(code not in (0, NO_TESTS) for code in codes))


if __name__ == "__main__":
    sys.exit(main())
