"""The meaning of an error of the device: it ran out of memory, or it failed altogether.

Every part that allocates has its own words for running out of memory: torch's allocator, CUDA's
runtime under it (pinned memory, graphs, kernels that are loaded), cuBLAS, NCCL, Triton.
"""

import torch

# words of CUDA's runtime, of its driver through Triton, and of cuBLAS, in lower case
_SHORTAGE = ("out of memory", "cudaerrormemoryallocation", "alloc_failed")
_FAILURE = ("cuda error", "triton error [cuda]", "cudnn error", "cublas error", "nccl error")


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that the device, or pinned memory, ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _SHORTAGE)


def is_device_failure(error: BaseException) -> bool:
    """Whether an error says that the device failed: then the data on it may be lost."""
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _FAILURE)


def is_lost(device: torch.device) -> bool:
    """Whether a device refuses every call from now on, also those at the end of the process."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
