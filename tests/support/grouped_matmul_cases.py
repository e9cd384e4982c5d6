"""Rows of experts, whole numbers whose sums are exact: in the interpreter, on a CPU and a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from support.layer_cases import CPU, NUM_EXTRA, generator_of
from torch import Tensor

# of rows that a product has no matrix for
UNTOUCHED = 7.0

# grouped_matmul and grouped_matmul_backward_input, or what launches their kernels
Product = Callable[..., Any]


@dataclass(frozen=True)
class GroupedCase:
    """How many rows each expert has, and which experts have their matrix in W."""

    sizes: tuple[int, ...]
    N: int
    K: int
    dtype: torch.dtype
    first_expert: int = 0
    # None: all from the first on
    num_matrices: int | None = None
    # parts of wider rows
    is_strided: bool = False
    # forward alone
    has_bias: bool = False

    def __str__(self) -> str:
        rows = "+".join(map(str, self.sizes))
        name = f"R{rows}-N{self.N}-K{self.K}-{str(self.dtype)[6:]}"
        if self.num_matrices is not None:
            name += f"-{self.num_matrices}from{self.first_expert}"
        return name + "-strided" * self.is_strided + "-bias" * self.has_bias

    @property
    def offsets(self) -> list[int]:
        return list(accumulate(self.sizes, initial=0))

    @property
    def experts(self) -> range:
        """The experts that have a matrix."""
        count = len(self.sizes) - self.first_expert
        return range(self.first_expert, self.first_expert + (self.num_matrices or count))


def grouped_cases(
    shapes: list[tuple[Any, ...]], dtypes: tuple[torch.dtype, ...]
) -> list[GroupedCase]:
    """List cases, as parts of wider rows and not."""
    return [
        GroupedCase(sizes, N, K, dtype, *chunk, is_strided=is_strided)
        for dtype in dtypes
        for sizes, N, K, *chunk in shapes
        for is_strided in (False, True)
    ]


# sizes that hardware can copy: multiples of 16
ALIGNED_SHAPES: list[tuple[Any, ...]] = [
    ((1,), 16, 16),
    # experts without rows at both ends and in between; one row
    ((0, 5, 0, 1, 0), 48, 32),
    # tiles that are not full, in all directions
    ((130, 3, 0, 129), 272, 144),
    # several groups of tiles, of which the last is not full
    ((0, 1290, 0), 272, 16),
    # a chunk
    ((3, 70, 0, 2, 5), 32, 80, 1, 3),
]
ODD_SHAPES: list[tuple[Any, ...]] = [((1,), 1, 1), ((2, 0, 67), 13, 97), ((3, 1, 4), 97, 5, 1, 1)]
TINY_GROUPS = grouped_cases(ALIGNED_SHAPES, (torch.float16,))
TINY_ODD_GROUPS = grouped_cases(ODD_SHAPES, (torch.float16, torch.float32))


def ways(cases: list[GroupedCase]) -> list[tuple[GroupedCase, bool]]:
    """List cases forward, with and without biases, and backward, where biases do not count."""
    backward = [(case, True) for case in cases]
    biased = [(replace(case, has_bias=True), False) for case in cases if case.is_strided]
    return [*((case, False) for case in cases), *biased, *backward]


def grouped_inputs(
    case: GroupedCase, is_transposed: bool, device: torch.device = CPU
) -> dict[str, Any]:
    """Draw whole numbers; rows of experts that have no matrix are NaN."""
    generator = generator_of(case)

    def draw(*shape: int) -> Tensor:
        *rows, width = shape
        wide = torch.full((*rows, width + NUM_EXTRA * case.is_strided), float("nan"))
        wide[..., :width] = torch.randint(-2, 3, shape, generator=generator)
        return wide.to(case.dtype).to(device)[..., :width]

    R = sum(case.sizes)
    W = draw(len(case.experts), case.N, case.K)
    widths = (case.K, case.N)
    summed, width = reversed(widths) if is_transposed else widths
    x, out = draw(R, summed), draw(R, width)
    offsets = case.offsets
    start, stop = offsets[case.experts.start], offsets[case.experts.stop]
    x[:start], x[stop:] = float("nan"), float("nan")
    out.fill_(UNTOUCHED)
    bias = torch.randint(-2, 3, W.shape[:2], generator=generator).to(case.dtype).to(device)
    return {
        "x": x,
        "W": W,
        "offsets": torch.tensor(offsets, dtype=torch.int32, device=device),
        "out": out,
        "first_expert": case.first_expert,
        **({"bias": bias} if case.has_bias else {}),
    }


def grouped_product(
    case: GroupedCase, is_transposed: bool, product: Product, device: torch.device = CPU
) -> Tensor:
    """Compute a case by a public function, or by a launcher with its other arguments bound."""
    given = grouped_inputs(case, is_transposed, device)
    bias = {"bias": given.pop("bias")} if case.has_bias else {}
    product(*given.values(), **bias)
    return given["out"].contiguous()


def grouped_product_by_hand(case: GroupedCase, is_transposed: bool) -> Tensor:
    """Compute the same row by row in float64, rounded once."""
    given = grouped_inputs(case, is_transposed)
    x, W, out = (given[name].double() for name in ("x", "W", "out"))
    for expert in case.experts:
        matrix = W[expert - case.first_expert]
        for row in range(case.offsets[expert], case.offsets[expert + 1]):
            out[row] = x[row] @ matrix if is_transposed else matrix @ x[row]
            if case.has_bias:
                out[row] += given["bias"][expert - case.first_expert]
    return out.to(case.dtype)
