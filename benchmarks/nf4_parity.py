"""Compare NF4 with double quantization on a GPU with bitsandbytes' CUDA kernels, byte by byte.

    python -m benchmarks nf4_parity --json benchmarks/results/nf4_parity.h100.json

Both quantize the same weights; what each stores is compared, what each expands that to, and what
our kernel makes of bitsandbytes' bytes. Its kernels are built with fast arithmetic: an approximate
reciprocal moves a float32 weight over a midpoint now and then, never a 16-bit one so far.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.record import head, write
from kernels.nf4_dequantize import nf4_dequantize
from nf4.double_quant import QuantizedAbsmax
from nf4.weight import NF4Weight, quantize

PEER = Path(__file__).with_name("nf4_parity_peer.py")
SHAPES = ((1, 63), (3, 65), (127, 129), (257, 513), (512, 1024), (1024, 1376), (4096, 4096))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 1024, 4096)
SCALES = (1.0, 0.02)
PARTS = ("packed", "absmax_codes", "group_absmax", "absmax_mean", "expanded", "expanded_from_peer")


def cases() -> Iterator[tuple[str, Tensor, int]]:
    """Weights on the CPU, with a name and a block size each."""
    options = itertools.product(enumerate(SHAPES), DTYPES, BLOCK_SIZES, SCALES)
    for (index, (rows, columns)), dtype, block_size, scale in options:
        generator = torch.Generator().manual_seed(1000 * index + block_size)
        weight = (torch.randn(rows, columns, generator=generator) * scale).to(dtype)
        name = f"{rows}x{columns}-{str(dtype).removeprefix('torch.')}-block{block_size}-{scale}"
        yield name, weight, block_size


def compare(weight: Tensor, block_size: int, peer: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """For every part, how many of its values differ, and of how many."""
    own = quantize(weight.cuda(), block_size, double_quant=True)
    assert isinstance(own.absmax, QuantizedAbsmax)
    theirs = QuantizedAbsmax(
        peer["absmax_codes"].cuda(), peer["group_absmax"].cuda(), peer["absmax_mean"].cuda()
    )
    stored = NF4Weight(peer["packed"].cuda(), theirs, own.rows, own.in_features, block_size)
    pairs = {
        "packed": (own.packed, peer["packed"]),
        "absmax_codes": (own.absmax.codes, peer["absmax_codes"]),
        "group_absmax": (own.absmax.group_absmax, peer["group_absmax"]),
        "absmax_mean": (own.absmax.mean, peer["absmax_mean"]),
        "expanded": (nf4_dequantize(own, weight.dtype).flatten(), peer["expanded"]),
        "expanded_from_peer": (nf4_dequantize(stored, weight.dtype).flatten(), peer["expanded"]),
    }
    return {
        part: (int((ours.cpu() != other).sum()), other.numel())
        for part, (ours, other) in pairs.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare NF4 with bitsandbytes' CUDA kernels.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of this checkout, where git cannot tell")
    arguments = parser.parse_args()
    totals = {
        str(dtype).removeprefix("torch."): {part: [0, 0] for part in PARTS} for dtype in DTYPES
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, weight, block_size in cases():
            file = folder / f"{case}.in"
            save_file({"weight": weight}, file, {"block_size": str(block_size)})
        # outside of the checkout: bitsandbytes probes for a package named `kernels`
        subprocess.run([sys.executable, str(PEER), str(folder)], cwd=folder, check=True)
        for case, weight, block_size in cases():
            found = compare(weight, block_size, load_file(folder / f"{case}.out"))
            counts = totals[str(weight.dtype).removeprefix("torch.")]
            for part, (differing, number) in found.items():
                counts[part][0] += differing
                counts[part][1] += number
    write(
        arguments.json,
        head("nf4_parity", arguments.commit)
        | {
            "bitsandbytes": version("bitsandbytes"),
            "cases": len(SHAPES) * len(DTYPES) * len(BLOCK_SIZES) * len(SCALES),
            "differing_of": totals,
        },
    )
    for dtype, counts in totals.items():
        for part, (differing, number) in counts.items():
            print(f"{dtype:9} {part:19} {differing:3} of {number:,} differ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
