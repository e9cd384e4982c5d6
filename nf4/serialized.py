"""An NF4 weight as bitsandbytes writes it into a checkpoint, under the names that it gives there.

    X.weight                                 uint8 (bytes, 1), the packed codes
    X.weight.absmax                          float32 (blocks,), or uint8 if double-quantized
    X.weight.nested_absmax                   float32 (groups,), if double-quantized
    X.weight.quant_map                       float32 (16,), LEVELS
    X.weight.nested_quant_map                float32 (256,), DYNAMIC_MAP, if double-quantized
    X.weight.quant_state.bitsandbytes__nf4   uint8 (characters,), JSON: all that is no tensor

The first three are a weight's own buffers, byte for byte, so reading them needs no memory but
theirs. Tables that differ from this repository's make a weight one of another format. The mean of
the scales is a number in the JSON.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foreign.json_text import parse_json
from nf4.blockwise import BLOCK_SIZES
from nf4.double_quant import DYNAMIC_MAP, GROUP_SIZE, QuantizedAbsmax
from nf4.levels import LEVELS
from nf4.weight import NF4Weight, Quantization

# what follows X.weight in a name
STATE = ".quant_state.bitsandbytes__nf4"
FP4_STATE = ".quant_state.bitsandbytes__fp4"

_DTYPES = ("float32", "float16", "bfloat16")
# of a number as Python writes it
_MOST_DIGITS = 24


@dataclass(frozen=True)
class WeightState:
    """What a checkpoint's JSON says of a weight."""

    shape: tuple[int, int]
    dtype: str  # of the weight before it was quantized: "bfloat16"
    block_size: int
    absmax_mean: float | None  # None: the scales are not quantized

    @property
    def quantization(self) -> Quantization:
        return Quantization(self.block_size, self.absmax_mean is not None)


def stored_buffers(weight: NF4Weight) -> dict[str, Tensor]:
    """View the buffers of a weight of one member as they are stored, by what follows X.weight in
    their names."""
    assert len(weight.rows) == 1
    packed = weight.packed.view(-1, 1)
    if isinstance(weight.absmax, QuantizedAbsmax):
        scales = weight.absmax
        return {"": packed, ".absmax": scales.codes, ".nested_absmax": scales.group_absmax}
    return {"": packed, ".absmax": weight.absmax}


def stored_tables(double_quant: bool) -> dict[str, Tensor]:
    """The tables that are stored with each weight, by what follows X.weight in their names."""
    tables = {".quant_map": LEVELS}
    return tables | {".nested_quant_map": DYNAMIC_MAP} if double_quant else tables


def serialize(weight: NF4Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """List what is stored of a weight of one member, by what follows X.weight in the names.

    Shapes and dtypes do not depend on the values: a weight on torch's meta device says them.

    Args:
        dtype: of the weight before it was quantized.

    Note:
        Synchronizes with the device, to write the mean of the scales.
    """
    scales, mean = weight.absmax, None
    if isinstance(scales, QuantizedAbsmax):
        mean = 0.0 if weight.device.type == "meta" else float(scales.mean)
    state = WeightState(weight.shape, str(dtype).removeprefix("torch."), weight.block_size, mean)
    text = torch.tensor(list(format_state(state)), dtype=torch.uint8)
    return stored_buffers(weight) | stored_tables(weight.is_double_quantized) | {STATE: text}


def restore_state(weight: NF4Weight, state: WeightState) -> None:
    """Set the mean of the scales, the one part of a weight that a checkpoint keeps in the JSON."""
    if isinstance(weight.absmax, QuantizedAbsmax):
        assert state.absmax_mean is not None
        weight.absmax.mean.fill_(state.absmax_mean)


def format_state(state: WeightState) -> bytes:
    """Write a state as JSON, as long for every mean: spaces follow it."""
    fields: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": state.block_size,
        "dtype": state.dtype,
        "shape": list(state.shape),
    }
    if state.absmax_mean is None:
        return json.dumps(fields).encode()
    fields |= {"nested_blocksize": GROUP_SIZE, "nested_dtype": "float32", "nested_offset": 0}
    length = len(json.dumps(fields)) + _MOST_DIGITS
    return json.dumps(fields | {"nested_offset": state.absmax_mean}).ljust(length).encode()


# for each field of the JSON: what it must be, in words and as a test
_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "quant_type": ("nf4", lambda value: value == "nf4"),
    "blocksize": (
        f"one of {BLOCK_SIZES}",
        lambda value: type(value) is int and value in BLOCK_SIZES,
    ),
    "dtype": (f"one of {', '.join(_DTYPES)}", lambda value: value in _DTYPES),
    "shape": (
        "two sizes",
        lambda value: (
            isinstance(value, list)
            and len(value) == 2
            and all(type(size) is int and size > 0 for size in value)
        ),
    ),
}
_NESTED_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "nested_blocksize": (f"{GROUP_SIZE}", lambda value: value == GROUP_SIZE),
    "nested_dtype": ("float32", lambda value: value == "float32"),
    "nested_offset": (
        "a finite number",
        lambda value: type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max,
    ),
}


def parse_state(text: bytes, name: str) -> WeightState:
    """Read a state from JSON.

    Args:
        name: what an error calls it: the tensor's name in the checkpoint.

    Raises:
        ValueError: the text is no JSON object, or a field is missing or has no value of NF4.
    """
    fields = parse_json(text, name, "download the checkpoint again")
    if not isinstance(fields, dict):
        raise ValueError(f"{name} must hold a JSON object: got a {type(fields).__name__}")
    is_nested = any(key.startswith("nested_") for key in fields)
    for key, (what, is_valid) in (_CHECKS | (_NESTED_CHECKS if is_nested else {})).items():
        if not is_valid(fields.get(key)):
            raise ValueError(f"{name}: {key} must be {what}: got {fields.get(key)!r}")
    mean = float(fields["nested_offset"]) if is_nested else None
    num_rows, in_features = fields["shape"]
    return WeightState((num_rows, in_features), fields["dtype"], fields["blocksize"], mean)
