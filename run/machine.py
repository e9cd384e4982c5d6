"""Which device computes, and in which dtype, where the command line leaves it open."""

import torch


def choose_device(name: str) -> str:
    """Resolve --device: `auto` is a GPU if there is one.

    Raises:
        ValueError: cuda is asked for, and there is no GPU.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda must find a GPU: torch sees none; install a CUDA build of torch or "
            "choose --device cpu"
        )
    return name


def choose_dtype(name: str, device: str) -> str:
    """Resolve --dtype: `auto` is bfloat16 on a GPU that has it, float16 on another, float32 on a
    CPU."""
    if name != "auto":
        return name
    is_modern = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "float32" if device == "cpu" else "bfloat16" if is_modern else "float16"
