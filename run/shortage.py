"""What an error of the device means: its memory has ended, or it has failed altogether.

Memory ends in many places, and each has words of its own: torch's allocator, CUDA's runtime under
it (pinned memory, graphs, kernels that are loaded), cuBLAS, NCCL, Triton.
"""

import torch

# in lower case, as CUDA's runtime, its driver through Triton, and cuBLAS name it
_SHORTAGE = ("out of memory", "cudaerrormemoryallocation", "alloc_failed")
_FAILURE = ("cuda error", "triton error [cuda]", "cudnn error", "cublas error", "nccl error")


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error says that memory of the device, or pinned memory, has ended."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _SHORTAGE)


def is_device_failure(error: BaseException) -> bool:
    """Tell whether an error says that the device failed, after which nothing on it may be there."""
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _FAILURE)


def is_lost(device: torch.device) -> bool:
    """Tell whether a device refuses everything from now on, the process's end included."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
