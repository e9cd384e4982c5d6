"""Runs another library in a process of its own, outside of the checkout.

Hugging Face publishes a package named `kernels`, which transformers and bitsandbytes probe for;
with the checkout on the path they would find ours. Tensors travel through safetensors files.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def run_peer(
    script: Path,
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Run a script that turns in.safetensors into out.safetensors, both in its working directory.

    The process is isolated (`python -I`: neither the script's folder nor PYTHONPATH is searched),
    has as many threads as this one, so that sums add up in the same order, and compiles nothing.
    """
    save_file(dict(tensors), folder / "in.safetensors", dict(metadata or {}))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "TORCHDYNAMO_DISABLE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-I", str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script.name} failed:\n{done.stderr}"
    return load_file(folder / "out.safetensors")
