"""The logits on which cross-entropy is tried: in the interpreter, on a CPU and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from support.layer_cases import CPU, generator_of
from support.nf4_cases import INTERPRETED_DTYPES
from torch import Tensor

# of a row of 7: before, behind, what labels say where nothing is to be predicted, beyond int32
OUTSIDE = (-1, 7, -100, 2**32 + 3, -(2**63))


@dataclass(frozen=True)
class LogitsCase:
    """Rows of logits that are parts of rows at least as wide."""

    num_rows: int
    vocab_size: int
    row_width: int
    dtype: torch.dtype
    # far below the largest logits; None: they are not capped
    cap: float | None = None

    def __str__(self) -> str:
        shape = f"M{self.num_rows}-V{self.vocab_size}"
        cap = f"-cap{self.cap:g}" if self.cap else ""
        return f"{shape}-of{self.row_width}-{str(self.dtype)[6:]}{cap}"


def logits_cases(
    shapes: list[tuple[int, int, int]],
    dtypes: tuple[torch.dtype, ...],
    caps: tuple[float | None, ...] = (None, 7.0),
) -> list[LogitsCase]:
    return [LogitsCase(*shape, dtype, cap) for dtype in dtypes for shape in shapes for cap in caps]


# no row; one value; a prime, in rows that start anywhere and on 16 values; whole groups; groups and
# a rest, in rows that do and do not start on 16 values; more warps than the fewest
TINY_LOGITS = logits_cases(
    [
        (0, 64, 64),
        (1, 1, 1),
        (6, 97, 97),
        (5, 97, 112),
        (3, 4096, 4096),
        (4, 8229, 8240),
        (3, 8229, 8233),
        (2, 40_003, 40_016),
    ],
    INTERPRETED_DTYPES,
)


def draw_logits(case: LogitsCase, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows of very different scale, of which one is constant, one certain and one has logits
    of minus infinity.

    Returns:
        rows of the width that ends in NaN, the logits in them, targets.
    """
    generator = generator_of(replace(case, cap=None))
    M, V = case.num_rows, case.vocab_size
    scale = 2.0 ** torch.arange(M).remainder(9).sub(4)
    drawn = torch.randn(M, V, generator=generator) * scale[:, None]
    targets = torch.randint(V, (M,), generator=generator)
    if M > 1:
        drawn[1] = 3
    if M > 2:
        drawn[2, targets[2]] = 40
    if M > 3:
        drawn[3, torch.arange(V) != targets[3]] = float("-inf")
        drawn[3, :5] = 1
    rows = torch.full((M, case.row_width), float("nan"), dtype=case.dtype, device=device)
    logits = rows[:, :V]
    logits.copy_(drawn)
    return rows, logits, targets.to(device)


def loss_results(
    case: LogitsCase,
    losses_of: Callable[..., Tensor],  # (logits, targets, cap=)
    losses_and_gradient_of: Callable[..., Tensor],  # the same; the gradient in the logits' place
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Compute losses alone, then losses and gradient; also keep the logits as the first left them,
    and what lies behind each row."""
    rows, logits, targets = draw_logits(case, device)
    results = {"losses alone": losses_of(logits, targets, cap=case.cap), "logits": logits.clone()}
    results["losses"] = losses_and_gradient_of(logits, targets, cap=case.cap)
    results["gradient"] = logits
    results["behind"] = rows[:, case.vocab_size :]
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in results.items()
    }


def logits_with_targets_outside(device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Draw short rows, all but the first and the last with a target outside."""
    logits = torch.randn(len(OUTSIDE) + 2, 7, generator=torch.Generator().manual_seed(0))
    return logits.to(device), torch.tensor([0, *OUTSIDE, 6], device=device)
