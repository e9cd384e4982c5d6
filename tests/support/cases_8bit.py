"""What the kernels of 8 bits are tried on: in the interpreter, on a CPU and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from support.layer_cases import (
    CPU,
    NUM_EXTRA,
    TINY_GATES,
    TINY_NORMS,
    GateCase,
    NormCase,
    assert_nan_behind,
    behind,
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
from kernels.matmul_8bit_tiles import scales_of
from kernels.rotation import (
    INT8,
    WIDTH,
    EightBitRows,
    EightBitWeight,
    RotatedRows,
    rotated,
)

FORMATS = (E4M3, INT8)
# INT8's NaN: no kernel is to leave it where it writes
UNWRITTEN = -128


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
    format: torch.dtype = E4M3

    def __str__(self) -> str:
        text = f"M{self.num_rows}-D{self.width}-{str(self.dtype)[6:]}-to-{str(self.format)[6:]}"
        return f"{text}-strided" if self.is_strided else text


def rows_cases(shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...]) -> list[RowsCase]:
    """List cases in both formats; rows that are rotated are multiples of 16."""
    return [
        RowsCase(*shape, dtype, is_strided, format)
        for format in FORMATS
        for dtype in dtypes
        for shape in shapes
        for is_strided in (False, True)
        if format == E4M3 or shape[1] % WIDTH == 0
    ]


# no rows; one value; rests of a chunk; several chunks; a row that no program holds
TINY_ROWS = rows_cases(
    [(0, 16), (3, 1), (7, 97), (7, 112), (5, 1024), (6, 3008), (2, 66_000)], (torch.float16,)
)


def rows_of(case: RowsCase, device: torch.device = CPU) -> Tensor:  # (M, D)
    """Draw rows of different sizes, and among the first ones a row of each kind.

    A row of zeros, an outlier, the least numbers of the dtype, and numbers on midpoints of the
    format.
    """
    generator = generator_of(replace(case, format=E4M3))
    x = torch.randn(case.num_rows, case.width, generator=generator)
    x *= 10.0 ** torch.randint(-2, 3, (case.num_rows, 1), generator=generator)
    # a scale of exactly 1
    ties = torch.cat((torch.tensor([448.0]), midpoints()))
    if case.format == INT8:
        ties = torch.arange(case.width).remainder(7) - 2.5
        ties[:WIDTH] = torch.tensor([127.0, *[0] * (WIDTH - 1)])
        # H H = 16
        ties = rotated(ties[None])[0] / WIDTH
    kinds = (
        torch.zeros(()),
        # in the last chunk
        torch.cat((torch.full((case.width - 1,), 0.3), torch.tensor([-6e4]))),
        torch.full((), torch.finfo(case.dtype).smallest_normal / 4),
        ties[: case.width],
    )
    for row, kind in zip(x, kinds, strict=False):
        row[: kind.numel()] = kind
    x = x.to(case.dtype)
    return part_of_wider_rows(x, case.dtype, device) if case.is_strided else x.to(device)


def non_finite_rows(device: torch.device = CPU) -> Tensor:  # (4, 304) float16
    """Make rows of which the first and the last hold finite numbers only."""
    x = torch.linspace(-5, 5, 1216).view(4, 304).half()
    x[1, 77], x[2, 303] = float("nan"), float("-inf")
    return x.to(device)


def unwritten_rows(
    shape: tuple[int, int], format: torch.dtype, device: torch.device = CPU
) -> EightBitRows:
    """Make rows to be written to, the first columns of wider ones."""
    scales = torch.full(shape[:1], torch.nan, device=device)
    if format == E4M3:
        return Fp8Rows(nan_in_wider_rows(shape, E4M3, device), scales)
    wide = torch.full((shape[0], shape[1] + NUM_EXTRA), UNWRITTEN, dtype=INT8, device=device)
    return RotatedRows(wide[:, : shape[1]], scales)


def written_rows(rows: EightBitRows) -> EightBitRows:
    """See that nothing was written behind rows, and bring them together."""
    if isinstance(rows, Fp8Rows):
        assert_nan_behind(rows.values)
    else:
        assert bool((behind(rows.values) == UNWRITTEN).all())
        assert not bool((rows.values == UNWRITTEN).any())
    return rows._replace(values=rows.values.contiguous())


def quantized_rows(
    case: RowsCase, quantize: Callable[..., Any], device: torch.device = CPU
) -> EightBitRows:
    """Quantize a case's rows, and see that nothing is written behind them."""
    out = unwritten_rows((case.num_rows, case.width), case.format, device)
    quantize(rows_of(case, device), out)
    return written_rows(out)


# of the cases of kernels that write their result in 8 bits too
NORMS_IN_8_BITS = [case for case in TINY_NORMS if case.dtype == torch.float16]
GATES_IN_8_BITS = [case for case in TINY_GATES if case.dtype == torch.float16]
Layer = TypeVar("Layer", NormCase, GateCase)


