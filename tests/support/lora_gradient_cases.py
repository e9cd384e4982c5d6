"""Gradients of whole numbers, whose sums are exact: in the interpreter, on a CPU and a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from support.layer_cases import CPU, NUM_EXTRA, generator_of
from support.lora_extension_cases import ExtensionCase
from torch import Tensor

from kernels.lora_extension import Update

# of an H100
NUM_MULTIPROCESSORS = 132
# of B's gradient, added to
START = 3.0

# what the launcher is called with first: grad_y, h, sB, grad_h, grad_B
Matrices = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradient = Callable[..., Any]


def gradient_cases(
    shapes: list[tuple[Any, ...]], dtypes: tuple[torch.dtype, ...]
) -> list[tuple[int, ExtensionCase]]:
    """List numbers of tokens with cases of ExtensionCase, whose in_features play no part."""
    return [
        (num_tokens, ExtensionCase(rows, targets, 1, rank, tail, dtype, is_strided))
        for dtype in dtypes
        for num_tokens, rows, targets, rank, tail in shapes
        for is_strided in (False, True)
    ]


# one value; a full tail, and one that is not; members without an update at both ends and in
# between; several stripes and groups, with a rest
TINY_GRADIENTS = gradient_cases(
    [
        (1, (1,), (0,), 1, 1),
        (70, (5, 3), (0, 1), 2, 4),
        (130, (7, 2, 3), (0, 2), 3, 64),
        (65, (2, 530, 5), (1,), 5, 64),
        (200, (1040, 16), (0, 1), 16, 32),
    ],
    (torch.float16,),
)


def updates_of(case: ExtensionCase) -> tuple[Update, ...]:
    """A case's updates with powers of two as factors, so that nothing rounds before the result
    does."""
    return tuple(u._replace(scaling=2.0 ** -(i + 1)) for i, u in enumerate(case.updates))


def gradient_inputs(num_tokens: int, case: ExtensionCase, device: torch.device = CPU) -> Matrices:
    """Draw whole numbers; s B has blocks of its own for each update and zeros elsewhere."""
    generator = generator_of(case)
    N, T, R = case.num_rows, case.tail, case.rank

    def draw(rows: int, columns: int) -> Tensor:
        extra = NUM_EXTRA * case.is_strided
        wide = torch.full((rows, columns + extra), float("nan"), dtype=case.dtype)
        wide[:, :columns] = torch.randint(-2, 3, (rows, columns), generator=generator)
        return wide.to(device)[:, :columns]

    grad_y, h, grad_h = draw(num_tokens, N), draw(num_tokens, T), draw(num_tokens, T)
    grad_h.fill_(float("nan"))
    # as the product leaves it: what no update fills is zero
    h[:, len(case.updates) * R :] = 0
    drawn, sB = draw(N, T), draw(N, T).zero_()
    for update in case.updates:
        sB[update.y, update.A] = drawn[update.y, update.A]
    num_rows_B = sum(update.B.stop - update.B.start for update in case.updates)
    grad_B = torch.full((num_rows_B, R), START, device=device)
    return grad_y, h, sB, grad_h, grad_B


def gradients(
    num_tokens: int, case: ExtensionCase, compute: Gradient, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Compute a case's gradients."""
    matrices = gradient_inputs(num_tokens, case, device)
    compute(*matrices, updates_of(case))
    return {"grad_h": matrices[3].contiguous(), "grad_B": matrices[4]}


def gradients_by_hand(num_tokens: int, case: ExtensionCase) -> dict[str, Tensor]:
    """Compute the same member by member in float64, rounded once."""
    grad_y, h, sB, grad_h, grad_B = gradient_inputs(num_tokens, case)
    expected_h = torch.zeros(grad_h.shape, dtype=torch.float64)
    expected_B = grad_B.double()
    for update in updates_of(case):
        g = grad_y[:, update.y].double()
        expected_h[:, update.A] = g @ sB[update.y, update.A].double()
        expected_B[update.B] += update.scaling * g.T @ h[:, update.A].double()
    return {"grad_h": expected_h.to(case.dtype), "grad_B": expected_B.float()}
