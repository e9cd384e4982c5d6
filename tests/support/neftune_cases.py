"""The matrices to which noise is added: in the interpreter, on a CPU and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.layer_cases import CPU, generator_of
from support.nf4_cases import INTERPRETED_DTYPES
from torch import Tensor

# both words of the key, and its sign
SEED = -(2**62) + 12345


@dataclass(frozen=True)
class NoiseCase:
    num_rows: int
    width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"noise-M{self.num_rows}-D{self.width}-{str(self.dtype)[6:]}"


def noise_cases(shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...]) -> list[NoiseCase]:
    return [NoiseCase(*shape, dtype) for dtype in dtypes for shape in shapes]


# no row; one value; a part of four words; more than a program
TINY_NOISES = noise_cases([(0, 64), (1, 1), (5, 97), (3, 2064)], INTERPRETED_DTYPES)


def noise_inputs(case: NoiseCase, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a matrix, a scale for each row, one of them 0, and take the seed."""
    generator = generator_of(case)
    x = torch.randn(case.num_rows, case.width, generator=generator)
    scale = torch.rand(case.num_rows, generator=generator)
    scale[2:3] = 0
    return x.to(device, case.dtype), scale.to(device), torch.tensor([SEED], device=device)


def noisy(
    case: NoiseCase,
    add: Callable[[Tensor, Tensor, Tensor], object],  # (x, scale, seed)
    device: torch.device = CPU,
) -> Tensor:
    x, scale, seed = noise_inputs(case, device)
    add(x, scale, seed)
    return x
