"""What the FP8 kernels are tried on: in the interpreter, on a CPU and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from support.layer_cases import (
    CPU,
    TINY_GATES,
    TINY_NORMS,
    GateCase,
    NormCase,
    assert_nan_behind,
    gate_results,
    generator_of,
    nan_in_wider_rows,
    norm_results,
    part_of_wider_rows,
)
from support.nf4_cases import WeightCase
from torch import Tensor

from kernels.fp8 import E4M3, Fp8Rows, Fp8Weight, LowRankTail
from kernels.glu import Activation


def midpoints() -> Tensor:  # (126,) float32
    """List the numbers halfway between neighbours of E4M3, above zero."""
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    return (values[1:] + values[:-1]) / 2


@dataclass(frozen=True)
class RowsCase:
    """A matrix that is quantized row by row."""

    num_rows: int
    width: int
    dtype: torch.dtype
    is_strided: bool = False

    def __str__(self) -> str:
        text = f"M{self.num_rows}-D{self.width}-{str(self.dtype)[6:]}"
        return f"{text}-strided" if self.is_strided else text


def rows_cases(shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...]) -> list[RowsCase]:
    return [
        RowsCase(*shape, dtype, is_strided)
        for dtype in dtypes
        for shape in shapes
        for is_strided in (False, True)
    ]


# no rows; one value; rests of a chunk; several chunks; a row that no program holds
TINY_ROWS = rows_cases(
    [(0, 16), (3, 1), (7, 97), (5, 1024), (6, 3000), (2, 66_000)], (torch.float16,)
)


def rows_of(case: RowsCase, device: torch.device = CPU) -> Tensor:  # (M, D)
    """Draw rows of different sizes, and among the first ones a row of each kind.

    A row of zeros, an outlier, the least numbers of the dtype, and numbers on midpoints of E4M3.
    """
    generator = generator_of(case)
    x = torch.randn(case.num_rows, case.width, generator=generator)
    x *= 10.0 ** torch.randint(-2, 3, (case.num_rows, 1), generator=generator)
    ties = midpoints()[: case.width]
    kinds = (
        torch.zeros(()),
        # in the last chunk
        torch.cat((torch.full((case.width - 1,), 0.3), torch.tensor([-6e4]))),
        torch.full((), torch.finfo(case.dtype).smallest_normal / 4),
        # a scale of exactly 1
        torch.cat((torch.tensor([448.0]), ties))[: case.width],
    )
    for row, kind in zip(x, kinds, strict=False):
        row[: kind.numel()] = kind
    x = x.to(case.dtype)
    return part_of_wider_rows(x, case.dtype, device) if case.is_strided else x.to(device)


def non_finite_rows(device: torch.device = CPU) -> Tensor:  # (4, 300) float16
    """Make rows of which the first and the last hold finite numbers only."""
    x = torch.linspace(-5, 5, 1200).view(4, 300).half()
    x[1, 77], x[2, 299] = float("nan"), float("-inf")
    return x.to(device)


def quantized_rows(
    case: RowsCase, quantize: Callable[..., Any], device: torch.device = CPU
) -> Fp8Rows:
    """Quantize a case's rows, and see that nothing is written behind them."""
    x = rows_of(case, device)
    shape = (case.num_rows, case.width)
    values = nan_in_wider_rows(shape, E4M3, device)
    out = Fp8Rows(values, torch.full(shape[:1], float("nan"), device=device))
    quantize(x, out)
    assert_nan_behind(values)
    return Fp8Rows(values.contiguous(), out.scales)


# of the cases of kernels that write their result in E4M3 too
NORMS_IN_FP8 = [case for case in TINY_NORMS if case.dtype == torch.float16]
GATES_IN_FP8 = [case for case in TINY_GATES if case.dtype == torch.float16]


def nan_rows(num_rows: int, width: int, device: torch.device = CPU) -> Fp8Rows:
    """Make rows to be written to, NaN all over."""
    values = nan_in_wider_rows((num_rows, width), E4M3, device)
    return Fp8Rows(values, torch.full((num_rows,), torch.nan, device=device))


def with_rows(results: dict[str, Tensor], **rows: Fp8Rows) -> dict[str, Tensor]:
    """Add what was written to rows, and see that nothing is behind them."""
    for name, (values, scales) in rows.items():
        assert_nan_behind(values)
        results |= {f"{name}/values": values.contiguous(), f"{name}/scales": scales}
    return results


