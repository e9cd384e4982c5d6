"""The matrices on which the NF4 quantization is tried: in the interpreter and on a GPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from support.nf4_cases import INTERPRETED_DTYPES, TINY_WEIGHTS, WeightCase, random_matrices
from support.nf4_parity import MAP_MIDPOINTS, dividing_tails, midpoint_weight
from torch import Tensor

from nf4.blockwise import BLOCK_SIZES
from nf4.double_quant import QuantizedAbsmax
from nf4.weight import NF4Weight


@dataclass(frozen=True)
class QuantizeCase:
    """What a weight is quantized from: a key of `VALUES` or normal numbers, in a dtype."""

    values: str
    weight: WeightCase
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.values}-{self.weight}-{str(self.dtype)[6:]}"


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _subnormals(dtype: torch.dtype) -> Tensor:  # (16, 64)
    """Fall from normal numbers to the smallest of all; nf4's floor under a scale lies between."""
    exponents = torch.arange(16) * torch.finfo(dtype).bits / 20
    return (
        (_normal(16, 64) * torch.exp2(4 - exponents)[:, None])
        .double()
        .mul(torch.finfo(dtype).smallest_normal)
    )


def _largest(dtype: torch.dtype) -> Tensor:  # (3, 65)
    """Reach the largest number in most blocks, so that its reciprocal is subnormal."""
    values = _normal(3, 65).clamp(-1, 1)
    values[:, ::17] = 1
    return values.double() * torch.finfo(dtype).max


def _zero_tail(dtype: torch.dtype) -> Tensor:  # (1, 133)
    values = _normal(1, 133)
    values[:, 128:] = 0
    return values


# in whatever dtype they come; a case converts them to its own
VALUES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "midpoints": lambda dtype: midpoint_weight()[:1],
    "short block that divides": lambda dtype: dividing_tails(),
    "subnormals": _subnormals,
    "largest": _largest,
    "zeros": lambda dtype: torch.zeros(3, 33),
    "negative zeros": lambda dtype: torch.full((2, 64), -0.0),
    "one zero": lambda dtype: torch.zeros(1, 1),
    "zero tail": _zero_tail,
    "constant": lambda dtype: torch.full((4, 64), -0.75),
}


def matrices_of(case: QuantizeCase) -> Iterator[Tensor]:
    """The members' matrices."""
    if case.values == "normal":
        yield from (matrix.to(case.dtype) for matrix in random_matrices(case.weight))
    else:
        yield VALUES[case.values](case.dtype).to(case.dtype)


def special_cases(dtype: torch.dtype) -> Iterator[QuantizeCase]:
    """Every entry of `VALUES` in the smallest and in a larger block."""
    for values, make in VALUES.items():
        num_rows, in_features = make(dtype).shape
        for block_size in (32, 64):
            # the mean of the largest scales overflows
            double_quant = values != "largest" and block_size == 64
            weight = WeightCase((num_rows,), in_features, block_size, double_quant)
            yield QuantizeCase(values, weight, dtype)


# two blocks and a short one of every size, an odd count
EVERY_BLOCK_SIZE = [WeightCase((1,), 2 * size + 7, size, False) for size in BLOCK_SIZES]
INTERPRETED_CASES = [
    case
    for dtype in INTERPRETED_DTYPES
    for case in (
        *(QuantizeCase("normal", weight, dtype) for weight in TINY_WEIGHTS + EVERY_BLOCK_SIZE),
        *special_cases(dtype),
    )
]


def held_tensors(weight: NF4Weight) -> dict[str, Tensor]:
    """The buffers of a weight by name."""
    if isinstance(weight.absmax, QuantizedAbsmax):
        return {"packed": weight.packed, **vars(weight.absmax)}
    return {"packed": weight.packed, "absmax": weight.absmax}


def non_finite_matrix(value: float, dtype: torch.dtype) -> Tensor:  # (5, 70)
    """Two weights of 350 are not finite, one of them in the last, short block."""
    matrix = _normal(5, 70).to(dtype)
    matrix[2, 3] = matrix[4, 69] = value
    return matrix


def scales_on_midpoints() -> Tensor:  # (900,) float32
    """Groups whose largest magnitude is one: a midpoint of the 8-bit map is met exactly.

    The 255 midpoints, their neighbours on either side, and a short group. The mean that belongs to
    them is zero.
    """
    ends = (torch.tensor(-2.0), torch.tensor(2.0))
    below, above = (torch.nextafter(MAP_MIDPOINTS, end) for end in ends)
    one = torch.ones(1)
    groups = [torch.cat((one, values)) for values in (MAP_MIDPOINTS, below, above)]
    return torch.cat((*groups, one, _normal(131).clamp(-1, 1)))
