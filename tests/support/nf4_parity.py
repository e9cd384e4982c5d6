"""The cases in which nf4 is compared with bitsandbytes, and models of where its backends differ.

One process of bitsandbytes serves all cases and all test files. Inputs come from numpy's generator,
whose stream is the same on every machine.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from support.peer_process import run_peer
from torch import Tensor

from nf4.blockwise import BLOCK_SIZES
from nf4.double_quant import DYNAMIC_MAP, GROUP_SIZE
from nf4.levels import MIDPOINTS

SHAPES = [
    *[(1, n) for n in (1, 3, 63, 65, 127, 4097)],
    *[(3, 1), (7, 5), (33, 100), (100, 33), (64, 64), (17, 257), (128, 192), (257, 129)],
    (2, 2048),
]
LARGE_SHAPES = [(513, 4099), (4096, 1376), (1, 64 * 4096 + 5)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (1.0, 0.02, 1e-4)

MAP_MIDPOINTS = (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / 2


@dataclass(frozen=True, eq=False)
class ParityCase:
    """A weight, a block size, and what bitsandbytes stores for it."""

    name: str
    block_size: int
    weight: Tensor
    theirs: dict[str, Tensor]

    def __str__(self) -> str:
        return f"{self.name} in blocks of {self.block_size}"

    @property
    def has_short_block(self) -> bool:
        return self.weight.numel() % self.block_size > 0


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def _weights() -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    for index, shape in enumerate(SHAPES):
        for scale in SCALES:
            for dtype in DTYPES:
                name = f"{shape[0]}x{shape[1]}-{scale}-{dtype}"
                yield name, (_normal(shape, index) * scale).to(dtype), BLOCK_SIZES
    for index, shape in enumerate(LARGE_SHAPES):
        for dtype in DTYPES:
            yield f"{shape[0]}x{shape[1]}-{dtype}", _normal(shape, 100 + index).to(dtype), (64,)
    for dtype in DTYPES:
        special = _special_weights()
        yield from ((f"{name}-{dtype}", w.to(dtype), BLOCK_SIZES) for name, w in special.items())
    yield "midpoints", midpoint_weight(), BLOCK_SIZES
    yield "short blocks that divide", dividing_tails(), (4096,)


def _special_weights() -> dict[str, Tensor]:
    zero_blocks = _normal((40, 4096), 200)
    zero_blocks[1::2] = 0
    zero_tail = _normal((1, 2 * 4096 + 17), 201)
    zero_tail[:, 2 * 4096 :] = 0
    outlier = _normal((9, 1111), 202)
    outlier[4, 44] = 1000
    return {
        "zeros": torch.zeros(16, 1024),
        "one zero": torch.zeros(1, 1),
        "zero blocks": zero_blocks,
        "zero tail": zero_tail,
        "one outlier": outlier,
        "constant": torch.full((32, 512), 0.75),
        "spread over magnitudes": _normal((64, 512), 203) * torch.logspace(-4, 2, 64)[:, None],
    }


def midpoint_weight() -> Tensor:  # (8, 4096) float32
    """Make blocks of all 15 midpoints and their neighbours, with a power of two as their scale.

    Alone here nearest-level rounding could differ: the quotient is the midpoint itself.
    """
    up, down = (torch.nextafter(MIDPOINTS, torch.tensor(end)) for end in (2.0, -2.0))
    values = torch.cat((torch.ones(1), MIDPOINTS[:15], up[:8], down[7:15]))  # (32,)
    exponents = torch.arange(1024) % 16 - 8
    return (values * torch.exp2(exponents.float())[:, None]).reshape(8, 4096)


def dividing_tails() -> Tensor:  # (1, 37) float32
    """A short block in which dividing by the scale and multiplying by its reciprocal differ.

    Found by search: weights next to a midpoint times a scale, where the two quotients lie on
    different sides of the midpoint.
    """
    rng = np.random.default_rng(300)
    for _ in range(100):
        scale = torch.from_numpy(rng.uniform(0.5, 2, 1).astype(np.float32))
        near = torch.cat((MIDPOINTS * scale, torch.nextafter(MIDPOINTS * scale, scale * 2)))
        differs = torch.bucketize(near / scale, MIDPOINTS) != torch.bucketize(
            near * scale.reciprocal(), MIDPOINTS
        )
        if differs.sum() >= 3:
            return torch.cat((scale, near, torch.zeros(6))).view(1, 37)
    raise AssertionError("no scale was found for which dividing differs")


def exact_scales() -> Tensor:  # (64, 4096) float32
    """Scales whose mean and distance from it are exact in float32, in whatever order one adds.

    Multiples of 2^-11 below 1, in pairs about the mean of 1/2: 4,096 of them add up to 2^22 units.
    """
    distance = np.random.default_rng(400).integers(-1023, 1024, (64, 2048))
    pairs = np.concatenate((1024 + distance, 1024 - distance), axis=1)
    return torch.from_numpy(pairs.astype(np.float32)) / 2048


@cache
def _results() -> tuple[list[ParityCase], dict[str, Tensor]]:
    if find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes, the peer that the format is compared with")
    weights = list(_weights())
    inputs = {f"weight/{name}": weight for name, weight, _ in weights}
    scales = exact_scales()
    centred = scales - scales.mean(dim=1, keepdim=True)
    inputs |= {f"scales/{index}": row.clone() for index, row in enumerate(centred)}
    block_sizes = json.dumps({name: sizes for name, _, sizes in weights})
    script = Path(__file__).with_name("bitsandbytes_peer.py")
    with tempfile.TemporaryDirectory() as folder:
        results = run_peer(script, Path(folder), inputs, {"block_sizes": block_sizes})
    cases = []
    for name, weight, sizes in weights:
        for block_size in sizes:
            prefix = f"{name}/{block_size}/"
            theirs = {
                key.removeprefix(prefix): value
                for key, value in results.items()
                if key.startswith(prefix)
            }
            cases.append(ParityCase(name, block_size, weight, theirs))
    return cases, results


def parity_cases() -> list[ParityCase]:
    """All cases with bitsandbytes' answers; the first call runs it, or skips the test."""
    return _results()[0]


