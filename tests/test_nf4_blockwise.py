"""nf4/blockwise.py: codes, scales and packing, case by case (test_nf4_weight: bitsandbytes')."""

import math

import pytest
import torch
from support.equality import assert_equal
from support.nf4_parity import midpoint_weight, unpack

from nf4 import blockwise
from nf4.blockwise import BLOCK_SIZES, dequantize_blockwise, quantize_blockwise
from nf4.levels import LEVELS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# mean and deviation of the mean absolute error of 1024 x 1024 normal weights over 200 runs, from
# bitsandbytes' tests
ERROR_OF_NORMAL_WEIGHTS = {
    32: (0.067746, 0.000069),
    64: (0.072798, 0.000074),
    128: (0.076831, 0.000091),
    256: (0.080337, 0.000102),
    512: (0.083547, 0.000143),
    1024: (0.086610, 0.000187),
    2048: (0.089592, 0.000251),
    4096: (0.092547, 0.000360),
}


def test_levels_encode_to_their_own_codes() -> None:
    packed, absmax = quantize_blockwise(LEVELS.repeat(2), 32)
    assert unpack(packed, 32).tolist() == [*range(16), *range(16)]
    assert absmax.tolist() == [1.0]


def test_even_element_lies_in_the_high_nibble() -> None:
    packed, _ = quantize_blockwise(torch.tensor([1.0, -1.0]), 32)
    assert packed.tolist() == [0xF0]


def test_missing_last_element_counts_as_zero() -> None:
    packed, _ = quantize_blockwise(torch.tensor([-1.0, 1.0, -1.0]), 32)
    assert packed.tolist() == [0x0F, 0x07]


def test_value_on_a_midpoint_takes_the_lower_code() -> None:
    packed, _ = quantize_blockwise(midpoint_weight(), 32)
    codes = unpack(packed, 8 * 4096).view(1024, 32).long()
    # one, the 15 midpoints, the numbers above the first 8, the numbers below the last 8
    expected = torch.tensor([15, *range(15), *range(1, 9), *range(7, 15)])
    assert_equal(codes, expected.expand(1024, 32))


@pytest.mark.parametrize("num_elements", [32, 64, 17, 1], ids="{} weights".format)
def test_zero_block_survives_round_trip(num_elements: int) -> None:
    zeros = torch.zeros(num_elements)
    packed, absmax = quantize_blockwise(zeros, 32)
    assert set(packed.tolist()) == {0x77}
    assert_equal(absmax, torch.zeros(math.ceil(num_elements / 32)))
    assert_equal(dequantize_blockwise(packed, absmax, 32, num_elements, torch.float32), zeros)


def test_outlier_is_exact_and_flattens_its_own_block_only() -> None:
    weight = torch.full((3, 64), 0.5)
    weight[1, 9] = -1000
    packed, absmax = quantize_blockwise(weight, 64)
    assert absmax.tolist() == [0.5, 1000.0, 0.5]
    expanded = dequantize_blockwise(packed, absmax, 64, 192, torch.float32).view(3, 64)
    expected = torch.full((3, 64), 0.5)
    expected[1] = 0
    expected[1, 9] = -1000
    assert_equal(expanded, expected)


def test_scale_without_a_finite_reciprocal_gives_finite_weights() -> None:
    smallest = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    weight = torch.tensor([smallest, -smallest, 0.0])
    packed, absmax = quantize_blockwise(weight, 32)
    assert absmax.item() == smallest
    expanded = dequantize_blockwise(packed, absmax, 32, 3, torch.float32)
    assert_equal(expanded, torch.zeros(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids="block{}".format)
def test_no_other_level_is_nearer(block_size: int, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 3001).to(dtype)
    packed, absmax = quantize_blockwise(weight, block_size)
    num_elements = weight.numel()
    scale = absmax.double().repeat_interleave(block_size)[:num_elements]
    distances = (weight.double().flatten() / scale)[:, None] - LEVELS.double()
    chosen = distances.gather(1, unpack(packed, num_elements).long()[:, None]).abs()
    # a quotient rounded twice and a rounded midpoint move a tie by this much
    assert (chosen[:, 0] <= distances.abs().amin(dim=1) + 4 * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids="block{}".format)
def test_error_of_normal_weights_is_the_published_one(block_size: int) -> None:
    weight = torch.randn(1024 * 1024)
    packed, absmax = quantize_blockwise(weight, block_size)
    expanded = dequantize_blockwise(packed, absmax, block_size, weight.numel(), torch.float32)
    mean, deviation = ERROR_OF_NORMAL_WEIGHTS[block_size]
    assert abs((expanded - weight).abs().mean().item() - mean) < 7 * deviation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids="block{}".format)
