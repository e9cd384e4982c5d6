"""What the kernels compute in Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file
from torch import Tensor


def interpreted_results() -> dict[str, Tensor]:
    """What the kernels compute, by case; the first call runs `interpreted_kernels.py`."""
    results, errors = _run()
    assert results, errors
    return results


@cache
def _run() -> tuple[dict[str, Tensor], str]:
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
        return {} if done.returncode else load_file(output), done.stderr
