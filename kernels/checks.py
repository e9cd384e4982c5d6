"""The conditions that several operations put on their tensors, each with its one message.

A public function checks its tensors before it allocates anything. Every check takes the name that
its caller gives a tensor, and the message says that name.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# of the matrices that kernels compute on
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Refuse a dtype that the kernels do not compute on.

    Raises:
        ValueError: the dtype is none of DTYPES.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16 or float32: got {dtype}")


def check_is(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another dtype or shape.

    Raises:
        ValueError: the dtype or the shape differs.
    """
    if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
        raise ValueError(
            f"{name} must be {dtype} of shape {shape}: got {tensor.dtype} {tuple(tensor.shape)}"
        )


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor of another shape or dtype than a second one's.

    Raises:
        ValueError: the shape or the dtype differs.
    """
    if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
        raise ValueError(
            f"{name} must have {other_name}'s shape and dtype, {tuple(other.shape)} and "
            f"{other.dtype}: got {tuple(tensor.shape)} and {tensor.dtype}"
        )


def check_is_contiguous(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose elements do not follow one another in memory.

    Raises:
        ValueError: the tensor is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous: got strides {tensor.stride()}")


def check_rows_are_contiguous(name: str, tensor: Tensor, rows: str = "rows") -> None:
    """Refuse a tensor whose last dimension is scattered in memory.

    Args:
        rows: what the message calls the last dimension.

    Raises:
        ValueError: the elements of a row do not follow one another.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must have contiguous {rows}: got strides {tensor.stride()}")


def check_rows_are_apart(name: str, tensor: Tensor) -> None:
    """Refuse a tensor to be written whose rows share memory.

    Raises:
        ValueError: a row begins before the row that precedes it ends.
    """
    *sizes, width = tensor.shape
    if any(n > 1 and step < width for n, step in zip(sizes, tensor.stride(), strict=False)):
        raise ValueError(
            f"{name} must have rows that do not overlap: got strides {tensor.stride()}"
        )


def check_one_device(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors, by name, that are not on the device of the first.

    Raises:
        ValueError: a tensor is on another device.
    """
    (first, device), *others = ((name, tensor.device) for name, tensor in tensors.items())
    for name, other in others:
        if other != device:
            raise ValueError(f"{first} and {name} must be on one device: got {device} and {other}")


def check_seed(seed: Tensor) -> None:
    """Refuse a seed of random words that is not one int64.

    Raises:
        ValueError: the dtype or the shape differs.
    """
    if seed.dtype != torch.int64 or seed.shape != (1,):
        raise ValueError(f"the seed must be one int64: got {seed.dtype} {tuple(seed.shape)}")


def check_not_recorded(tensors: Mapping[str, Tensor], backward: str) -> None:
    """Refuse tensors, by name, for which autograd would want a backward pass.

    Args:
        backward: the function that computes the gradient instead.

    Raises:
        ValueError: a tensor requires a gradient, and autograd is on.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(
                f"nothing is recorded for autograd: got {name} that requires a gradient; "
                f"call under torch.no_grad(), and {backward} for the gradient"
            )
