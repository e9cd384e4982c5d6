"""What a checkpoint holds in NF4 already: found from the headers, the small tables and the JSON.

Tables and JSON are a kilobyte or two a weight and read here; codes and scales are left to
`checkpoint/loading.py`, which reads them into the buffers that they stay in.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.shard_reader import FLOATS, StoredTensor, read_tensor
from llama.config import CONFIG_NAME, number_format
from llama.model import Llama
from nf4.serialized import FP4_STATE, STATE, WeightState, parse_state, stored_tables
from nf4.weight import Quantization

_WAY_OUT = "use the original checkpoint, which is quantized to NF4 while it loads"
# what a weight's scales are called where bitsandbytes has quantized it to int8
_INT8_SCALES = ".SCB"
_NF4 = "bitsandbytes nf4"
# how the names of tensors end that other formats store beside or in place of a weight; of two that
# fit, the first
_OTHER_FORMATS = {
    ".g_idx": "GPTQ",
    ".qweight": "AWQ or GPTQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".weight.absmax": "bitsandbytes in 4 bits, without its quant_state",
}
# what packed codes may be stored as: the bytes are the same
_STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class StoredNF4:
    """The weights of a checkpoint that are in NF4, by their names.

    Attributes:
        read: the names of the tensors that say so, which nothing else needs.
    """

    states: dict[str, WeightState]
    read: frozenset[str]

    @property
    def quantization(self) -> Quantization | None:
        """Of all of them; None if there are none."""
        return next((state.quantization for state in self.states.values()), None)


def describe_quantization(quantization: Quantization | None) -> str:
    """Say it in flags."""
    if quantization is None:
        return "--quant none"
    block_size, double_quant = quantization
    return f"--block-size {block_size} --{'' if double_quant else 'no-'}double-quant"


def read_stored_nf4(folder: Path, stored: dict[str, StoredTensor]) -> StoredNF4:
    """Read which of a checkpoint's weights are in NF4, and hold them against the format here.

    Raises:
        ValueError: a weight is in FP4 or int8, has no table or another one, or JSON that describes
            something else; or two weights differ in block size or double quantization.
    """
    for suffix, weight, kind in ((FP4_STATE, "", "fp4"), (_INT8_SCALES, ".weight", "int8")):
        if found := [name for name in stored if name.endswith(suffix)]:
            raise ValueError(
                f"{folder}: {found[0].removesuffix(suffix)}{weight} must be in NF4 or in 16 or 32 "
                f"bits: got bitsandbytes {kind}; {_WAY_OUT}"
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
                f"{name} {describe_quantization(state.quantization)}; {_WAY_OUT}"
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
                f"differs; {_WAY_OUT}"
            )
    return state


def check_stored_nf4(folder: Path, model: Llama, nf4: StoredNF4) -> None:
    """Hold what is in NF4 against config.json and what the model can hold.

    Raises:
        ValueError: quantization_config does not say so; one is no projection's, or has another
            shape; or projections of one group differ.
    """
    if nf4.states and (said := number_format(folder)) != _NF4:
        raise ValueError(
            f"{folder / CONFIG_NAME} must have a quantization_config of {_NF4} where weights are "
            f"stored so: it has {said or 'none'}; download it again"
        )
    projections = {
        f"{prefix}{name}.weight": (rows, group.in_features)
        for prefix, group in model.groups()
        for name, rows in zip(group.names, group.rows, strict=True)
    }
    for name, state in nf4.states.items():
        if name not in projections:
            raise ValueError(
                f"{folder}: of all weights projections alone may be in NF4: {name} is; keep it out "
                "with llm_int8_skip_modules when the checkpoint is quantized"
            )
        if state.shape != projections[name]:
            raise ValueError(
                f"{folder}: {name} must have shape {projections[name]} by config.json: "
                f"its quant_state says {state.shape}"
            )
    for prefix, group in model.groups():
        inside = [name for name in group.names if f"{prefix}{name}.weight" in nf4.states]
        outside = [name for name in group.names if name not in inside]
        if inside and outside:
            raise ValueError(
                f"{folder}: {', '.join(group.names)} of {prefix[:-1]} share a buffer and must all "
                f"be in NF4 or none: {', '.join(outside)} is not; {_WAY_OUT}"
            )


def leftover_format(
    folder: Path, stored: Mapping[str, StoredTensor], needed: Set[str], nf4: StoredNF4
) -> str:
    """Name a quantization_config that is left over from a conversion to 16 or 32 bits; empty where
    there is none.

    Args:
        stored: what the files hold that bears on the model.
        needed: the names of what the model is made of.

    Raises:
        ValueError: the weights are quantized as it says, or in some other way.
    """
    said = number_format(folder)
    if nf4.states:
        return ""
    shown = _shown_format(stored, needed, is_said=said is not None)
    if shown:
        says = f"quantization_config says {said}" if said else "there is no quantization_config"
        raise ValueError(
            f"{folder}: all weights must be in 16 or 32 bits, or in {_NF4}: {shown}, and {says}; "
            f"{_WAY_OUT}"
        )
    return said or ""


def _shown_format(stored: Mapping[str, StoredTensor], needed: Set[str], is_said: bool) -> str:
    """Say what shows that weights are quantized; empty where nothing does.

    Args:
        is_said: config.json says so, too: then every tensor that is not as it is in 16 bits shows
            it.
    """
    others = sorted(stored.keys() - needed)
    for suffix, kind in _OTHER_FORMATS.items():
        if found := [name for name in others if name.endswith(suffix)]:
            return f"{found[0]} is of {kind}"
    if not is_said:
        return ""
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS.values():
            return f"{name} is stored as {tensor.dtype}"
    if others:
        return f"{others[0]} is no tensor of the model"
    missing = sorted(needed - stored.keys())
    return f"{missing[0]} is missing" if missing else ""


def as_bytes(stored: StoredTensor) -> StoredTensor:
    """Describe packed codes by their bytes; FSDP has them stored as another dtype.

    Raises:
        ValueError: the dtype is none of those that bytes are stored as.
    """
    if stored.dtype not in _STORAGES:
        raise ValueError(
            f"{stored.file}: the codes of {stored.name} must be stored as "
            f"{', '.join(map(str, _STORAGES))}: got {stored.dtype}; {_WAY_OUT}"
        )
    return replace(stored, shape=(stored.num_bytes, 1), dtype=torch.uint8)
