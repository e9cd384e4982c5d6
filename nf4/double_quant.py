"""Double quantization: the scales of the blocks are quantized too, to 8 bits in groups of 256.

QLoRA section 3, "Double Quantization", brings the cost of a scale from 32 / 64 = 0.5 bits per
weight to 8 / 64 + 32 / (64 * 256) = 0.127. The paper says "8-bit float"; its implementation and
this file take a dynamic map of 256 values, denser towards zero (`nf4/README.md` works the
arithmetic out). Scales are positive: removing their mean first spends the map's sign bit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_SIZE = 256


def _linspace_to_one(num_cells: int) -> Tensor:  # (num_cells + 1,) float32
    """Space float32 numbers from 0.1 to 1 as torch.linspace does on a CPU with AVX2.

        edge[i] = fma(i, step, 0.1)  in the lower half,  fma(i - num_cells, step, 1)  in the upper

    The product and sum of these few bits are exact in float64, so rounding once is the fused
    multiply-add. torch.linspace itself rounds twice where the CPU has no AVX2, and a format must
    not depend on that.
    """
    start = torch.tensor(0.1, dtype=torch.float32)
    step = ((1 - start) / num_cells).double()
    index = torch.arange(num_cells + 1, dtype=torch.float64)
    upwards = start.double() + index * step
    downwards = 1 + (index - num_cells) * step
    return torch.where(index < (num_cells + 1) // 2, upwards, downwards).float()


def _dynamic_map(is_signed: bool) -> Tensor:  # (256,) float32, ascending
    """Compute an 8-bit dynamic map.

    Decade d in 0..6 splits [0.1, 1] * 10^(d - 6) into equal cells and takes their centres: 2^d
    cells for either sign, or twice as many where there is none. Zero and one complete the 256
    values. In float32, as published: float64 differs in the last bit of 72 signed entries.
    """
    positive = []
    for decade in range(7):
        edges = _linspace_to_one(2**decade if is_signed else 2 ** (decade + 1))
        positive.append((edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6))
    magnitudes = torch.cat(positive)
    negative = -magnitudes if is_signed else torch.empty(0)
    return torch.cat((negative, torch.tensor([0.0, 1.0]), magnitudes)).sort().values


def _midpoints(levels: Tensor) -> Tensor:
    return (levels[1:] + levels[:-1]) / 2


DYNAMIC_MAP = _dynamic_map(is_signed=True)
DYNAMIC_MAP_MIDPOINTS = _midpoints(DYNAMIC_MAP)
# for values that are never negative: an optimizer's second moment (kernels/adamw_8bit.py)
UNSIGNED_DYNAMIC_MAP = _dynamic_map(is_signed=False)
UNSIGNED_DYNAMIC_MAP_MIDPOINTS = _midpoints(UNSIGNED_DYNAMIC_MAP)


@dataclass(frozen=True, eq=False)
class QuantizedAbsmax:
    """The scales of a tensor's blocks after double quantization."""

    codes: Tensor  # (num_blocks,) uint8, indices into DYNAMIC_MAP
    group_absmax: Tensor  # (ceil(num_blocks / GROUP_SIZE),) float32
    mean: Tensor  # (1,) float32, removed before and added after; one per member when stacked


def nearest_codes(
    scaled: Tensor,  # float32, of any shape
    midpoints: Tensor,  # (255,) float32, of an 8-bit map
) -> Tensor:  # int32, of the same shape
    """Find the index of the nearest level; on a midpoint, the even one of the two."""
    # the midpoint between an odd index and the next belongs to the next, which a strict comparison
    # with the number just below it says
    below = torch.nextafter(midpoints, torch.tensor(-torch.inf))
    lower_is_odd = torch.arange(midpoints.numel()) % 2 == 1
    thresholds = torch.where(lower_is_odd, below, midpoints)
    return torch.bucketize(scaled, thresholds.to(scaled.device), out_int32=True)


def quantize_absmax(absmax: Tensor) -> QuantizedAbsmax:  # absmax (num_blocks,) float32
    """Quantize the scales of a tensor's blocks to 8 bits in groups of 256.

        d[j]            = absmax[j] - mean(absmax)
        group_absmax[g] = max |d[j]|  over the group's j
        codes[j]        = the index in DYNAMIC_MAP nearest to d[j] * (1 / group_absmax[g])

    A tie goes to the even index, as the search of bitsandbytes' CUDA kernel does; its CPU backend
    looks a rounded value up in a table of 65,536 instead and differs in about 0.2 % of the codes.
    A group whose scales all equal the mean has code 0 and group_absmax 0, as in bitsandbytes.
    """
    mean = absmax.mean().view(1)
    num_blocks = absmax.numel()
    groups = F.pad(absmax - mean, (0, -num_blocks % GROUP_SIZE)).view(-1, GROUP_SIZE)
    group_absmax = groups.abs().amax(dim=1)
    scaled = groups * group_absmax.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()[:, None]
    codes = nearest_codes(scaled, DYNAMIC_MAP_MIDPOINTS)
    codes.masked_fill_(group_absmax[:, None] == 0, 0)
    return QuantizedAbsmax(codes.view(-1)[:num_blocks].to(torch.uint8), group_absmax, mean)


def dequantize_absmax(absmax: QuantizedAbsmax) -> Tensor:  # (num_blocks,) float32
    """Recover the scales of a tensor's blocks.

        absmax[j] = DYNAMIC_MAP[codes[j]] * group_absmax[j // GROUP_SIZE] + mean

    A product and a sum, each rounded: a fused multiply-add would differ in the last bit.
    """
    num_blocks = absmax.codes.numel()
    values = DYNAMIC_MAP.to(absmax.codes.device)[absmax.codes.int()]
    groups = F.pad(values, (0, -num_blocks % GROUP_SIZE)).view(-1, GROUP_SIZE)
    return (groups * absmax.group_absmax[:, None]).view(-1)[:num_blocks] + absmax.mean
