"""kernels/checks.py: what fits passes, and what does not is refused by its name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.checks import (
    DTYPES,
    check_dtype,
    check_is,
    check_is_contiguous,
    check_like,
    check_not_recorded,
    check_one_device,
    check_rows_are_apart,
    check_rows_are_contiguous,
    check_seed,
)

MATRIX = torch.ones(3, 4)
META = MATRIX.to("meta")
LEARNT = torch.ones(3, 4, requires_grad=True)
# rows that begin before the row above ends, in either of two leading dimensions
OVERLAPPING = MATRIX.view(-1).as_strided((3, 4), (3, 1))
OVERLAPPING_BATCHES = torch.ones(100).as_strided((2, 3, 4), (2, 4, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_dtype("x", torch.float64), "^x must be bfloat16, float16 or float32: got"),
        (
            lambda: check_is("x", MATRIX, torch.float32, (4, 3)),
            r"^x must be torch.float32 of shape \(4, 3\): got torch.float32 \(3, 4\)$",
        ),
        (
            lambda: check_is("x", MATRIX, torch.float16, (3, 4)),
            r"^x must be torch.float16 of shape \(3, 4\): got torch.float32 \(3, 4\)$",
        ),
        (
            lambda: check_like("y", MATRIX[:2], "x", MATRIX),
            r"^y must have x's shape and dtype, \(3, 4\) and torch.float32: got \(2, 4\) and",
        ),
        (lambda: check_like("y", MATRIX.half(), "x", MATRIX), "^y must .* and torch.float16$"),
        (lambda: check_is_contiguous("x", MATRIX.T), r"^x must be contiguous: got strides \(1, 4"),
        (
            lambda: check_rows_are_contiguous("x", MATRIX.T),
            r"^x must have contiguous rows: got strides \(1, 4\)$",
        ),
        (lambda: check_rows_are_contiguous("q", MATRIX.T, "heads"), "^q must have contiguous head"),
        (
            lambda: check_rows_are_apart("x", OVERLAPPING),
            r"^x must have rows that do not overlap: got strides \(3, 1\)$",
        ),
        (lambda: check_rows_are_apart("x", OVERLAPPING_BATCHES), "^x must have rows that do not"),
        (lambda: check_rows_are_apart("x", MATRIX[:1].expand(3, 4)), "^x must have rows that do"),
        (
            lambda: check_one_device({"x": MATRIX, "y": MATRIX, "the weight": META}),
            "^x and the weight must be on one device: got cpu and meta$",
        ),
        (lambda: check_seed(torch.zeros(1)), r"^the seed must be one int64: got torch.float32 \(1"),
        (lambda: check_seed(torch.tensor(0)), r"^the seed must be one int64: got torch.int64 \(\)"),
        (
            lambda: check_not_recorded({"x": MATRIX, "y": LEARNT}, "glu_backward"),
            "^nothing is recorded for autograd: got y that requires .* and glu_backward for the",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_fits_passes() -> None:
    for dtype in DTYPES:
        check_dtype("x", dtype)
    check_is("x", MATRIX, torch.float32, (3, 4))
    check_like("y", META, "x", MATRIX)
    check_is_contiguous("x", MATRIX)
    check_one_device({"x": MATRIX, "y": MATRIX})
    check_seed(torch.zeros(1, dtype=torch.int64))
    # the first columns of a wider matrix, and rows of one value
    for rows in (MATRIX[:, :2], MATRIX[:, :1]):
        check_rows_are_contiguous("x", rows)
        check_rows_are_apart("x", rows)
    # a single row may have any stride
    check_rows_are_apart("x", MATRIX.as_strided((1, 4), (0, 1)))


@pytest.mark.parametrize("tensor", [MATRIX, LEARNT], ids=["frozen", "learnt"])
def test_nothing_would_be_recorded_without_gradients(tensor: Tensor) -> None:
    with torch.no_grad():
        check_not_recorded({"x": tensor}, "glu_backward")
    check_not_recorded({"x": tensor.detach()}, "glu_backward")
