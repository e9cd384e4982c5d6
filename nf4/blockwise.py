"""Blockwise NF4: every `block_size` consecutive weights share one float32 scale, their absmax.

Blocks run over the flattened row-major tensor, so they may straddle rows; the last one may be
short. Two codes share a byte: the element with the even index lies in the high nibble, and a
missing last element counts as zero. This is the only place that explains the packing order.

The arithmetic is that of bitsandbytes 0.50, in float32 whatever the input's dtype: multiply by the
reciprocal of the scale, count the midpoints strictly below. Where bitsandbytes' backends differ:

- a block of zeros has code 7 (which is 0.0) and scale 0, also when it is short; bitsandbytes' CPU
  backend stores 1e-38 for a short one, its CUDA kernel writes code 0
- a short last block multiplies by the reciprocal like any other, as the CUDA kernel does; the CPU
  backend divides there
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nf4.levels import LEVELS, MIDPOINTS

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# bitsandbytes' floor under a scale before its reciprocal is taken: keeps 1 / scale finite
SMALLEST_SCALE = 1e-38

# elements worked on at once, a multiple of every block size: bounds a float32 temporary to 64 MiB
_SLICE = 1 << 24

# both levels of a byte in one look-up
_LEVELS_OF_BYTE = torch.stack((LEVELS.repeat_interleave(16), LEVELS.repeat(16)), dim=1)  # (256, 2)


def check_block_size(block_size: int) -> None:
    """Refuse a block size that the format does not have.

    Raises:
        ValueError: the block size is not one of BLOCK_SIZES.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}: got {block_size}")


def check_quantizable(weight: Tensor, name: str) -> None:
    """Refuse a tensor that NF4 cannot hold.

    Raises:
        ValueError: the tensor is empty or not floating point.
    """
    if weight.numel() == 0 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name} must be a non-empty float32, float16 or bfloat16 tensor to be quantized: "
            f"got {weight.dtype} with shape {tuple(weight.shape)}"
        )


def quantize_blockwise(
    weight: Tensor,  # any shape; float32, float16 or bfloat16
    block_size: int,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:  # packed (ceil(n / 2),) uint8, absmax (ceil(n / block_size),) float32
    """Encode a tensor as packed 4-bit codes and one scale per block.

        absmax[j] = max |w[i]|  over the block's i
        code[i]   = #{k : w[i] * (1 / absmax[j]) > MIDPOINTS[k]}

    QLoRA section 3, "Block-wise k-bit Quantization" and "4-bit NormalFloat Quantization". A
    non-finite weight gives its block a non-finite scale, which the caller refuses.

    Args:
        name: what an error calls the tensor.

    Raises:
        ValueError: the block size is not one of BLOCK_SIZES, or the tensor is empty or not
            floating point.
    """
    check_block_size(block_size)
    check_quantizable(weight, name)
    flat = weight.reshape(-1)
    num_elements = flat.numel()
    packed = torch.empty((num_elements + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-num_elements // block_size), dtype=torch.float32, device=flat.device)
    midpoints = MIDPOINTS.to(flat.device)
    for start in range(0, num_elements, _SLICE):
        piece = flat[start : start + _SLICE].float()
        num_bytes = (piece.numel() + 1) // 2
        blocks = F.pad(piece, (0, -piece.numel() % block_size)).view(-1, block_size)
        scale = blocks.abs().amax(dim=1)
        scaled = blocks * scale.clamp(min=SMALLEST_SCALE).reciprocal()[:, None]
        codes = torch.bucketize(scaled, midpoints, out_int32=True).view(-1, 2).to(torch.uint8)
        packed[start // 2 : start // 2 + num_bytes] = (codes[:, 0] << 4 | codes[:, 1])[:num_bytes]
        first_block = start // block_size
        absmax[first_block : first_block + scale.numel()] = scale
    return packed, absmax


def dequantize_blockwise(
    packed: Tensor,  # (ceil(n / 2),) uint8
    absmax: Tensor,  # (ceil(n / block_size),) float32
    block_size: int,
    num_elements: int,
    dtype: torch.dtype,
) -> Tensor:  # (n,) dtype
    """Expand packed 4-bit codes to floats.

        w[i] = LEVELS[code[i]] * absmax[i // block_size]

    One float32 product, rounded once to `dtype`.

    Raises:
        ValueError: the block size is not one of BLOCK_SIZES, or `packed` or `absmax` does not
            belong to `num_elements` weights.
    """
    check_block_size(block_size)
    num_bytes, num_blocks = (num_elements + 1) // 2, -(-num_elements // block_size)
    if (packed.numel(), absmax.numel()) != (num_bytes, num_blocks):
        raise ValueError(
            f"{num_elements} weights in blocks of {block_size} need {num_bytes} bytes and "
            f"{num_blocks} scales: got {packed.numel()} and {absmax.numel()}"
        )
    levels_of_byte = _LEVELS_OF_BYTE.to(packed.device)
    weight = torch.empty(num_elements, dtype=dtype, device=packed.device)
    for start in range(0, num_elements, _SLICE):
        end = min(start + _SLICE, num_elements)
        piece = packed[start // 2 : (end + 1) // 2]
        scale = absmax[start // block_size : -(-end // block_size)]
        values = levels_of_byte.index_select(0, piece.int()).view(-1)
        blocks = F.pad(values, (0, -values.numel() % block_size)).view(-1, block_size)
        weight[start:end] = blocks.mul_(scale[:, None]).view(-1)[: end - start]
    return weight
