"""Gradients of experts' updates, of whole numbers whose sums are exact: in the interpreter, on a
CPU and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from support.layer_cases import CPU, NUM_EXTRA, generator_of
from torch import Tensor

# expert_gradient, or what launches its kernel
Gradient = Callable[..., Any]


@dataclass(frozen=True)
class ExpertGradientCase:
    """How many rows each expert has, and how wide both matrices are."""

    sizes: tuple[int, ...]
    P: int
    Q: int
    dtype: torch.dtype

    def __str__(self) -> str:
        rows = "+".join(map(str, self.sizes))
        return f"R{rows}-P{self.P}-Q{self.Q}-{str(self.dtype)[6:]}"


# experts without rows, a rest in every direction, more columns than a program has
SHAPES: list[tuple[tuple[int, ...], int, int]] = [
    ((1,), 1, 1),
    ((0, 5, 0, 1, 0), 16, 32),
    ((70, 3, 0, 65), 4, 130),
    ((2, 33), 67, 19),
]
TINY_EXPERT_GRADIENTS = [
    ExpertGradientCase(sizes, P, Q, dtype)
    for sizes, P, Q in SHAPES
    for dtype in (torch.float16, torch.float32)
]


def expert_gradient_inputs(
    case: ExpertGradientCase, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Draw whole numbers; rows of b are parts of wider ones, and the gradient lies as lora_B's."""
    generator, R, E = generator_of(case), sum(case.sizes), len(case.sizes)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    wide = torch.full((R, case.Q + NUM_EXTRA), float("nan"))
    wide[:, : case.Q] = draw(R, case.Q)
    offsets = list(accumulate(case.sizes, initial=0))
    return {
        "a": draw(R, case.P).to(case.dtype).to(device),
        "b": wide.to(case.dtype).to(device)[:, : case.Q],
        "offsets": torch.tensor(offsets, dtype=torch.int32, device=device),
        "grad": draw(case.Q, case.P, E).to(device).permute(2, 1, 0),
    }


def expert_gradient_of(
    case: ExpertGradientCase, gradient: Gradient, device: torch.device = CPU
) -> Tensor:
    """Compute a case by the public function, or by a launcher with its last argument bound."""
    given = expert_gradient_inputs(case, device)
    gradient(*given.values())
    return given["grad"].contiguous().cpu()


def expert_gradient_by_hand(case: ExpertGradientCase) -> Tensor:
    """Compute the same in float64, rows one by one."""
    given = expert_gradient_inputs(case)
    grad = given["grad"].double()
    for expert, (start, stop) in enumerate(pairwise(given["offsets"].tolist())):
        for row in range(start, stop):
            grad[expert] += torch.outer(given["a"][row].double(), given["b"][row].double())
    return grad.float().contiguous()
