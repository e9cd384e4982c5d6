"""The weights that a checkpoint stores in MXFP4: found from its names, and read in their order.

    model.layers.0.mlp.experts.gate_up_proj_blocks     codes, as `nf4/mxfp4.py` has them
    model.layers.0.mlp.experts.gate_up_proj_scales

gpt-oss is published so: experts alone are in 4 bits. They are expanded while they load, one expert
at a time, and quantized to NF4 as weights in 16 bits are.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from checkpoint.number_formats import MXFP4_FORMAT
from checkpoint.shard_reader import StoredTensor
from llama.config import CONFIG_NAME
from llama.model import Llama
from nf4.mxfp4 import BLOCKS, SCALES


def can_be_mxfp4(model: Llama) -> list[str]:
    """List the weights of a model that its checkpoints may have in MXFP4."""
    return [
        f"{prefix}{name}.weight"
        for prefix, group in model.frozen_groups()
        for name in group.names
        if group.layout.is_transposed
    ]


def find_mxfp4(
    folder: Path,
    model: Llama,
    names: Iterable[str],  # of the stored tensors
    said: str | None,  # the number format that config.json names
) -> frozenset[str]:
    """Find the tensors that stand for weights in MXFP4.

    Raises:
        ValueError: config.json names another number format.
    """
    possible = {weight + suffix for weight in can_be_mxfp4(model) for suffix in (BLOCKS, SCALES)}
    found = possible.intersection(names)
    if found and said != MXFP4_FORMAT:
        raise ValueError(
            f"{folder / CONFIG_NAME} must have a quantization_config of {MXFP4_FORMAT}, as the "
            f"weights of experts are in MXFP4: it has {said or 'none'}; download it again"
        )
    return frozenset(found)


def scales_first(tensors: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
    """Put the scales of each weight in MXFP4 right before its blocks, which are expanded by them;
    the other tensors keep their order."""
    tensors = list(tensors)
    scales = {tensor.name: tensor for tensor in tensors if tensor.name.endswith(SCALES)}
    for tensor in tensors:
        weight = tensor.name.removesuffix(BLOCKS)
        if weight != tensor.name:
            yield scales[weight + SCALES]
        if tensor.name not in scales:
            yield tensor