def test_quantizing_again_changes_nothing(block_size: int, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 1111).to(dtype)
    weight[3] = 0
    packed, absmax = quantize_blockwise(weight, block_size)
    expanded = dequantize_blockwise(packed, absmax, block_size, weight.numel(), dtype)
    packed_again, absmax_again = quantize_blockwise(expanded, block_size)
    assert_equal(packed_again, packed)
    assert_equal(absmax_again, absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_weights_are_one_product_rounded_once(dtype: torch.dtype) -> None:
    packed = torch.randint(256, (250,), dtype=torch.uint8)
    absmax = torch.rand(8) + 0.1
    products = LEVELS[unpack(packed, 499).long()] * absmax.repeat_interleave(64)[:499]
    assert_equal(dequantize_blockwise(packed, absmax, 64, 499, dtype), products.to(dtype))


@pytest.mark.parametrize("num_elements", [4096 * 3, 4096 * 2 + 1, 4096 * 2 + 77, 4095])
def test_slices_add_up_to_the_whole(num_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(num_elements)
    packed, absmax = quantize_blockwise(weight, 32)
    expanded = dequantize_blockwise(packed, absmax, 32, num_elements, torch.bfloat16)
    monkeypatch.setattr(blockwise, "_SLICE", 4096)
    sliced_packed, sliced_absmax = quantize_blockwise(weight, 32)
    assert_equal(sliced_packed, packed)
    assert_equal(sliced_absmax, absmax)
    sliced = dequantize_blockwise(packed, absmax, 32, num_elements, torch.bfloat16)
    assert_equal(sliced, expanded)


def test_layout_in_memory_does_not_matter() -> None:
    weight = torch.randn(65, 33).T
    assert not weight.is_contiguous()
    for actual, expected in zip(
        quantize_blockwise(weight, 64), quantize_blockwise(weight.contiguous(), 64), strict=True
    ):
        assert_equal(actual, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_non_finite_weight_makes_its_scale_non_finite(value: float) -> None:
    weight = torch.randn(128)
    weight[70] = value
    _, absmax = quantize_blockwise(weight, 64)
    assert torch.isfinite(absmax).tolist() == [True, False]


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192, -64], ids=str)
def test_other_block_size_is_refused(block_size: int) -> None:
    message = rf"block_size must be one of \(32, .*4096\): got {block_size}$"
    with pytest.raises(ValueError, match=message):
        quantize_blockwise(torch.ones(4), block_size)
    with pytest.raises(ValueError, match=message):
        dequantize_blockwise(torch.ones(4), torch.ones(1), block_size, 8, torch.float32)


@pytest.mark.parametrize(
    ("weight", "came"),
    [
        (torch.ones(2, 3, dtype=torch.float64), "torch.float64 with shape (2, 3)"),
        (torch.ones(4, dtype=torch.int8), "torch.int8 with shape (4,)"),
        (torch.ones(0, 7), "torch.float32 with shape (0, 7)"),
    ],
    ids=["float64", "int8", "empty"],
)
def test_tensor_that_cannot_be_quantized_is_refused(weight: torch.Tensor, came: str) -> None:
    with pytest.raises(ValueError, match=r"^up_proj must be a non-empty float32, float16 or") as e:
        quantize_blockwise(weight, 64, "up_proj")
    assert str(e.value).endswith(f"got {came}")


@pytest.mark.parametrize(("num_bytes", "num_scales"), [(49, 2), (50, 1), (50, 3), (51, 2)])
def test_buffers_of_another_size_are_refused(num_bytes: int, num_scales: int) -> None:
    packed, absmax = torch.zeros(num_bytes, dtype=torch.uint8), torch.ones(num_scales)
    message = f"99 weights in blocks of 64 need 50 bytes and 2 scales: got {num_bytes} and"
    with pytest.raises(ValueError, match=message):
        dequantize_blockwise(packed, absmax, 64, 99, torch.float32)
