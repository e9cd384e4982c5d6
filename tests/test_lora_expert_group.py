"""lora/expert_group.py: the products of all experts' rows, whatever is expanded at a time."""

from itertools import pairwise

import pytest
import torch
from support.equality import assert_equal
from torch import Tensor

import lora.expert_group
from lora.expert_group import ExpertGroup
from nf4.weight import NF4Weight, Quantization, dequantize

CPU = torch.device("cpu")
NUM_EXPERTS, ROWS, COLUMNS = 5, 24, 33
# experts without rows at both ends and between
OFFSETS = torch.tensor([0, 0, 7, 7, 12, 12], dtype=torch.int32)
ALL_IN_ONE = torch.tensor([0, 0, 0, 12, 12, 12], dtype=torch.int32)
STORED: dict[str, Quantization | torch.dtype] = {
    "nf4-dq": Quantization(64, True),
    "nf4": Quantization(32, False),
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


def make_group(stored: str, is_stacked: bool = False) -> ExpertGroup:
    """Two matrices of each expert, or one tensor for all, filled with random numbers."""
    if is_stacked:
        names, rows = ("gate_up_proj",), (ROWS,)
    else:
        names = tuple(f"{e}.{name}" for e in range(NUM_EXPERTS) for name in ("gate", "up"))
        rows = (ROWS // 2,) * len(names)
    num_stacked = NUM_EXPERTS if is_stacked else None
    group = ExpertGroup(names, rows, COLUMNS, NUM_EXPERTS, num_stacked)
    form = STORED[stored]
    is_quantized = isinstance(form, Quantization)
    group.allocate(CPU, None if is_quantized else form, None, form if is_quantized else None)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(NUM_EXPERTS * ROWS, COLUMNS, generator=generator)
    for name, place in zip(group.names, group.row_slices(), strict=True):
        tensor = drawn[place].view(group.shapes()[name])
        home = group.home(f"{name}.weight")
        if home is None:
            matrices = tensor if is_stacked else (tensor,)
            assert group.place(f"{name}.weight", matrices, name).isfinite().all()
        else:
            home.copy_(tensor)
    return group


def matrices_of(group: ExpertGroup) -> Tensor:  # (E, N, K)
    weight = group.weight
    if isinstance(weight, NF4Weight):
        weight = dequantize(weight, torch.float32)
    return weight.float().view(NUM_EXPERTS, ROWS, COLUMNS)


@pytest.mark.parametrize("offsets", [OFFSETS, ALL_IN_ONE], ids=["some", "all in one"])
@pytest.mark.parametrize("num_together", [1, 2, 5])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("is_stacked", [False, True], ids=["", "stacked"])
def test_each_row_is_multiplied_by_its_experts_matrices(
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    is_stacked: bool,
    num_together: int,
    offsets: Tensor,
) -> None:
    group = make_group(stored, is_stacked)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, COLUMNS, generator=generator)
    grad_y = torch.randn(12, ROWS, generator=generator)
    whole = group.forward(x, offsets), group.backward(grad_y, offsets)
    # one expert more would be one byte too many
    limit = 4 * ROWS * COLUMNS * (num_together + 1) - 1
    monkeypatch.setattr(lora.expert_group, "EXPANDED_BYTES", limit)
    assert group.expanded_shape(torch.float32) == (num_together, ROWS, COLUMNS)
    chunked = group.forward(x, offsets), group.backward(grad_y, offsets)
    matrices = matrices_of(group)
    for actual, expected in zip(chunked, whole, strict=True):
        assert_equal(actual, expected)
    for expert, (start, stop) in enumerate(pairwise(offsets.tolist())):
        rows = slice(start, stop)
        W = matrices[expert].double()
        for actual, truth in (
            (chunked[0][rows], x[rows].double() @ W.T),
            (chunked[1][rows], grad_y[rows].double() @ W),
        ):
            # float32 sums of at most 33 terms of order one
            assert torch.allclose(actual.double(), truth, rtol=0, atol=33 * 2**-22)


@pytest.mark.parametrize("num_together", [1, 3])
@pytest.mark.parametrize("stored", STORED)
def test_no_more_is_expanded_at_a_time_than_is_allowed(
    monkeypatch: pytest.MonkeyPatch, stored: str, num_together: int
) -> None:
    group = make_group(stored)
    limit = 4 * ROWS * COLUMNS * num_together
    monkeypatch.setattr(lora.expert_group, "EXPANDED_BYTES", limit)
    shapes = [(first, W.shape[0]) for first, W in group._expanded(torch.float32)]
    assert sum(count for _, count in shapes) == NUM_EXPERTS
    if stored == "float32":
        # nothing is expanded
        assert shapes == [(0, NUM_EXPERTS)]
    else:
        assert [first for first, _ in shapes] == list(range(0, NUM_EXPERTS, num_together))


@pytest.mark.parametrize("stored", STORED)
def test_weights_that_stay_expanded_give_the_same_numbers(stored: str) -> None:
    group = make_group(stored)
    x = torch.randn(12, COLUMNS, generator=torch.Generator().manual_seed(1))
    expected = group.forward(x, OFFSETS)
    group.keep_expanded(torch.float32)
    assert group.expanded is not None
    assert_equal(group.forward(x, OFFSETS), expected)
    # nothing is expanded again
    ((first, W),) = group._expanded(torch.float32)
    assert (first, W.data_ptr()) == (0, group.expanded.data_ptr())


def test_experts_are_counted_as_their_numbers() -> None:
    for is_stacked in (False, True):
        group = make_group("nf4", is_stacked)
        assert group.num_frozen == NUM_EXPERTS * ROWS * COLUMNS
        assert group.rows_of_one == ROWS
        assert sum(t.nbytes for t in group.frozen_tensors()) < group.num_frozen
