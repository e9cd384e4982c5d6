"""The checkpoint that config.json alone describes: names, shapes and dtypes, and no weights.

A plan needs no more. It reads what a complete folder would say: the tensors of the model that
config.json describes, in its `dtype`, or in NF4 where it has such a `quantization_config`.
Only the files can tell of tensors that a repository keeps in other dtypes than it says.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoint.files import INDEX_NAME, SINGLE_NAME
from checkpoint.number_formats import MXFP4_FORMAT, NF4_FORMAT, WAY_OUT, number_format
from checkpoint.opening import Checkpoint
from checkpoint.shard_reader import FLOATS, StoredTensor
from checkpoint.slots import META, slots_of
from checkpoint.stored_mxfp4 import can_be_mxfp4
from checkpoint.stored_nf4 import StoredNF4, check_stored_nf4
from checkpoint.tensor_names import TensorNames
from foreign.reading import Reading
from llama.config import CONFIG_NAME, check_config, read_config_json
from llama.model import Llama
from nf4.mxfp4 import BLOCKS, SCALES
from nf4.serialized import WeightState

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}


def has_weights(folder: Path) -> bool:
    """Tell whether a folder has files of weights, be they complete or not."""
    return any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


def implied_checkpoint(folder: Path, block_size: int) -> Checkpoint:
    """Read and check a config.json, and lay out the checkpoint that it is of.

    Args:
        block_size: of weights that are stored in NF4, which config.json does not tell.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: config.json describes another model or number format than can be loaded.
    """
    fields = read_config_json(folder)
    config = check_config(fields)
    with META:
        model = Llama(config, torch.float32)
    with Reading(fields.path):
        dtype = _stated_dtype(folder, fields.values)
        states = _states(folder, fields.values, model, dtype, block_size)
    nf4, said = StoredNF4(states, frozenset()), number_format(fields.values)
    check_stored_nf4(folder, model, nf4, said)
    in_mxfp4 = can_be_mxfp4(model) if said == MXFP4_FORMAT else []
    mxfp4 = frozenset(name + suffix for name in in_mxfp4 for suffix in (BLOCKS, SCALES))
    stored = {}
    for name, slot in slots_of(model, mxfp4, nf4.states).items():
        # codes and scales can be stored in one dtype alone
        kept = dtype if dtype in slot.dtypes else slot.dtypes[0]
        num_bytes = math.prod(slot.shape) * kept.itemsize
        stored[name] = StoredTensor(name, fields.path, slot.shape, kept, 0, num_bytes)
    return Checkpoint(
        folder, config, fields.values, (), stored, nf4, frozenset(), TensorNames(), mxfp4
    )


def _stated_dtype(folder: Path, values: Mapping[str, Any]) -> torch.dtype:
    """Read the dtype of the weights; where none is given, transformers writes float32."""
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ValueError(
            f"{folder / CONFIG_NAME}: dtype must be one of {', '.join(_DTYPES)}: got {name!r}"
        )
    return dtype


def _states(
    folder: Path, values: Mapping[str, Any], model: Llama, dtype: torch.dtype, block_size: int
) -> dict[str, WeightState]:
    """Describe the weights that are stored in NF4, as the JSON in their files would."""
    said = number_format(values)
    if said == MXFP4_FORMAT and can_be_mxfp4(model):
        return {}
    if said not in (None, NF4_FORMAT):
        raise ValueError(
            f"{folder / CONFIG_NAME}: weights must be in 16 or 32 bits, or in {NF4_FORMAT}: "
            f"quantization_config says {said}; {WAY_OUT}"
        )
    if said is None:
        return {}
    described = values["quantization_config"]
    skipped = described.get("llm_int8_skip_modules") or []
    mean = 0.0 if described.get("bnb_4bit_use_double_quant") else None
    name = str(dtype).removeprefix("torch.")
    return {
        f"{prefix}{member}.weight": WeightState((shape[0], shape[1]), name, block_size, mean)
        for prefix, group in model.frozen_groups()
        for member, shape in group.shapes().items()
        # transformers skips a module by its path, by a path that it lies under, or by its name
        if len(shape) == 2 and not any(f".{module}." in f".{prefix}{member}." for module in skipped)
    }
