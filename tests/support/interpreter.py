"""What kernels compute in Triton's interpreter, which needs no GPU."""

import os
import tempfile
from functools import cache
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file
from support.hosts import host
from torch import Tensor


def interpreted_results(kernel: str, script: str = "interpreted_kernels.py") -> dict[str, Tensor]:
    """What the launchers of a file in kernels/ return, by case; the first call runs the script."""
    results, errors = _run(kernel, script)
    assert results, errors
    return results


@cache
def _run(kernel: str, script: str) -> tuple[dict[str, Tensor], str]:
    folders = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))
    interpreting = host((), TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join(folders))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out.safetensors")
        path = Path(__file__).with_name(script)
        code, said = interpreting.run(path, (str(output), kernel), ROOT)
        return {} if code else load_file(output), said
