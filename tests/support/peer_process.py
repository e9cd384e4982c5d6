"""Runs another library in a process of its own, outside of the checkout.

Hugging Face publishes a package named `kernels`, which transformers and bitsandbytes probe for;
with the checkout on the path they would find ours. Tensors travel through safetensors files.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def run_peer(
    script: Path,
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    between: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Run a script that turns in.safetensors into out.safetensors, both in its working directory.

    The process is isolated (`python -I`: neither the script's folder nor PYTHONPATH is searched),
    has as many threads as this one, so that sums add up in the same order, and compiles nothing.

    Args:
        between: is called when the script has printed a line, and waits for one.
    """
    save_file(dict(tensors), folder / "in.safetensors", dict(metadata or {}))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "TORCHDYNAMO_DISABLE": "1",
    }
    with (folder / "stderr.txt").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-I", str(script)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        assert process.stdout
        if between and process.stdout.readline():
            between()
        process.communicate("go on\n" if between else None)
        said.seek(0)
        assert process.returncode == 0, f"{script.name} failed:\n{said.read()}"
    return load_file(folder / "out.safetensors")
