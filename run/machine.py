"""The device and the dtype of a run, and how torch uses the device."""

import os
from pathlib import Path

import torch

from foreign.terminal import first_line

DEVICES = Path("/dev")
Capability = tuple[int, int]

# compute capabilities: the oldest that the kernels run on, and the oldest with bfloat16, where
# Triton's products also use the tensor cores
OLDEST = (7, 5)
OLDEST_WITH_BFLOAT16 = (8, 0)


def choose_device(name: str, local_rank: int = 0) -> str:
    """Resolve --device: `auto` is a GPU if there is one.

    Args:
        local_rank: number of this process among those on this machine; each has a GPU of its own.

    Raises:
        ValueError: --device cuda is given, and there is no GPU, or none for this process; or the
            GPU is too old.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    num_gpus = torch.cuda.device_count()
    if name == "cuda" and local_rank >= num_gpus > 0:
        raise ValueError(
            f"--nproc-per-node must be at most the machine's GPUs, {num_gpus}: got at least "
            f"{local_rank + 1}"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda must find a GPU that torch can use: {why_no_gpu()}; install a CUDA "
            "build of torch or choose --device cpu"
        )
    if name == "cuda" and torch.cuda.get_device_capability(local_rank) < OLDEST:
        raise ValueError(
            f"a GPU must have compute capability {_dotted(OLDEST)} or later: "
            f"{_describe_gpu(local_rank)}; choose --device cpu"
        )
    return name


def why_no_gpu() -> str:
    """Say why torch uses no GPU: there is none, or what keeps torch from it."""
    if torch.cuda.is_available():
        return "--device cpu"
    if not any(DEVICES.glob("nvidia[0-9]*")):
        return "no NVIDIA GPU"
    if torch.version.cuda is None:
        return f"there is an NVIDIA GPU, but torch {torch.__version__} is a build without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides the NVIDIA GPU"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        # a driver that is too old, for instance
        return f"torch cannot use the NVIDIA GPU: {first_line(error)}"
    return "torch cannot use the NVIDIA GPU"


def describe_device(device: str) -> str:
    """Name the device; with the reason where it is a CPU."""
    if device == "cpu":
        return f"CPU ({why_no_gpu()})"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / (1 << 30):.1f} GiB"


def has_bfloat16(device: str, planned: Capability | None = None) -> bool:
    """Whether a device is a GPU of compute capability 8.0 or later.

    Args:
        planned: the compute capability of the GPU of a plan, where that is not this machine's.
    """
    return device == "cuda" and (planned or torch.cuda.get_device_capability()) >= (
        OLDEST_WITH_BFLOAT16
    )


def choose_dtype(name: str, device: str, planned: Capability | None = None) -> str:
    """Resolve --dtype: `auto` is bfloat16 on a GPU that has it, float16 on another, float32 on a
    CPU.

    Args:
        planned: as in has_bfloat16.

    Raises:
        ValueError: --dtype bfloat16 is given, and the GPU does not have it.
    """
    if device == "cuda" and name == "bfloat16" and not has_bfloat16(device, planned):
        described = f"--gpu has {_dotted(planned)}" if planned else _describe_gpu(0)
        raise ValueError(
            "--dtype bfloat16 must be given for a GPU of compute capability "
            f"{_dotted(OLDEST_WITH_BFLOAT16)} or later: {described}; choose --dtype float16"
        )
    if name != "auto":
        return name
    if device == "cpu":
        return "float32"
    return "bfloat16" if has_bfloat16(device, planned) else "float16"


def _describe_gpu(index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} has {_dotted(capability)}"


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def configure_torch(device: torch.device, local_rank: int, is_deterministic: bool) -> None:
    """Set how torch computes and allocates on a GPU; to be called before it does either."""
    if device.type == "cuda":
        if local_rank:
            # the first GPU is current by default, and gets its context at its first use: after the
            # processes that tokenize were forked
            torch.cuda.set_device(local_rank)
        # cuBLAS asks for a fixed workspace before its first call: then a product repeats its bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # torch.use_deterministic_algorithms would import torch's compiler, which takes five seconds
        torch.set_deterministic_debug_mode("error" if is_deterministic else "default")
        # deterministic algorithms also fill every empty tensor with NaN, a pass over each tensor;
        # the stubs of torch 2.13 do not know this switch
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
