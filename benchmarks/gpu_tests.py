"""Run the tests that need a GPU and record what they said: how many, of which file, how long.

    python -m benchmarks.gpu_tests --json benchmarks/results/gpu_tests.h100.json

A failing test makes the command fail, and is recorded too.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.record import ROOT, head, write


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the GPU tests and record what they said.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    per_file: dict[str, int] = {}
    for suite in suites:
        for case in suite.iter("testcase"):
            name = case.get("classname", "").rpartition(".")[2]
            per_file[name] = per_file.get(name, 0) + 1
    seconds = sum(float(suite.get("time", 0)) for suite in suites)
    record = head("gpu_tests", arguments.commit)
    write(arguments.json, record | counts | {"seconds": round(seconds, 1), "per_file": per_file})
    return code


if __name__ == "__main__":
    sys.exit(main())
