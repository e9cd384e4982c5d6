"""--base-compute: where the base's products may be in 8 bits, and which of a model's are."""

from collections import Counter

from kernels.fp8 import E4M3, fp8_obstacle
from kernels.matmul_8bit import DTYPES
from kernels.rotation import INT8
from llama.model import Llama
from run.config import TrainConfig
from run.machine import Capability

# of the forward products of the MLP, by what the flag says; None: they are in 16 bits
FORWARD_FORMATS = {"int8": INT8, "fp8": E4M3, "fp8-backward": None}


def check_base_compute(config: TrainConfig, capability: Capability | None) -> None:
    """Refuse products in 8 bits that the flags or the GPU rule out.

    Args:
        config: resolved.
        capability: of the GPU; None for a CPU, which computes the same roundings.

    Raises:
        ValueError: the base is not quantized, the passes are in 32 bits, or the GPU is too old.
    """
    if config.base_compute == "bf16":
        return
    flag = f"--base-compute {config.base_compute}"
    if config.quant != "nf4":
        raise ValueError(
            f"{flag} must be given with --quant nf4, whose weights it expands to 8 bits: got "
            f"--quant {config.quant}"
        )
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    if config.dtype not in names:
        raise ValueError(
            f"{flag} must be given with --dtype {' or '.join(names)}: got {config.dtype}; choose "
            f"--dtype {names[0]}"
        )
    if capability and (obstacle := fp8_obstacle(capability)):
        raise ValueError(f"{obstacle}; leave out {flag}")


def set_base_compute(model: Llama, config: TrainConfig) -> None:
    """Let a model's base products be as the flag says, before its first pass.

    Raises:
        ValueError: none of its projections can be multiplied in 8 bits.
    """
    if config.base_compute == "bf16":
        return
    model.multiply_in_8_bits(FORWARD_FORMATS[config.base_compute])
    if all(group.fp8_scale is None for _, group in model.groups()):
        raise ValueError(
            f"--base-compute {config.base_compute} must be given for a model with projections in "
            f"NF4 whose sizes are multiples of 16: {config.model} has none; leave it out"
        )


def describe_base_compute(model: Llama) -> list[str]:
    """Say which projections are multiplied in 8 bits, and which are not; no line where none is."""
    back, forward, others, is_int8 = 0, 0, Counter[str](), False
    for _, group in model.groups():
        if group.fp8_scale is None:
            others.update(group.names)
        else:
            back += len(group.names)
            forward += len(group.names) * (group.forward_format is not None)
            is_int8 |= group.forward_format == INT8
    if not back:
        return []
    dtype = str(model.compute_dtype).removeprefix("torch.")
    total = back + others.total()
    both, ahead, behind = ("8 bits", " in INT8", " in FP8") if is_int8 else ("FP8", "", "")
    line = f"base products in {both}: {forward} of {total} projections forward{ahead}, "
    line += f"{back} back{behind}"
    if others:
        counted = ", ".join(f"{count} {name}" for name, count in others.items())
        line += f"; in {dtype}: {counted}, not in NF4 or of sizes that are no multiples of 16"
    if model.config.experts:
        line += f"; the experts in {dtype}"
    return [f"{line}; evaluations and answers are in {dtype}"]
