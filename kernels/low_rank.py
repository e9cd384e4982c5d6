"""The low-rank updates of a weight's members, as the kernels for few rows read them.

    y = x W^T + h B^T           h = x A^T

    A   | A of member 0 |       (P, K)                 B   | s B of member 0 |   (N, R)
        | A of member 2 |                                  | 0               |
                                                           | s B of member 2 |

Both are rounded once to the dtype of x, B after the scaling s. Each row of B is as long as one
update's rank R and meets its own member's part of h, which begins at column `starts[member]`. A
member without an update has zeros in B.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.lora_extension import Update


class LowRank(NamedTuple):
    """The updates of a weight's members."""

    A: Tensor  # (P, K)
    B: Tensor  # (N, R), scaled
    starts: Tensor  # (members,) int32, columns of h


def low_rank_of(
    lora_A: Tensor,  # (P, K) float32
    lora_B: Tensor,  # (sum of the updates' rows, R) float32
    updates: Sequence[Update],
    rows: Sequence[int],  # of each member
    dtype: torch.dtype,
) -> LowRank:
    """Round the low-rank updates of a weight's members for the kernels."""
    B = lora_B.new_zeros(sum(rows), lora_B.shape[1])
    for update in updates:
        B[update.y] = lora_B[update.B] * update.scaling
    columns = {update.y.start: update.A.start for update in updates}
    firsts = [sum(rows[:member]) for member in range(len(rows))]
    starts = torch.tensor([columns.get(first, 0) for first in firsts], dtype=torch.int32)
    return LowRank(lora_A.to(dtype), B.to(dtype), starts.to(lora_A.device))


def add_low_rank_reference(
    y: Tensor,  # (M, N) float32
    h: Tensor,  # (M, P)
    low_rank: LowRank,
    rows: Sequence[int],
) -> Tensor:  # (M, N) float32
    """Add h B^T, member by member."""
    R = low_rank.B.shape[1]
    parts = []
    for part, B, start in zip(
        y.split(list(rows), 1), low_rank.B.split(list(rows)), low_rank.starts.tolist(), strict=True
    ):
        parts.append(part + h[:, start : start + R].float() @ B.float().T)
    return torch.cat(parts, 1)
