"""What the NF4 kernels compute in Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file
from torch import Tensor


@cache
def interpreted_results() -> dict[str, Tensor]:
    """Run `interpreted_kernels.py` once for all test files: what the launchers return, by case."""
    script = Path(__file__).with_name("interpreted_kernels.py")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out.safetensors")
        done = subprocess.run(
            [sys.executable, str(script), str(output)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{script.name} failed:\n{done.stderr}"
        return load_file(output)
