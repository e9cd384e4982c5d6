"""The weights and products on which the NF4 kernels are tried: in the interpreter and on a GPU."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from nf4.double_quant import QuantizedAbsmax
from nf4.weight import NF4Weight, empty_weight, quantize_member


@dataclass(frozen=True)
class WeightCase:
    """The shape and format of a weight."""

    rows: tuple[int, ...]
    in_features: int
    block_size: int = 64
    double_quant: bool = True

    def __str__(self) -> str:
        rows = "+".join(str(n) for n in self.rows)
        nested = "nested" if self.double_quant else "plain"
        return f"N{rows}-K{self.in_features}-block{self.block_size}-{nested}"


@dataclass(frozen=True)
class ProductCase:
    """A weight, the number of rows that it is multiplied by, and their dtype."""

    weight: WeightCase
    num_rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"M{self.num_rows}-{self.weight}-{str(self.dtype)[6:]}"


def _generator(case: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(str(case).encode()))


def random_matrices(case: WeightCase) -> Iterator[Tensor]:
    """Draw normal matrices of growing scale, with a block of zeros and an outlier in each."""
    generator = _generator(case)
    for index, num_rows in enumerate(case.rows):
        matrix = torch.randn(num_rows, case.in_features, generator=generator) * 2.0**index
        flat = matrix.view(-1)
        # the second block, if there is one
        flat[case.block_size : 2 * case.block_size] = 0
        flat[-1] = 20
        yield matrix


# the largest take seconds, and several tests in a row want the same
@lru_cache(maxsize=4)
def random_weight(case: WeightCase) -> NF4Weight:
    """Quantize random matrices; not to be written to."""
    device = torch.device("cpu")
    weight = empty_weight(case.rows, case.in_features, case.block_size, case.double_quant, device)
    for index, matrix in enumerate(random_matrices(case)):
        quantize_member(weight, index, matrix, f"member {index}")
    return weight


def scratch_around(case: WeightCase, dtype: torch.dtype, num_extra: int = 16) -> Tensor:
    """Make a matrix that has room for the weight and `num_extra` columns, filled with 777."""
    return torch.full((sum(case.rows), case.in_features + num_extra), 777, dtype=dtype)


def random_rows(case: ProductCase) -> Tensor:
    """Draw the rows that a weight is multiplied by, out of a wider matrix that ends in NaN."""
    num_columns = case.weight.in_features
    wide = torch.randn(case.num_rows, num_columns + 5, generator=_generator(case))
    wide[:, num_columns:] = float("nan")
    return wide.to(case.dtype)[:, :num_columns]


# without bfloat16: the interpreters of triton 3.6 to 3.9 cut its bits off instead of rounding, and
# tl.dot multiplies its bit patterns as integers
INTERPRETED_DTYPES = (torch.float32, torch.float16)
# tiny, for the interpreter: whole blocks; a row that is no whole block; rows that start inside a
# byte; one weight; more blocks than a group; more bytes than a program expands, in two members
TINY_WEIGHTS = [
    WeightCase(rows, in_features, block_size, double_quant)
    for rows, in_features, block_size in [
        ((32,), 64, 64),
        ((5,), 100, 64),
        ((3, 2, 4), 33, 32),
        ((1,), 1, 64),
        ((91,), 97, 32),
        ((50, 30), 97, 64),
        ((16, 8), 128, 128),
    ]
    for double_quant in (True, False)
]
# a program meets the ends of a few of their rows, or of one
LONG_ROWS = [WeightCase((3, 2), 1500), WeightCase((2, 1), 4104)]
# for the fused kernels, which want whole blocks: one step; several members; more steps than divide
# into warps; more rows than a program takes
TINY_PRODUCTS = [
    ProductCase(WeightCase(rows, in_features, 64, double_quant), num_rows, torch.float16)
    for rows, in_features, double_quant, num_rows in (
        ((64,), 256, True, 1),
        ((64,), 256, False, 3),
        ((64, 128), 512, True, 17),
        ((64,), 768, True, 33),
    )
]
# the product by the identity is the weight: shows which element lies where
IDENTITY_WEIGHT = WeightCase((64, 64), 256)


def to_device(weight: NF4Weight, device: torch.device) -> NF4Weight:
    """Copy a weight to a device."""
    absmax = weight.absmax
    if isinstance(absmax, QuantizedAbsmax):
        tensors = (absmax.codes, absmax.group_absmax, absmax.mean)
        absmax = QuantizedAbsmax(*(tensor.to(device) for tensor in tensors))
    else:
        absmax = absmax.to(device)
    return replace(weight, packed=weight.packed.to(device), absmax=absmax)
