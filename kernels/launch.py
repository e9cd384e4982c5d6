"""The one door through which kernels are launched.

    launch(kernel, grid, *arguments, **options)        kernel[grid](*arguments, **options)

Three things that every launch needs stand here once: the device of the tensors, which need not be
the current one; tensors of torch's meta device, which have sizes and no values, so that there is
nothing to compute (`step/walk.py` walks through a step with such tensors); and a plain
error where a GPU has not what a kernel takes.
"""

from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

# CUDA programming guide, "Technical Specifications per Compute Capability"; the first axis has 2^31
MAX_LATER_AXIS = 65_535


class KernelDoesNotFit(RuntimeError):
    """A GPU has fewer registers or less shared memory than a kernel takes."""


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *others: Any, **options: Any) -> None:
    """Launch a Triton kernel on the device of its first argument.

    Args:
        kernel: of `triton.jit`.
        options: constants of the kernel, and what the compiler takes beside them.

    Raises:
        KernelDoesNotFit: the device refused; the message names the kernel and both sizes.
    """
    assert all(size <= MAX_LATER_AXIS for size in grid[1:]), (kernel, grid)
    if first.device.type == "meta":
        return
    try:
        with torch.cuda.device_of(first):
            kernel[grid](first, *others, **options)
    except OutOfResources as error:
        raise KernelDoesNotFit(
            f"{kernel.__name__} must fit the GPU: it takes {error.required:,} of {error.name}, "
            f"{torch.cuda.get_device_name(first.device)} has {error.limit:,}; this GPU cannot run "
            "this model in this dtype"
        ) from error
