"""How two tensors are compared: exactly, within a bound, or with plain torch in the same dtype."""

import torch
from torch import Tensor


def assert_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Both tensors hold the same finite numbers, in the same shape and dtype."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert torch.isfinite(expected).all(), f"{what}: the expected values are not finite"
    differing = int((actual != expected).sum())
    assert differing == 0, f"{what}: {differing} of {actual.numel()} values differ"


def assert_summed_in_float32(
    actual: Tensor, truth: Tensor, magnitudes: Tensor, num_terms: int, what: str = ""
) -> None:
    """Each sum of products errs by what float32 may round, in whatever order, and rounds once.

    A product and a partial sum of n terms round by half an eps each, so n eps times the sum of the
    terms' magnitudes bounds the sum's error; then it is rounded to its dtype.

    Args:
        truth: in float64.
        magnitudes: the same sums of the terms' absolute values, in float64.
    """
    assert actual.shape == truth.shape, f"{what}: {actual.shape}, {truth.shape}"
    assert truth.dtype == torch.float64, f"{what}: the truth is {truth.dtype}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    assert torch.isfinite(truth).all(), f"{what}: the truth is not finite"
    bound = num_terms * torch.finfo(torch.float32).eps * magnitudes
    bound += torch.finfo(actual.dtype).eps / 2 * (truth.abs() + bound)
    excess = ((actual.double() - truth).abs() - bound).max()
    assert excess <= 0, f"{what}: the error exceeds its bound by {excess:.3e}"


def assert_no_worse_than(
    actual: Tensor,
    baseline: Tensor,
    truth: Tensor,
    factor: float = 2.0,
    what: str = "",
    allowance: float = 0.0,
) -> None:
    """`actual` errs at most `factor` times as much as `baseline`, plain torch in the same dtype.

    One unit in the last place of the largest value is allowed on top: a baseline may be exact.

    Args:
        truth: in float64.
        allowance: what its algorithm may err by beyond that, derived where it is given.
    """
    _check_comparable(actual, baseline, truth, what)
    error = (actual.double() - truth).abs().max()
    floor = (baseline.double() - truth).abs().max()
    slack = torch.finfo(actual.dtype).eps * truth.abs().max() + allowance
    assert error <= factor * floor + slack, f"{what}: error {error:.3e}, torch {floor:.3e}"


def assert_no_worse_on_the_whole_than(
    actual: Tensor, baseline: Tensor, truth: Tensor, factor: float = 2.0, what: str = ""
) -> None:
    """The root mean square error of `actual` is at most `factor` times that of `baseline`.

    For what a whole network computes. There each element's error is a sum of hundreds of roundings,
    random on both sides, and the largest of a tensor's is luck: of 174 tensors on a GPU plain
    torch itself had one whose largest error was 2.1 times that on the CPU. Root mean squares of
    the same tensors differed by at most 1.3 there.

    Args:
        truth: in float64.
    """
    _check_comparable(actual, baseline, truth, what)
    error = (actual.double() - truth).square().mean().sqrt()
    floor = (baseline.double() - truth).square().mean().sqrt()
    assert error <= factor * floor, f"{what}: error {error:.3e}, torch {floor:.3e}"


def _check_comparable(actual: Tensor, baseline: Tensor, truth: Tensor, what: str) -> None:
    assert actual.shape == baseline.shape == truth.shape, f"{what}: {actual.shape}, {truth.shape}"
    assert actual.dtype == baseline.dtype, f"{what}: {actual.dtype}, {baseline.dtype}"
    assert truth.dtype == torch.float64, f"{what}: the truth is {truth.dtype}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    assert torch.isfinite(truth).all(), f"{what}: the truth is not finite"