def in_both(cases: list[Layer]) -> list[tuple[Layer, torch.dtype]]:
    """List cases in both formats; rows that are rotated are multiples of 16."""
    return [
        (case, format)
        for format in FORMATS
        for case in cases
        if format == E4M3 or case.width % WIDTH == 0
    ]


def with_rows(results: dict[str, Tensor], **rows: EightBitRows) -> dict[str, Tensor]:
    """Add what was written to rows, and see that nothing is behind them."""
    for name, written in rows.items():
        values, scales = written_rows(written)
        results |= {f"{name}/values": values, f"{name}/scales": scales}
    return results


def norm_in_8_bits(
    case: NormCase,
    format: torch.dtype,
    norm: Callable[..., Any],
    norm_backward: Callable[..., Any],
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a normalization that writes its result in 8 bits too."""
    y = unwritten_rows((case.num_rows, case.width), format, device)
    return with_rows(norm_results(case, partial(norm, in_8_bits=y), norm_backward, device), y=y)


def gate_in_8_bits(
    case: GateCase,
    format: torch.dtype,
    glu: Callable[..., Any],
    glu_backward: Callable[..., Any],
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a gating that writes its result in 8 bits too."""
    h = unwritten_rows((case.num_rows, case.width), format, device)

    def forward(gate_up: Tensor, activation: Activation, out: Tensor | None) -> Tensor:
        shape = (case.num_rows, case.width)
        written = gate_up.new_full(shape, torch.nan) if out is None else out
        glu(gate_up, activation, written, h)
        return written

    return with_rows(gate_results(case, forward, glu_backward, device), h=h)


# one member; several, of sizes that no tile has; a block of several rows, and of a half
TINY_8BIT_WEIGHTS = [
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
    format: torch.dtype = E4M3

    def __str__(self) -> str:
        words = (
            f"M{self.M}-N{self.N}-K{self.K}-T{self.T}-{str(self.dtype)[6:]}",
            str(self.format)[6:],
            "transposed" * self.is_B_transposed,
            "bias" * self.has_bias,
            "strided" * self.is_strided,
        )
        return "-".join(filter(None, words))


# less than a tile; rests in every direction; several tails; none; several tiles; and so many that
# they are grouped
_MATMULS = [
    MatmulCase(1, 16, 16, 16),
    MatmulCase(5, 48, 80, 16, is_B_transposed=True, is_strided=True),
    MatmulCase(130, 272, 144, 64, has_bias=True, is_strided=True),
    MatmulCase(40, 32, 256, 80),
    MatmulCase(40, 32, 256, 128, is_B_transposed=True),
    MatmulCase(33, 16, 64, 0, has_bias=True),
    MatmulCase(260, 528, 32, 0),
    MatmulCase(1100, 272, 16, 0),
]
TINY_MATMULS = [replace(case, format=format) for format in FORMATS for case in _MATMULS]


@dataclass(frozen=True)
class Operands:
    """The arguments of a product."""

    x: EightBitRows
    w: EightBitWeight
    tail: LowRankTail | None
    bias: Tensor | None


def whole_operands(case: MatmulCase, device: torch.device = CPU) -> Operands:
    """Draw small whole numbers, with powers of two as scales: sums are exact in any order."""
    generator = generator_of(case)

    def draw(rows: int, columns: int, dtype: torch.dtype, is_strided: bool) -> Tensor:
        matrix = torch.randint(-2, 3, (rows, columns), generator=generator).float().to(dtype)
        if not is_strided:
            return matrix.to(device)
        if dtype == INT8:
            return unwritten_rows((rows, columns), INT8, device).values.copy_(matrix)
        return part_of_wider_rows(matrix, dtype, device)

    x = draw(case.M, case.K, case.format, case.is_strided)
    scales = 2.0 ** torch.randint(-3, 3, (case.M,), generator=generator)
    w = draw(case.N, case.K, case.format, case.is_strided)
    w_scales = 2.0 ** torch.randint(-3, 3, (case.N,), generator=generator)
    tail = bias = None
    if case.T:
        h = draw(case.M, case.T, case.dtype, case.is_strided)
        B_shape = (case.T, case.N) if case.is_B_transposed else (case.N, case.T)
        B = draw(*B_shape, case.dtype, case.is_strided)
        tail = LowRankTail(h, B.T if case.is_B_transposed else B)
    if case.has_bias:
        bias = draw(1, case.N, case.dtype, False)[0]
    scales, w_scales = scales.to(device), w_scales.to(device)
    if case.format == INT8:
        return Operands(RotatedRows(x, scales), RotatedRows(w, w_scales), tail, bias)
    return Operands(Fp8Rows(x, scales), Fp8Weight(w, w_scales[0]), tail, bias)


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
    scales = x.scales.double()[:, None] * scales_of(w).double()
    y = x.values.double() @ w.values.double().T * scales
    if tail is not None:
        y += tail.h.double() @ tail.B.double().T
    return y if bias is None else y + bias.double()
