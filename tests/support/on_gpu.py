"""Runs a script of the tests in a process of its own, with the allocator that a run has."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT


def measure(script: str, *arguments: str) -> list[Any]:
    """Run a script of this folder, and read the lines of JSON that it prints."""
    folders = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))
    settings = {
        "PYTHONPATH": os.pathsep.join(folders),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("[", "{"))]
    assert lines, done.stdout[-2000:]
    return [json.loads(line) for line in lines]
