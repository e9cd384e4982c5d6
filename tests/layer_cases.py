"""The inputs on which a layer's operations are tried: in the interpreter, on a CPU and on a GPU."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nf4_cases import INTERPRETED_DTYPES
from torch import Tensor

CPU = torch.device("cpu")
EPS = 1e-5
# columns that lie behind a matrix's own in its rows
NUM_EXTRA = 16


def generator_of(case: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(str(case).encode()))


def part_of_wider_rows(matrix: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy a matrix into the first columns of one that ends in NaN, and take a leaf over them."""
    wide = torch.full(
        (*matrix.shape[:-1], matrix.shape[-1] + NUM_EXTRA), float("nan"), dtype=dtype, device=device
    )
    part = wide[..., : matrix.shape[-1]]
    part.copy_(matrix)
    return part.detach()


@dataclass(frozen=True)
class NormCase:
    """Rows to normalize, with what is added before and which results have a gradient."""

    num_rows: int
    width: int
    dtype: torch.dtype
    has_residual: bool
    has_grad_r: bool
    is_strided: bool = False

    def __str__(self) -> str:
        words = ["residual"] * self.has_residual + ["grad_r"] * self.has_grad_r
        words += ["strided"] * self.is_strided
        return "-".join((f"M{self.num_rows}-D{self.width}-{str(self.dtype)[6:]}", *words))


def norm_cases(shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...]) -> list[NormCase]:
    """Combine shapes and dtypes with every use of residual, gradient and stride."""
    uses = [(False, False, False), (False, True, True), (True, False, True), (True, True, False)]
    return [NormCase(*shape, dtype, *use) for dtype in dtypes for shape in shapes for use in uses]


# no row; one of one value; a prime; whole chunks; a row that no program holds
TINY_NORMS = norm_cases([(0, 64), (1, 1), (5, 97), (3, 512), (2, 16400)], INTERPRETED_DTYPES)


def norm_inputs(case: NormCase, device: torch.device = CPU) -> dict[str, Tensor]:
    """Draw rows of very different scale, one of them zero, weights, and gradients."""
    generator = generator_of(case)
    shape = (case.num_rows, case.width)
    scale = 2.0 ** torch.arange(case.num_rows).remainder(9).sub(4)
    inputs = {
        "x": torch.randn(shape, generator=generator) * scale[:, None],
        "residual": torch.randn(shape, generator=generator) * scale[:, None],
        "grad_y": torch.randn(shape, generator=generator),
        "grad_r": torch.randn(shape, generator=generator),
    }
    if case.num_rows > 2:
        inputs["x"][2] = 0
        inputs["residual"][2] = 0
    if case.is_strided:
        inputs = {
            name: part_of_wider_rows(tensor, case.dtype, device) for name, tensor in inputs.items()
        }
    weight = 1 + torch.randn(case.width, generator=generator) / 4
    inputs |= {"weight": weight}
    return {name: tensor.to(device, case.dtype) for name, tensor in inputs.items()}


def norm_results(
    case: NormCase,
    norm: Callable[..., Any],  # (x, residual, weight, eps) -> y, r
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a normalization forward and back."""
    inputs = norm_inputs(case, device)
    x = inputs["x"].requires_grad_()
    leaves = [x]
    residual = None
    if case.has_residual:
        residual = inputs["residual"].requires_grad_()
        leaves.append(residual)
    y, r = norm(x, residual, inputs["weight"], EPS)
    outputs, grads = [y], [inputs["grad_y"]]
    if case.has_grad_r:
        outputs.append(r)
        grads.append(inputs["grad_r"])
    found = torch.autograd.grad(outputs, leaves, grads)
    results = {"y": y.detach(), "r": r.detach()}
    results |= dict(zip(("grad_x", "grad_residual"), found, strict=False))
    return {name: tensor.clone() for name, tensor in results.items()}
