"""The number formats of weights as config.json and the tensors' names tell of them.

Weights in 16 or 32 bits, in bitsandbytes' NF4 and, of gpt-oss's experts, in MXFP4 are loaded; any
other format is refused by its name.
"""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from checkpoint.shard_reader import FLOATS, StoredTensor

NF4_FORMAT = "bitsandbytes nf4"
MXFP4_FORMAT = "mxfp4"
WAY_OUT = "use the original checkpoint, which is quantized to NF4 while it loads"
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


def number_format(config_json: Mapping[str, Any]) -> str | None:
    """Name the number format of config.json's quantization_config; None where there is none.

    The field outlives a conversion to 16 bits, so the files decide how the weights are stored.
    """
    described = config_json.get("quantization_config")
    if not isinstance(described, dict):
        return None if described is None else str(described)
    method = described.get("quant_method")
    in_4_bits, in_8_bits = described.get("load_in_4bit"), described.get("load_in_8bit")
    # early configs have no method
    if method not in (None, "bitsandbytes") or not (method or in_4_bits or in_8_bits):
        return str(method or "an unnamed method")
    if in_4_bits:
        # where none is given, transformers takes this one
        return f"bitsandbytes {described.get('bnb_4bit_quant_type') or 'fp4'}"
    return "bitsandbytes int8" if in_8_bits else "bitsandbytes"


def check_not_quantized(
    folder: Path,
    stored: Mapping[str, StoredTensor],  # tensors of the files, without those left alone
    needed: Set[str],  # names of the model's tensors in 16 or 32 bits
    said: str | None,  # the number format that config.json names
) -> None:
    """Refuse a checkpoint without NF4 whose weights are not in 16 or 32 bits.

    Raises:
        ValueError: the weights are quantized as config.json says, or in some other way.
    """
    shown = _shown_format(stored, needed, is_said=said is not None)
    if shown:
        says = f"quantization_config says {said}" if said else "there is no quantization_config"
        raise ValueError(
            f"{folder}: all weights must be in 16 or 32 bits, or in {NF4_FORMAT}: {shown}, and "
            f"{says}; {WAY_OUT}"
        )


def _shown_format(stored: Mapping[str, StoredTensor], needed: Set[str], is_said: bool) -> str:
    """Name a tensor which shows that weights are quantized; empty where there is none.

    Args:
        is_said: whether config.json names a number format: then every tensor shows it that a
            checkpoint in 16 or 32 bits would not have.
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
