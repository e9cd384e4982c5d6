"""CUDA unified memory as tensors: pages that the driver may move to the host under memory pressure.

torch has no allocator for it, so this file calls the CUDA runtime through `cuda.bindings`, which
torch's CUDA wheels bring along. It is the only file that does.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _ManagedBuffer:
    """Owns one cudaMallocManaged allocation; torch keeps it alive as long as a tensor uses it."""

    def __init__(self, runtime: Any, num_elements: int) -> None:
        num_bytes = 4 * num_elements
        pointer = _call(
            runtime.cudaMallocManaged,
            num_bytes,
            runtime.cudaMemAttachGlobal,
            what=f"{num_bytes} bytes",
        )
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (num_elements,),
            "typestr": "<f4",
            "data": (pointer, False),
        }
        # at exit the driver frees everything, and the runtime may be gone before us
        release = weakref.finalize(self, _call, runtime.cudaFree, pointer, what="managed memory")
        release.atexit = False


def _call(function: Callable[..., tuple], *arguments: Any, what: str) -> Any:
    """Call a CUDA runtime function and return its value; a status other than success is raised."""
    status, *values = function(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"{function.__name__}({what}) failed: {status.name} ({int(status)})")
    return values[0] if values else None


def managed_zeros(num_elements: int, device: torch.device) -> Tensor:  # (num_elements,) float32
    """Allocate a zeroed float32 tensor in CUDA unified memory, first resident on `device`.

    Raises:
        RuntimeError: cuda.bindings is not installed, or the device refused the allocation.
    """
    try:
        # here, not at the top: torch's CPU wheels come without it, and then nobody calls this
        from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(
            "paged optimizer state needs the package cuda-bindings, which torch's CUDA wheels "
            "bring: it is missing; install it or choose --optim adamw"
        ) from error
    with torch.cuda.device(device):
        tensor = torch.as_tensor(_ManagedBuffer(runtime, num_elements), device=device)
        return tensor.zero_()
