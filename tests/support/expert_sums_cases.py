"""The rows of experts that are added up: in the interpreter, on a CPU and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support.layer_cases import CPU, assert_kept, generator_of, part_of_wider_rows
from support.nf4_cases import INTERPRETED_DTYPES
from torch import Tensor


@dataclass(frozen=True)
class SumCase:
    num_tokens: int
    num_terms: int
    width: int
    dtype: torch.dtype
    has_weights: bool = True
    has_start: bool = False

    def __str__(self) -> str:
        shape = f"sum-M{self.num_tokens}-k{self.num_terms}-D{self.width}-{str(self.dtype)[6:]}"
        return shape + "-weighted" * self.has_weights + "-started" * self.has_start


def sum_cases(shapes: list[tuple[int, int, int]], dtypes: tuple[torch.dtype, ...]) -> list[SumCase]:
    return [
        SumCase(*shape, dtype, *use)
        for dtype in dtypes
        for shape in shapes
        # forward, backward, and neither
        for use in ((True, False), (False, True), (False, False))
    ]


# no token; one value of one expert; a prime; more than a program
TINY_SUMS = sum_cases([(0, 2, 64), (1, 1, 1), (5, 3, 97), (3, 2, 1040)], INTERPRETED_DTYPES)


def sum_inputs(case: SumCase, device: torch.device = CPU) -> dict[str, Any]:
    """Draw the rows of all tokens, which lie in no order, as a part of wider rows."""
    generator = generator_of(case)
    pairs = (case.num_tokens, case.num_terms)
    num_rows = case.num_tokens * case.num_terms
    rows = torch.randn(num_rows, case.width, generator=generator)
    places = torch.randperm(num_rows, generator=generator).view(pairs)
    weights = torch.rand(pairs, generator=generator) if case.has_weights else None
    shape = (case.num_tokens, case.width)
    start = torch.randn(shape, generator=generator) if case.has_start else None
    return {
        "rows": part_of_wider_rows(rows, case.dtype, device),
        "places": places.to(device),
        "weights": None if weights is None else weights.to(device),
        "start": None if start is None else start.to(device),
    }


def summed(
    case: SumCase,
    add: Callable[..., Tensor],  # (rows, places, weights, start)
    device: torch.device = CPU,
) -> Tensor:
    """Add up, and see that nothing that was given is written to."""
    inputs, before = sum_inputs(case, device), sum_inputs(case, device)
    y = add(**inputs)
    assert_kept({name: t for name, t in inputs.items() if t is not None}, before)
    return y
