"""The matrices on which dropout is tried: in the interpreter, on a CPU and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.layer_cases import CPU, generator_of, part_of_wider_rows
from support.nf4_cases import INTERPRETED_DTYPES
from torch import Tensor

# both words of the key, and its sign
SEED = -(2**62) + 12345
SITE = 2**31 - 16


@dataclass(frozen=True)
class DropoutCase:
    """A matrix, and the probability with which its values are dropped."""

    num_rows: int
    width: int
    dtype: torch.dtype
    p: float
    is_strided: bool = False

    def __str__(self) -> str:
        shape = f"M{self.num_rows}-K{self.width}-{str(self.dtype)[6:]}-p{self.p}"
        return shape + "-strided" * self.is_strided


def dropout_cases(
    shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...]
) -> list[DropoutCase]:
    return [
        DropoutCase(*shape, dtype, p, is_strided)
        for dtype in dtypes
        for shape in shapes
        for p, is_strided in ((0.1, False), (0.75, True), (0.0, False))
    ]


# no row; one value; rows that start with any of 4 words; with the first; more than a program
TINY_DROPOUTS = dropout_cases(
    [(0, 64), (1, 1), (5, 97), (3, 510), (7, 3), (3, 512), (2, 2064), (3, 2051)],
    INTERPRETED_DTYPES,
)


def dropout_inputs(case: DropoutCase, device: torch.device = CPU) -> dict[str, Tensor]:
    """Draw a matrix and a sum."""
    generator = generator_of(case)
    shape = (case.num_rows, case.width)
    inputs = {name: torch.randn(shape, generator=generator) for name in ("x", "total")}
    if case.is_strided:
        inputs = {
            name: part_of_wider_rows(tensor, case.dtype, device) for name, tensor in inputs.items()
        }
    return {name: tensor.to(device, case.dtype) for name, tensor in inputs.items()}


def dropout_results(
    case: DropoutCase,
    write: Callable[[Tensor, Tensor, Tensor, int, float], object],  # (z, x, seed, site, p)
    add: Callable[[Tensor, Tensor, Tensor, int, float], object],  # (total, x, seed, site, p)
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Drop into another matrix, onto a sum, in place, and of ones, which shows the mask."""
    inputs = dropout_inputs(case, device)
    x, total = inputs["x"], inputs["total"]
    key = (torch.tensor([SEED], device=device), SITE, case.p)
    z, mask = torch.full_like(x, float("nan")), torch.ones_like(x)
    write(z, x, *key)
    add(total, x, *key)
    write(mask, mask, *key)
    write(x, x, *key)
    results = {"z": z, "total": total, "in place": x, "mask": mask}
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in results.items()
    }
