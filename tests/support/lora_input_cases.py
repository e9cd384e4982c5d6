"""Inputs of whole numbers, whose sums are exact: in the interpreter, on a CPU and a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support.layer_cases import CPU, assert_nan_behind, generator_of, nan_in_wider_rows
from torch import Tensor


@dataclass(frozen=True)
class InputCase:
    """An input of M rows and K columns, A of R rows, a tail of T columns."""

    num_rows: int
    num_columns: int
    num_ranks: int
    tail: int
    dtype: torch.dtype
    is_strided: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"M{self.num_rows}-K{self.num_columns}-R{self.num_ranks}-T{self.tail}-{dtype}"
        return f"{text}-strided" if self.is_strided else text


def input_cases(
    shapes: list[tuple[int, int, int, int]], dtypes: tuple[torch.dtype, ...]
) -> list[InputCase]:
    return [
        InputCase(*shape, dtype, is_strided)
        for dtype in dtypes
        for shape in shapes
        for is_strided in (False, True)
    ]


# one value; a rest in every direction; a full tail; more ranks than a tile has rows
TINY_INPUTS = input_cases(
    [(1, 1, 1, 1), (33, 130, 3, 4), (40, 64, 16, 64), (5, 300, 33, 64), (64, 128, 64, 64)],
    (torch.float16,),
)


def drawn(case: InputCase, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Draw an input and A."""
    generator = generator_of(case)

    def draw(rows: int, columns: int) -> Tensor:
        matrix = torch.randint(-2, 3, (rows, columns), generator=generator).to(case.dtype)
        if case.is_strided:
            return nan_in_wider_rows((rows, columns), case.dtype, device).copy_(matrix)
        return matrix.to(device)

    return draw(case.num_rows, case.num_columns), draw(case.num_ranks, case.num_columns)


def extended_input(
    case: InputCase, compute: Callable[..., Any], device: torch.device = CPU
) -> Tensor:  # (M, K + T)
    """Extend a case's input."""
    x, A = drawn(case, device)
    shape = (case.num_rows, case.num_columns + case.tail)
    out = nan_in_wider_rows(shape, case.dtype, device)
    compute(x, A, out)
    assert_nan_behind(out)
    return out.contiguous()


def extended_by_hand(case: InputCase) -> Tensor:
    """The same in float64, rounded once."""
    x, A = drawn(case)
    rest = torch.zeros(case.num_rows, case.tail - case.num_ranks, dtype=torch.float64)
    return torch.cat((x.double(), x.double() @ A.double().T, rest), dim=1).to(case.dtype)
