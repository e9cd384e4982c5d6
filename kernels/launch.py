"""The one door through which kernels are launched.

    launch(kernel, grid, **arguments)        kernel[grid](**arguments)

Three things that every launch needs stand here once: the device of the tensors, which need not be
the current device; tensors of torch's meta device, which have sizes and no values, so that there is
nothing to compute and at the most something to compile (`kernels/ahead.py`); and a plain error
where a GPU has less than a kernel takes.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.ahead import compile_ahead
from kernels.language import triton

# CUDA programming guide, "Technical Specifications per Compute Capability"; the first axis has 2^31
MAX_LATER_AXIS = 65_535


class KernelDoesNotFit(RuntimeError):
    """A GPU has fewer registers or less shared memory than a kernel takes."""


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a Triton kernel on the device of the first tensor among its arguments.

    Args:
        kernel: of `triton.jit`.
        arguments: the kernel's, its constants included, and the compiler's options.

    Raises:
        KernelDoesNotFit: the device refused; the message names the kernel and both sizes.
    """
    assert all(size <= MAX_LATER_AXIS for size in grid[1:]), (kernel, grid)
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    if first.device.type == "meta":
        compile_ahead(kernel, grid, arguments)
        return
    try:
        with torch.cuda.device_of(first):
            kernel[grid](**arguments)
    except triton.OutOfResources as error:
        raise KernelDoesNotFit(
            f"{kernel.__name__} must fit the GPU: it takes {error.required:,} of {error.name}, "
            f"{torch.cuda.get_device_name(first.device)} has {error.limit:,}; this GPU cannot run "
            "this model in this dtype"
        ) from error


def cdiv(a: int, b: int) -> int:
    """Divide and round up. Triton's own function may run in kernels too, and takes 5 us here."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Round up to a power of two. Triton's own function takes 5 us."""
    return 1 << (n - 1).bit_length()


def head_strides(**heads: Tensor) -> dict[str, int]:  # each (B, H, T, E)
    """Name the strides of heads as kernels do: q's are stride_qb, stride_qh and stride_qt."""
    return {
        f"stride_{name}{axis}": stride
        for name, tensor in heads.items()
        for axis, stride in zip("bht", tensor.stride(), strict=False)
    }
