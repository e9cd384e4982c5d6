"""Rows of tokens and of their experts: in the interpreter, on a CPU and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.layer_cases import CPU, generator_of, part_of_wider_rows
from torch import Tensor

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class ExpertRowsCase:
    """How many tokens there are, and how many experts each has."""

    num_tokens: int
    num_chosen: int
    width: int
    dtype: torch.dtype
    places_dtype: torch.dtype = torch.int64
    # parts of wider rows
    is_strided: bool = False

    def __str__(self) -> str:
        name = f"M{self.num_tokens}-k{self.num_chosen}-D{self.width}"
        dtypes = (str(dtype)[6:] for dtype in (self.dtype, self.places_dtype))
        return "-".join((name, *dtypes)) + "-strided" * self.is_strided


def expert_rows_cases(
    sizes: list[tuple[int, int, int]], dtypes: tuple[torch.dtype, ...]
) -> list[ExpertRowsCase]:
    """List cases, the strided ones with places in 32 bits."""
    return [
        ExpertRowsCase(*size, dtype, places_dtype, is_strided)
        for dtype in dtypes
        for size in sizes
        for places_dtype, is_strided in ((torch.int64, False), (torch.int32, True))
    ]


# no token, one value, a prime, several steps of columns with a rest
TINY_EXPERT_ROWS = expert_rows_cases(
    [(0, 2, 64), (1, 1, 1), (5, 2, 97), (3, 4, 2100), (7, 8, 64)], (torch.float32, torch.float16)
)


@dataclass(frozen=True)
class ExpertRowsInputs:
    """The matrices of a case: of tokens, of pairs, and of both."""

    x: Tensor  # (M, D)
    rows: Tensor  # (R, D)
    # whole numbers, and so is `whole_rows`: their products add up exactly
    grad: Tensor  # (R, D)
    whole_rows: Tensor  # (R, D)
    start: Tensor  # (M, D) float32
    places: Tensor  # (M, k)
    weights: Tensor  # (M, k) float32


def expert_rows_inputs(case: ExpertRowsCase, device: torch.device = CPU) -> ExpertRowsInputs:
    """Draw a case's matrices."""
    generator = generator_of(case)
    M, k, D = case.num_tokens, case.num_chosen, case.width

    def placed(matrix: Tensor) -> Tensor:
        if case.is_strided:
            return part_of_wider_rows(matrix, case.dtype, device)
        return matrix.to(case.dtype).to(device)

    def whole() -> Tensor:
        return placed(torch.randint(-2, 3, (M * k, D), generator=generator).float())

    places = torch.randperm(M * k, generator=generator).view(M, k)
    return ExpertRowsInputs(
        x=placed(torch.randn(M, D, generator=generator)),
        rows=placed(torch.randn(M * k, D, generator=generator)),
        grad=whole(),
        whole_rows=whole(),
        start=torch.randn(M, D, generator=generator).to(device),
        places=places.to(case.places_dtype).to(device),
        weights=torch.rand(M, k, generator=generator).to(device),
    )


def expert_rows_results(
    case: ExpertRowsCase,
    gather: Function,
    combine: Function,
    weigh_backward: Function,
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Compute all that is to be known of a case."""
    given = expert_rows_inputs(case, device)
    results = {
        "gathered": gather(given.x, given.places),
        "sum": combine(given.rows, given.places),
        "weighted": combine(given.rows, given.places, given.weights),
        "from start": combine(given.rows, given.places, None, given.start),
        "weighted from start": combine(given.rows, given.places, given.weights, given.start),
    }
    results["grad_weights"] = weigh_backward(
        given.grad, given.whole_rows, given.places, given.weights
    )
    return results | {"grad_rows": given.grad.contiguous()}