def norm_in_fp8(
    case: NormCase,
    norm: Callable[..., Any],
    norm_backward: Callable[..., Any],
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a normalization that writes its result in E4M3 too."""
    y = nan_rows(case.num_rows, case.width, device)
    return with_rows(norm_results(case, partial(norm, fp8=y), norm_backward, device), y=y)


def gate_in_fp8(
    case: GateCase,
    glu: Callable[..., Any],
    glu_backward: Callable[..., Any],
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a gating that writes its result in E4M3 too."""
    h = nan_rows(case.num_rows, case.width, device)

    def forward(gate_up: Tensor, activation: Activation, out: Tensor | None) -> Tensor:
        shape = (case.num_rows, case.width)
        written = gate_up.new_full(shape, torch.nan) if out is None else out
        glu(gate_up, activation, written, h)
        return written

    return with_rows(gate_results(case, forward, glu_backward, device), h=h)


# one member; several, of sizes that no tile has; a block of several rows, and of a half
TINY_FP8_WEIGHTS = [
    WeightCase(rows, in_features, block_size, double_quant)
    for rows, in_features, block_size in [
        ((16,), 16, 32),
        ((48, 16), 80, 64),
        ((160, 32), 192, 64),
        ((32,), 48, 256),
    ]
    for double_quant in (True, False)
]


@dataclass(frozen=True)
class MatmulCase:
    """A product of M rows of K columns with a weight of N rows, and an update of T columns."""

    M: int
    N: int
    K: int
    T: int = 64
    dtype: torch.dtype = torch.float16
    is_B_transposed: bool = False
    has_bias: bool = False
    is_strided: bool = False

    def __str__(self) -> str:
        words = (
            f"M{self.M}-N{self.N}-K{self.K}-T{self.T}-{str(self.dtype)[6:]}",
            "transposed" * self.is_B_transposed,
            "bias" * self.has_bias,
            "strided" * self.is_strided,
        )
        return "-".join(filter(None, words))


# less than a tile; rests in every direction; several tails; none; several tiles; and so many that
# they are grouped
TINY_MATMULS = [
    MatmulCase(1, 16, 16, 16),
    MatmulCase(5, 48, 80, 16, is_B_transposed=True, is_strided=True),
    MatmulCase(130, 272, 144, 64, has_bias=True, is_strided=True),
    MatmulCase(40, 32, 256, 80),
    MatmulCase(40, 32, 256, 128, is_B_transposed=True),
    MatmulCase(33, 16, 64, 0, has_bias=True),
    MatmulCase(260, 528, 32, 0),
    MatmulCase(1100, 272, 16, 0),
]


@dataclass(frozen=True)
class Operands:
    """The arguments of a product."""

    x: Fp8Rows
    w: Fp8Weight
    tail: LowRankTail | None
    bias: Tensor | None


def whole_operands(case: MatmulCase, device: torch.device = CPU) -> Operands:
    """Draw small whole numbers, with powers of two as scales: sums are exact in any order."""
    generator = generator_of(case)

    def draw(rows: int, columns: int, dtype: torch.dtype, is_strided: bool) -> Tensor:
        matrix = torch.randint(-2, 3, (rows, columns), generator=generator).float().to(dtype)
        return part_of_wider_rows(matrix, dtype, device) if is_strided else matrix.to(device)

    x = draw(case.M, case.K, E4M3, case.is_strided)
    scales = 2.0 ** torch.randint(-3, 3, (case.M,), generator=generator)
    w = draw(case.N, case.K, E4M3, case.is_strided)
    tail = bias = None
    if case.T:
        h = draw(case.M, case.T, case.dtype, case.is_strided)
        B_shape = (case.T, case.N) if case.is_B_transposed else (case.N, case.T)
        B = draw(*B_shape, case.dtype, case.is_strided)
        tail = LowRankTail(h, B.T if case.is_B_transposed else B)
    if case.has_bias:
        bias = draw(1, case.N, case.dtype, False)[0]
    scale = torch.tensor(0.25, device=device)
    return Operands(Fp8Rows(x, scales.to(device)), Fp8Weight(w, scale), tail, bias)


def product(
    case: MatmulCase, compute: Callable[..., Any], device: torch.device = CPU
) -> Tensor:  # (M, N)
    """Multiply a case's whole numbers."""
    operands = whole_operands(case, device)
    out = nan_in_wider_rows((case.M, case.N), case.dtype, device)
    compute(operands.x, operands.w, out, operands.tail, operands.bias)
    assert_nan_behind(out)
    return out.contiguous()


def product_by_hand(operands: Operands) -> Tensor:  # (M, N) float64
    """The product in float64, not rounded."""
    x, w, tail, bias = operands.x, operands.w, operands.tail, operands.bias
    scales = x.scales.double()[:, None] * w.scale.double()
    y = x.values.double() @ w.values.double().T * scales
    if tail is not None:
        y += tail.h.double() @ tail.B.double().T
    return y if bias is None else y + bias.double()
