"""kernels/fp8.py: scales bring the largest number to 448; who can multiply what."""

import pytest
import torch
from support.cases_8bit import midpoints
from support.equality import assert_equal

from kernels.fp8 import E4M3, LEAST_LARGEST, fp8_obstacle, scale_of, shape_obstacle


def test_the_largest_number_becomes_448_whatever_its_size() -> None:
    largest = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    largest *= 2.0 ** torch.arange(-90, 110).repeat(50)
    quotient = largest * scale_of(largest).reciprocal()
    # a few roundings away, where torch and a GPU both round to 448
    assert ((quotient / 448 - 1).abs() <= 4 * 2.0**-24).all()
    assert (quotient.to(E4M3).float() == 448).all()


def test_no_scale_and_no_inverse_leaves_the_normal_numbers() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal
    scales = scale_of(torch.tensor([0.0, 1e-45, LEAST_LARGEST, 3e38]))
    for numbers in (scales, scales.reciprocal()):
        assert torch.isfinite(numbers).all()
        assert (numbers >= tiny).all()
    assert scales[0] == scales[1] == scales[2]


def test_a_maximum_that_is_not_finite_has_a_nan_as_its_scale() -> None:
    scales = scale_of(torch.tensor([float("inf"), float("nan"), 448.0]))
    assert scales.isnan().tolist() == [True, True, False]
    assert scales[2] == 1


def test_torch_rounds_midpoints_to_even_subnormal_ones_too() -> None:
    codes = midpoints().to(E4M3).view(torch.uint8)
    below = torch.arange(126, dtype=torch.uint8)
    assert_equal(codes, below + below % 2)


@pytest.mark.parametrize(
    ("capability", "is_able"),
    [((7, 5), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 1), True)],
    ids=str,
)
def test_tensor_cores_know_e4m3_from_8_9_on(capability: tuple[int, int], is_able: bool) -> None:
    assert (fp8_obstacle(capability) == "") == is_able
    assert is_able or f"8.9 or later: this GPU has {capability}" in fp8_obstacle(capability)


def test_both_sizes_of_a_weight_are_multiples_of_16() -> None:
    assert shape_obstacle(48, 4096) == ""
    for shape in ((40, 4096), (4096, 40)):
        assert f"got {shape[0]} and {shape[1]}; multiply it in 16 bits" in shape_obstacle(*shape)
