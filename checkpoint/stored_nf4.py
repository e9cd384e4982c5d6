"""The weights that a checkpoint stores in NF4: found from headers, small tables and JSON.

Tables and JSON are a kilobyte or two a weight and read here; codes and scales are left to
`checkpoint/loading.py`, which reads them into the buffers that they stay in.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.number_formats import NF4_FORMAT, WAY_OUT
from checkpoint.shard_reader import StoredTensor, read_tensor
from llama.config import CONFIG_NAME
from llama.model import Llama
from nf4.serialized import FP4_STATE, STATE, WeightState, parse_state, stored_tables
from nf4.weight import Quantization

# what a weight's scales are called where bitsandbytes has quantized it to int8
_INT8_SCALES = ".SCB"
# what packed codes may be stored as: the bytes are the same
_STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class StoredNF4:
    """The weights of a checkpoint that are in NF4, by their names.

    Attributes:
        read: the names of the tables and the JSON that describe the weights, read already.
    """

    states: dict[str, WeightState]
    read: frozenset[str]

    @property
    def quantization(self) -> Quantization | None:
        """The one quantization of all these weights; None if there are none."""
        return next((state.quantization for state in self.states.values()), None)


def describe_quantization(quantization: Quantization | None) -> str:
    """Write a quantization as flags."""
    if quantization is None:
        return "--quant none"
    block_size, double_quant = quantization
    return f"--block-size {block_size} --{'' if double_quant else 'no-'}double-quant"


def read_stored_nf4(folder: Path, stored: dict[str, StoredTensor]) -> StoredNF4:
    """Find a checkpoint's weights in NF4, and check that their format is the one computed here.

    Raises:
        ValueError: a weight is in FP4 or int8, has no table or another one, or JSON that describes
            something else; or two weights differ in block size or double quantization.
    """
    for suffix, weight, kind in ((FP4_STATE, "", "fp4"), (_INT8_SCALES, ".weight", "int8")):
        if found := [name for name in stored if name.endswith(suffix)]:
            raise ValueError(
                f"{folder}: {found[0].removesuffix(suffix)}{weight} must be in NF4 or in 16 or 32 "
                f"bits: got bitsandbytes {kind}; {WAY_OUT}"
            )
    names = [name.removesuffix(STATE) for name in stored if name.endswith(STATE)]
    if not names:
        return StoredNF4({}, frozenset())
    states: dict[str, WeightState] = {}
    read: set[str] = set()

    def get(name: str) -> Tensor:
        if name not in stored:
            raise ValueError(
                f"{folder} must hold {name} for a weight in NF4: no file does; "
                "download the checkpoint again"
            )
        read.add(name)
        return read_tensor(stored[name])

    for name in names:
        states[name] = _read_state(folder, name, get)
    for name, state in states.items():
        if state.quantization != states[names[0]].quantization:
            raise ValueError(
                f"{folder}: all weights in NF4 must have one block size and one kind of scales: "
                f"{names[0]} has {describe_quantization(states[names[0]].quantization)}, "
                f"{name} {describe_quantization(state.quantization)}; {WAY_OUT}"
            )
    return StoredNF4(states, frozenset(read))


def _read_state(folder: Path, name: str, get: Callable[[str], Tensor]) -> WeightState:
    text = get(name + STATE).view(-1).view(torch.uint8).numpy().tobytes()
    state = parse_state(text, f"{folder}: {name}{STATE}")
    for suffix, expected in stored_tables(state.quantization[1]).items():
        table = get(name + suffix)
        if table.dtype != expected.dtype or not torch.equal(table, expected):
            raise ValueError(
                f"{folder}: {name}{suffix} must be bitsandbytes' table, value for value: it "
                f"differs; {WAY_OUT}"
            )
    return state


def check_stored_nf4(
    folder: Path,
    model: Llama,
    nf4: StoredNF4,
    said: str | None,  # the number format that config.json names
) -> None:
    """Check the weights in NF4 against config.json and the model's projections.

    Raises:
        ValueError: config.json names another number format; a weight is no projection's, or has
            another shape; or only some projections of a group are in NF4.
    """
    if nf4.states and said != NF4_FORMAT:
        raise ValueError(
            f"{folder / CONFIG_NAME} must have a quantization_config of {NF4_FORMAT}, as the "
            f"weights are in NF4: it has {said or 'none'}; download it again"
        )
    projections = {
        f"{prefix}{name}.weight": shape
        for prefix, group in model.frozen_groups()
        for name, shape in group.shapes().items()
        # of three dimensions none can be in bitsandbytes' format
        if len(shape) == 2
    }
    for name, state in nf4.states.items():
        if name not in projections:
            raise ValueError(
                f"{folder}: only projections may be in NF4: {name} is in NF4 too; keep it out "
                "with llm_int8_skip_modules when the checkpoint is quantized"
            )
        if state.shape != projections[name]:
            raise ValueError(
                f"{folder}: {name} must have shape {projections[name]} by config.json: "
                f"its quant_state says {state.shape}"
            )
    for prefix, group in model.frozen_groups():
        inside = [name for name in group.names if f"{prefix}{name}.weight" in nf4.states]
        outside = [name for name in group.names if f"{prefix}{name}.weight" not in nf4.states]
        if inside and outside:
            raise ValueError(
                f"{folder}: {', '.join(group.names)} of {prefix[:-1]} share a buffer and must all "
                f"be in NF4 or none: {', '.join(outside)} is not; {WAY_OUT}"
            )


def as_bytes(stored: StoredTensor) -> StoredTensor:
    """Describe packed codes as bytes, whatever dtype they are stored as: FSDP needs a float's.

    Raises:
        ValueError: bytes are not stored as this dtype.
    """
    if stored.dtype not in _STORAGES:
        raise ValueError(
            f"{stored.file}: the codes of {stored.name} must be stored as "
            f"{', '.join(map(str, _STORAGES))}: got {stored.dtype}; {WAY_OUT}"
        )
    return replace(stored, shape=(stored.num_bytes, 1), dtype=torch.uint8)
