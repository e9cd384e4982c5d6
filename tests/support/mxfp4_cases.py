"""A tiny gpt-oss checkpoint with experts in MXFP4, as the family is published."""

from pathlib import Path
from typing import Any

import torch
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint
from torch import Tensor

# the name of the checkpoint among those that peers compute
MXFP4 = "gpt-oss in mxfp4"
MXFP4_FIELDS: dict[str, Any] = VARIANTS["gpt-oss"] | {
    # whole blocks
    "intermediate_size": 64,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
}
PROJECTIONS = ("gate_up_proj", "down_proj")


def mxfp4_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Draw the tensors: of experts' matrices any codes, at scales that keep activations of order
    one."""
    generator = torch.Generator().manual_seed(5)
    tensors = random_tensors(FIELDS | MXFP4_FIELDS, dtype)
    for name in [name for name in tensors if name.endswith(PROJECTIONS)]:
        count, columns, rows = tensors.pop(name).shape
        shape = (count, rows, columns // 32)
        drawn = torch.randint(256, (*shape, 16), generator=generator)
        tensors[f"{name}_blocks"] = drawn.to(torch.uint8)
        drawn = torch.randint(122, 125, shape, generator=generator)
        tensors[f"{name}_scales"] = drawn.to(torch.uint8)
    return tensors


def write_mxfp4(folder: Path, num_shards: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    return write_checkpoint(folder, FIELDS | MXFP4_FIELDS, mxfp4_tensors(dtype), num_shards)


def all_codes_at_all_scales() -> tuple[Tensor, Tensor]:
    """Blocks of an expert for each scale but NaN, with all bytes in it: (255, 1, 16, 16), and
    scales."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(255, -1, -1, -1)
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1, 1).expand(-1, -1, 16)
    return codes.contiguous(), scales.contiguous()
