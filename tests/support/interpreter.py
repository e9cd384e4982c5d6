"""What kernels compute in Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file
from torch import Tensor


def interpreted_results(kernel: str, script: str = "interpreted_kernels.py") -> dict[str, Tensor]:
    """What the launchers of a file in kernels/ return, by case; the first call runs the script."""
    results, errors = _run(kernel, script)
    assert results, errors
    return results


@cache
def _run(kernel: str, script: str) -> tuple[dict[str, Tensor], str]:
    folders = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(folders),
    }
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out.safetensors")
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), str(output), kernel],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return {} if done.returncode else load_file(output), done.stderr