def peer_result(key: str) -> Tensor:
    """One tensor that bitsandbytes wrote: "levels", "dynamic_map" or "scales/N"."""
    return _results()[1][key]


def unpack(packed: Tensor, num_elements: int) -> Tensor:  # (num_elements,) uint8
    """Take packed codes apart, the high nibble first."""
    return torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:num_elements]


def cpu_blockwise(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Model the codes and scales of bitsandbytes' CPU backend: its short last block divides."""
    flat = weight.flatten().float()
    codes, absmax = [], []
    for start in range(0, flat.numel(), block_size):
        block = flat[start : start + block_size]
        scale = block.abs().max()
        if block.numel() == block_size:
            scaled = block * scale.clamp(min=1e-38).reciprocal()
        else:
            scale = scale.clamp(min=1e-38)
            scaled = block / scale
        codes.append(torch.bucketize(scaled, MIDPOINTS).to(torch.uint8))
        absmax.append(scale)
    return torch.cat(codes), torch.stack(absmax)


def centred_scales(absmax: Tensor, mean: Tensor, group_absmax: Tensor) -> Tensor:
    """Divide the centred scales of a tensor by their groups', as every backend does: (n,)."""
    reciprocal = group_absmax.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
    return (absmax - mean) * reciprocal.repeat_interleave(GROUP_SIZE)[: absmax.numel()]


def cuda_codes(
    values: Tensor,  # in [-1, 1] float32
    levels: Tensor = DYNAMIC_MAP,
) -> Tensor:
    """Model the search of bitsandbytes' CUDA kernels for an 8-bit code.

    Seven halvings from index 127 end on an even index; then the neighbour on the value's side is
    taken if the value lies beyond the midpoint between the two.
    """
    pivot = torch.full(values.shape, 127)
    lower, upper = torch.zeros_like(pivot), torch.full_like(pivot, 255)
    for step in (64, 32, 16, 8, 4, 2, 1):
        above = values > levels[pivot]
        lower, upper = torch.where(above, pivot, lower), torch.where(above, upper, pivot)
        pivot = torch.where(above, pivot + step, pivot - step)
    above = values > levels[pivot]
    neighbour = torch.where(above, upper, lower)
    midpoint = (levels[pivot] + levels[neighbour]) * 0.5
    beyond = torch.where(above, values > midpoint, values < midpoint)
    return torch.where(beyond, neighbour, pivot).to(torch.uint8)


def cpu_codes(
    values: Tensor,  # in [-1, 1] float32
    midpoints: Tensor = MAP_MIDPOINTS,
) -> Tensor:
    """Model the table of bitsandbytes' CPU backend for an 8-bit code.

    The value is rounded to one of 65,536 bins; the bin's code is that of its centre.
    """
    bins = ((values.clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5).to(torch.int32)
    centres = (torch.arange(65536, dtype=torch.float64) * (2 / 65535) - 1).float()
    return torch.bucketize(centres, midpoints).to(torch.uint8)[bins]
