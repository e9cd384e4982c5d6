"""Multiply by an NF4 weight: y = x W^T and its mirror for the backward pass, grad_x = grad_y W.

    few rows     fused    W is decoded inside the product (`nf4_matmul_fused`): reads its 0.516
                          bytes a weight, and decodes them again for every 32 rows of x
    many rows    expand   W is expanded once (`nf4_dequantize`, 2.516 bytes a weight moved), then
                          a dense product reads 2 more and runs at the tensor cores' full rate

2 M N K FLOP either way. The number of rows where the second becomes faster is measured, not
reasoned: `matmul_path` looks it up in a table by device and says why it chose. Expanded weights are
rounded to x's dtype, fused ones are not or differently, so the two paths differ by about what
either errs. The product is that of QLoRA section 3, "QLoRA", without the adapter's term.
"""

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.nf4_dequantize import nf4_dequantize
from kernels.nf4_matmul_fused import (
    _launch_nf4_matmul_forward,
    _launch_nf4_matmul_transposed,
    fused_obstacle,
)
from nf4.weight import NF4Weight, dequantize

Path = Literal["fused", "expand"]


class MatmulPath(NamedTuple):
    """How a CUDA tensor is multiplied, and why."""

    name: Path
    reason: str


class Crossover(NamedTuple):
    """The most rows for which the fused product wins, 0 if it never does, by size of weight."""

    min_weights: int
    forward: int
    transposed: int


# by compute capability and number of multiprocessors, the largest weights first; from
# benchmarks/results/nf4_matmul.*.json
CROSSOVERS: dict[tuple[tuple[int, int], int], tuple[Crossover, ...]] = {
    ((9, 0), 132): (
        Crossover(32 << 20, forward=80, transposed=32),
        Crossover(8 << 20, forward=64, transposed=0),
        Crossover(0, forward=128, transposed=0),
    ),
}
# of a device that nobody measured: where the fused product wins by far on all known
DEFAULT_CROSSOVERS = (
    Crossover(32 << 20, forward=16, transposed=16),
    Crossover(0, forward=16, transposed=0),
)


def nf4_matmul_reference(x: Tensor, weight: NF4Weight) -> Tensor:
    """Multiply by the transpose of the expanded weight, accumulating in float32."""
    return (x.float() @ dequantize(weight, x.dtype).float().T).to(x.dtype)


def nf4_matmul_transposed_reference(grad_y: Tensor, weight: NF4Weight) -> Tensor:
    """Multiply by the expanded weight, accumulating in float32."""
    return (grad_y.float() @ dequantize(weight, grad_y.dtype).float()).to(grad_y.dtype)


@cache
def _device_key(device: torch.device) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def matmul_path(
    num_rows: int, weight: NF4Weight, dtype: torch.dtype, transposed: bool
) -> MatmulPath:
    """Choose how a CUDA tensor is multiplied by a weight.

    Args:
        num_rows: of the tensor.
        dtype: of the tensor.
        transposed: whether the product is grad_y W instead of x W^T.
    """
    if num_rows == 0:
        return MatmulPath("expand", "there are no rows")
    obstacle = fused_obstacle(weight, dtype, transposed)
    if obstacle:
        return MatmulPath("expand", obstacle)
    key = _device_key(weight.device)
    table = CROSSOVERS.get(key, DEFAULT_CROSSOVERS)
    N, K = weight.shape
    crossover = next(row for row in table if row.min_weights <= N * K)
    most = crossover.transposed if transposed else crossover.forward
    (major, minor), num_sms = key
    source = "measured on" if key in CROSSOVERS else "assumed for"
    reason = (
        f"{num_rows} rows of a {N}x{K} weight; fused wins up to {most}, {source} "
        f"sm_{major}{minor} with {num_sms} multiprocessors"
    )
    return MatmulPath("fused" if num_rows <= most else "expand", reason)


def _resolve(path: Path | None, x: Tensor, weight: NF4Weight, transposed: bool) -> Path:
    if path is None:
        return matmul_path(x.shape[0], weight, x.dtype, transposed).name
    if path not in ("fused", "expand"):
        raise ValueError(f"path must be fused or expand: got {path!r}")
    obstacle = fused_obstacle(weight, x.dtype, transposed) if path == "fused" else ""
    if obstacle:
        raise ValueError(f"path must fit the weight: got fused, but {obstacle}; use expand")
    return path


def _check(x: Tensor, weight: NF4Weight, num_columns: int, what: str) -> None:
    if x.dim() != 2 or x.shape[1] != num_columns or x.stride(1) != 1:
        raise ValueError(
            f"{what} must be a matrix with {num_columns} columns, each row contiguous: "
            f"got shape {tuple(x.shape)} with strides {x.stride()}"
        )
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{what} must be bfloat16, float16 or float32: got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(
            f"{what} and the weight must be on one device: got {x.device} and {weight.device}"
        )


def nf4_matmul(
    x: Tensor,  # (M, K)
    weight: NF4Weight,  # (N, K)
    path: Path | None = None,
) -> Tensor:  # (M, N), x's dtype
    """Multiply by the transpose of an NF4 weight.

        y = x W^T

    No gradient: `lora.linear_group` writes out the backward pass.

    Args:
        path: of a CUDA tensor, instead of what `matmul_path` chooses.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the path does not fit the weight.
    """
    _check(x, weight, weight.shape[1], "x")
    if x.device.type == "cpu":
        return nf4_matmul_reference(x, weight)
    if _resolve(path, x, weight, transposed=False) == "fused":
        return _launch_nf4_matmul_forward(x, weight)
    return x @ nf4_dequantize(weight, x.dtype).T


def nf4_matmul_transposed(
    grad_y: Tensor,  # (M, N)
    weight: NF4Weight,  # (N, K)
    path: Path | None = None,
) -> Tensor:  # (M, K), grad_y's dtype
    """Multiply by an NF4 weight: the gradient of `nf4_matmul` with respect to x.

        grad_x = grad_y W

    Args:
        path: of a CUDA tensor, instead of what `matmul_path` chooses.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the path does not fit the weight.
    """
    _check(grad_y, weight, weight.shape[0], "grad_y")
    if grad_y.device.type == "cpu":
        return nf4_matmul_transposed_reference(grad_y, weight)
    if _resolve(path, grad_y, weight, transposed=True) == "fused":
        return _launch_nf4_matmul_transposed(grad_y, weight)
    return grad_y @ nf4_dequantize(weight, grad_y.dtype)
