"""Multiply by an NF4 weight: y = x W^T.

    few rows     fused      W is decoded inside the product (`nf4_matmul_fused`): reads its 0.516
                            bytes a weight, and decodes them again for every 32 rows of x
    tens         warpgroup  the same for every 64 rows, on Hopper (`nf4_matmul_warpgroup`)
    many rows    expand     W is expanded once (`nf4_dequantize`, 2.516 bytes a weight moved), then
                            a dense product reads 2 more and runs at the tensor cores' full rate

2 M N K FLOP in each. The numbers of rows where the next becomes faster are measured, not reasoned:
`matmul_path` looks them up in a table by device and says why it chose. The expand path rounds
weights to x's dtype, the others apply exact scales to rounded levels, so two paths differ by about
the error of each. The product is that of QLoRA section 3, "QLoRA", without the adapter's term.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kernels.checks import check_dtype, check_one_device, check_rows_are_contiguous
from kernels.device import properties
from kernels.nf4_decode import make_nf4_tables
from kernels.nf4_dequantize import nf4_dequantize
from kernels.nf4_matmul_fused import _launch_nf4_matmul_fused, fused_obstacle
from kernels.nf4_matmul_operands import operand_obstacle
from kernels.nf4_matmul_warpgroup import _launch_nf4_matmul_warpgroup, warpgroup_obstacle
from kernels.ptx import level_planes
from nf4.weight import NF4Weight, dequantize

PathName = Literal["fused", "warpgroup", "expand"]


class MatmulPath(NamedTuple):
    """How a CUDA tensor is multiplied, and why."""

    name: PathName
    reason: str


class Crossover(NamedTuple):
    """The most rows for which a path wins, 0 if it never does, by size of weight.

    `warpgroup` follows where `fused` ends.
    """

    min_weights: int
    fused: int
    warpgroup: int


# by compute capability and number of multiprocessors, the largest weights first; from
# benchmarks/results/nf4_matmul.*.json
CROSSOVERS: dict[tuple[tuple[int, int], int], tuple[Crossover, ...]] = {
    ((9, 0), 132): (
        Crossover(32 << 20, fused=16, warpgroup=128),
        Crossover(8 << 20, fused=32, warpgroup=128),
        Crossover(0, fused=128, warpgroup=0),
    ),
}
# of a device without measurements: so far the fused product wins clearly on every known device
DEFAULT_CROSSOVERS = (Crossover(0, fused=16, warpgroup=0),)
# for more rows a weight is expanded on every device
MOST_DECODED_ROWS = max(
    max(row.fused, row.warpgroup)
    for table in (*CROSSOVERS.values(), DEFAULT_CROSSOVERS)
    for row in table
)


def make_nf4_matmul_tables(weight: NF4Weight, dtype: torch.dtype) -> None:
    """Make the tables that products by a weight read on its device, in a dtype of the other matrix.

    Before the first pass: `kernels.constants` says why.
    """
    make_nf4_tables(weight)
    if not operand_obstacle(weight, dtype):
        level_planes(dtype, weight.device)


def nf4_matmul_reference(x: Tensor, weight: NF4Weight) -> Tensor:
    """Multiply by the transpose of the expanded weight, accumulating in float32."""
    return (x.float() @ dequantize(weight, x.dtype).float().T).to(x.dtype)


def matmul_path(num_rows: int, weight: NF4Weight, dtype: torch.dtype) -> MatmulPath:
    """Choose how a CUDA tensor is multiplied by a weight.

    Args:
        num_rows: of the tensor.
        dtype: of the tensor.
    """
    if num_rows == 0:
        return MatmulPath("expand", "there are no rows")
    gpu = properties(weight.device)
    key = (gpu.capability, gpu.num_multiprocessors)
    (major, minor), num_sms = key
    table = CROSSOVERS.get(key, DEFAULT_CROSSOVERS)
    N, K = weight.shape
    crossover = next(row for row in table if row.min_weights <= N * K)
    bounds: tuple[tuple[PathName, int], ...] = (
        ("fused", crossover.fused),
        ("warpgroup", crossover.warpgroup),
    )
    rows = f"{num_rows} rows of a {N}x{K} weight"
    where = (
        f"{'measured on' if key in CROSSOVERS else 'assumed for'} sm_{major}{minor} with "
        f"{num_sms} multiprocessors"
    )
    obstacles = []
    for name, most in bounds:
        if num_rows <= most:
            obstacle = path_obstacle(name, weight, dtype)
            if not obstacle:
                return MatmulPath(name, f"{rows}; {name} wins up to {most}, {where}")
            obstacles.append(obstacle)
    beyond = f"{rows}; it wins beyond {max(most for _, most in bounds)}, {where}"
    return MatmulPath("expand", obstacles[0] if obstacles else beyond)


def path_obstacle(path: PathName, weight: NF4Weight, dtype: torch.dtype) -> str:
    """Say what keeps a weight on a GPU from a path; an empty string if nothing does."""
    capability = properties(weight.device).capability
    if path == "fused":
        return fused_obstacle(weight, dtype, capability)
    if path == "warpgroup":
        return warpgroup_obstacle(weight, dtype, capability)
    return ""


def _resolve(path: PathName | None, x: Tensor, weight: NF4Weight) -> PathName:
    if path is None:
        return matmul_path(x.shape[0], weight, x.dtype).name
    if path not in get_args(PathName):
        raise ValueError(f"path must be one of {', '.join(get_args(PathName))}: got {path!r}")
    obstacle = path_obstacle(path, weight, x.dtype)
    if obstacle:
        raise ValueError(f"path must fit the weight: got {path}, but {obstacle}; use expand")
    return path


def _check(x: Tensor, weight: NF4Weight) -> None:
    if x.dim() != 2 or x.shape[1] != weight.in_features:
        raise ValueError(
            f"x must be a matrix with {weight.in_features} columns: got shape {tuple(x.shape)}"
        )
    check_rows_are_contiguous("x", x)
    check_dtype("x", x.dtype)
    check_one_device({"x": x, "the weight": weight.packed})


def nf4_matmul(
    x: Tensor,  # (M, K)
    weight: NF4Weight,  # (N, K)
    path: PathName | None = None,
) -> Tensor:  # (M, N), x's dtype
    """Multiply by the transpose of an NF4 weight.

        y = x W^T

    No gradient: `lora.linear_group` writes out the backward pass.

    Args:
        path: of a CUDA tensor, instead of what `matmul_path` chooses.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the path does not fit the weight.
    """
    _check(x, weight)
    if x.device.type == "cpu":
        return nf4_matmul_reference(x, weight)
    chosen = _resolve(path, x, weight)
    if chosen == "fused":
        return _launch_nf4_matmul_fused(x, weight)
    if chosen == "warpgroup":
        return _launch_nf4_matmul_warpgroup(x, weight)
    return x @ nf4_dequantize(weight, x.dtype).T
