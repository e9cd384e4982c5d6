"""The groups whose updates are written behind a weight: in the interpreter, on a CPU and a GPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.layer_cases import CPU, NUM_EXTRA, generator_of
from support.nf4_cases import INTERPRETED_DTYPES
from torch import Tensor

from kernels.lora_extension import Update

# of the weight and the corner, which stay as they are
UNTOUCHED = 7.0


def scaling_of(index: int) -> float:
    """Of the update at a place: no power of two, so one that is rounded twice shows."""
    return (10 + index) / 3


@dataclass(frozen=True)
class ExtensionCase:
    """A weight of several members, some of them with an update."""

    rows: tuple[int, ...]
    targets: tuple[int, ...]  # indices of the members that have an update
    in_features: int
    rank: int
    tail: int
    dtype: torch.dtype
    # part of wider rows
    is_strided: bool = False

    def __str__(self) -> str:
        rows = "+".join(
            f"{count}{'u' if index in self.targets else ''}"
            for index, count in enumerate(self.rows)
        )
        shape = f"N{rows}-K{self.in_features}-R{self.rank}-T{self.tail}-{str(self.dtype)[6:]}"
        return shape + "-strided" * self.is_strided

    @property
    def num_rows(self) -> int:
        return sum(self.rows)

    @property
    def updates(self) -> tuple[Update, ...]:
        found = []
        num_rows = 0
        for index, member in enumerate(self.targets):
            y = sum(self.rows[:member])
            count = self.rows[member]
            found.append(
                Update(
                    slice(y, y + count),
                    slice(index * self.rank, (index + 1) * self.rank),
                    slice(num_rows, num_rows + count),
                    scaling_of(index),
                )
            )
            num_rows += count
        return tuple(found)


Write = Callable[[Tensor, Tensor, Tensor, Tensor, tuple[Update, ...]], object]
Shape = tuple[tuple[int, ...], tuple[int, ...], int, int, int]  # all but the dtype


def extension_cases(shapes: list[Shape], dtypes: tuple[torch.dtype, ...]) -> list[ExtensionCase]:
    return [
        ExtensionCase(*shape, dtype, is_strided)
        for dtype in dtypes
        for shape in shapes
        for is_strided in (False, True)
    ]


# one value; a tail that is full, and one that is not; members without an update at both ends and in
# between; more rows than a program writes, and a row of A that two programs write; a wide tail
TINY_EXTENSIONS = extension_cases(
    [
        ((1,), (0,), 1, 1, 1),
        ((5, 3), (0, 1), 37, 2, 4),
        ((7, 2, 3), (0, 2), 48, 3, 64),
        ((2, 70, 5), (1,), 16, 5, 64),
        ((130,), (0,), 1030, 16, 16),
        ((3, 3), (1, 0), 8, 33, 70),
    ],
    INTERPRETED_DTYPES,
)


def extension_inputs(
    case: ExtensionCase, device: torch.device = CPU
) -> tuple[Tensor, Tensor, Tensor]:  # W_ext, lora_A, lora_B
    generator = generator_of(case)
    num_rows = sum(case.rows[member] for member in case.targets)
    num_ranks = case.rank * len(case.targets)
    lora_A = torch.randn(num_ranks, case.in_features, generator=generator)
    lora_B = torch.randn(num_rows, case.rank, generator=generator)
    shape = (case.num_rows + case.tail, case.in_features + case.tail + NUM_EXTRA * case.is_strided)
    wide = torch.full(shape, float("nan"), dtype=case.dtype, device=device)
    W_ext = wide[:, : case.in_features + case.tail]
    W_ext[: case.num_rows, : case.in_features] = UNTOUCHED
    W_ext[case.num_rows :, case.in_features :] = UNTOUCHED
    return W_ext, lora_A.to(device), lora_B.to(device)


def parts_of(W_ext: Tensor, case: ExtensionCase) -> tuple[Tensor, Tensor]:
    """View the rows below a weight and the columns behind it."""
    N, K = case.num_rows, case.in_features
    return W_ext[N:, :K], W_ext[:N, K:]


def extended(case: ExtensionCase, write: Write, device: torch.device = CPU) -> Tensor:
    """Write a case's updates, and see that nothing is written to what lies behind."""
    W_ext, lora_A, lora_B = extension_inputs(case, device)
    write(*parts_of(W_ext, case), lora_A, lora_B, case.updates)
    if case.is_strided:
        shape, offset = (W_ext.shape[0], NUM_EXTRA), W_ext.shape[1]
        assert W_ext.as_strided(shape, W_ext.stride(), offset).isnan().all()
    return W_ext.clone(memory_format=torch.contiguous_format)


def extended_by_hand(case: ExtensionCase) -> Tensor:
    """Build the same value by value, in float64."""
    W_ext, lora_A, lora_B = extension_inputs(case)
    N, K = case.num_rows, case.in_features
    expected = torch.zeros(W_ext.shape, dtype=torch.float64)
    expected[:N, :K] = UNTOUCHED
    expected[N:, K:] = UNTOUCHED
    B_row = 0
    for index, member in enumerate(case.targets):
        y_row = sum(case.rows[:member])
        scaling = torch.tensor(scaling_of(index), dtype=torch.float32).double()
        for row in range(case.rows[member]):
            for r in range(case.rank):
                column = K + index * case.rank + r
                # exact in float64, and rounded to float32 before it is rounded to its dtype
                expected[y_row + row, column] = (lora_B[B_row + row, r].double() * scaling).float()
        B_row += case.rows[member]
    for row in range(lora_A.shape[0]):
        expected[N + row, :K] = lora_A[row]
    return expected.to(case.dtype)
