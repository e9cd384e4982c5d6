"""lora/stacked_layout.py: matrices and biases of a stack, to rows and back."""

import pytest
import torch
from support.equality import assert_equal

from lora.stacked_layout import BY_ROWS, StackedLayout

# rows 0 to 3 of three columns: row r has 10 r, 10 r + 1 and 10 r + 2
ROWS = 10 * torch.arange(4)[:, None] + torch.arange(3)
LAYOUTS = [
    (BY_ROWS, ROWS),
    (StackedLayout(is_transposed=True), ROWS.T),
    # first row, third, second, fourth: gate and up in turn
    (StackedLayout(num_in_turn=2), ROWS[[0, 2, 1, 3]]),
    (StackedLayout(is_transposed=True, num_in_turn=2), ROWS[[0, 2, 1, 3]].T),
]


@pytest.mark.parametrize(("layout", "stored"), LAYOUTS, ids=str)
def test_a_stored_matrix_has_its_rows(layout: StackedLayout, stored: torch.Tensor) -> None:
    stored = stored.contiguous()
    assert layout.shape(4, 3) == tuple(stored.shape)
    rows = layout.in_rows(stored)
    assert rows.is_contiguous()
    assert_equal(rows, ROWS)
    back = layout.as_stored(ROWS)
    assert back.is_contiguous()
    assert_equal(back, stored)


@pytest.mark.parametrize(("layout", "stored"), LAYOUTS, ids=str)
def test_a_bias_has_the_order_of_the_rows(layout: StackedLayout, stored: torch.Tensor) -> None:
    bias = stored[0] if layout.is_transposed else stored[:, 0]
    assert_equal(layout.in_rows(bias), ROWS[:, 0].contiguous())
    assert_equal(layout.as_stored(ROWS[:, 0]), bias.contiguous())


def test_only_rows_alone_lie_as_a_group_has_them() -> None:
    assert [layout.is_by_rows for layout, _ in LAYOUTS] == [True, False, False, False]
