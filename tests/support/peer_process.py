"""Runs another library in a process of its own, outside of the checkout.

Hugging Face publishes a package named `kernels`, which transformers and bitsandbytes probe for;
with the checkout on the path they would find ours. Tensors travel through safetensors files.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.hosts import host
from torch import Tensor


def run_peer(
    script: Path,
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Run a script that turns in.safetensors into out.safetensors, both in its working directory.

    The process is isolated (`python -I`: neither the script's folder nor PYTHONPATH is searched),
    has as many threads as this one, so that sums add up in the same order, compiles nothing, and
    asks no hub. A GPU is hidden: close logits in bfloat16 may choose another token there.
    """
    save_file(dict(tensors), folder / "in.safetensors", dict(metadata or {}))
    peers = host(
        ("-I",),
        OMP_NUM_THREADS=str(torch.get_num_threads()),
        TORCHDYNAMO_DISABLE="1",
        HF_HUB_OFFLINE="1",
        CUDA_VISIBLE_DEVICES="",
    )
    code, said = peers.run(script, (), folder)
    assert code == 0, f"{script.name} failed:\n{said}"
    return load_file(folder / "out.safetensors")
