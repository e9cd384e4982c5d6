"""nf4/double_quant.py: the map, the choice of a code, and how bitsandbytes' CPU backend differs."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from support.equality import assert_equal
from support.nf4_parity import MAP_MIDPOINTS, cpu_codes, cuda_codes, exact_scales, peer_result
from torch import Tensor

from nf4.double_quant import (
    DYNAMIC_MAP,
    GROUP_SIZE,
    UNSIGNED_DYNAMIC_MAP,
    QuantizedAbsmax,
    dequantize_absmax,
    quantize_absmax,
)

MAP_HASH = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
UNSIGNED_MAP_HASH = "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"


@pytest.mark.parametrize(
    ("levels", "expected"),
    [(DYNAMIC_MAP, MAP_HASH), (UNSIGNED_DYNAMIC_MAP, UNSIGNED_MAP_HASH)],
    ids=["signed", "unsigned"],
)
def test_map_hashes_to_the_published_one(levels: Tensor, expected: str) -> None:
    assert hashlib.sha256(levels.numpy().astype("<f4").tobytes()).hexdigest() == expected


def test_unsigned_map_has_254_magnitudes_and_zero_and_one() -> None:
    assert (UNSIGNED_DYNAMIC_MAP.diff() > 0).all()
    assert UNSIGNED_DYNAMIC_MAP[[0, 255]].tolist() == [0.0, 1.0]
    ends = torch.tensor([3.25e-7, 0.9895, 0.9964844])
    # published to this many digits
    assert ((UNSIGNED_DYNAMIC_MAP[[1, 253, 254]] / ends - 1).abs() < 1e-4).all()


def test_map_does_not_depend_on_the_cpu() -> None:
    # torch.linspace does: without AVX2 it rounds some edges twice
    script = (
        "import hashlib, torch; from nf4.double_quant import DYNAMIC_MAP;"
        "print(torch.backends.cpu.get_cpu_capability(),"
        "hashlib.sha256(DYNAMIC_MAP.numpy().tobytes()).hexdigest())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(ROOT)}
    output = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    assert output.split() == ["DEFAULT", MAP_HASH]


def test_map_has_127_magnitudes_of_either_sign_and_zero_and_one() -> None:
    assert (DYNAMIC_MAP.diff() > 0).all()
    assert_equal(-DYNAMIC_MAP[:127].flip(0), DYNAMIC_MAP[128:255])
    assert DYNAMIC_MAP[[127, 255]].tolist() == [0.0, 1.0]
    first = torch.tensor([5.5e-7, 3.25e-6, 7.75e-6, 2.125e-5, 4.375e-5, 6.625e-5, 8.875e-5])
    # published to this many digits
    assert ((DYNAMIC_MAP[128:135] / first - 1).abs() < 1e-6).all()


def test_code_is_the_nearest_and_a_tie_goes_to_the_even_index() -> None:
    ends = torch.tensor([-2.0, 2.0])
    for index, midpoint in enumerate(MAP_MIDPOINTS):
        below, above = torch.nextafter(midpoint, ends)
        even = index + index % 2
        for value, expected in ((below, index), (midpoint, even), (above, index + 1)):
            # two opposite pairs add up to zero in any order, and the largest magnitude is one:
            # what the search sees is the value itself
            scales = quantize_absmax(torch.stack((value, -value, ends[1] / 2, ends[0] / 2)))
            assert scales.mean.item() == 0
            assert scales.group_absmax.item() == 1
            assert scales.codes[0].item() == expected, f"{value.item()} beside midpoint {index}"


def test_codes_follow_the_search_of_the_cuda_kernel() -> None:
    scales = exact_scales()
    differing = 0
    for absmax in scales:
        quantized = quantize_absmax(absmax)
        groups = (absmax - absmax.mean()).view(-1, GROUP_SIZE)
        values = groups * groups.abs().amax(dim=1, keepdim=True).reciprocal()
        assert_equal(quantized.codes, cuda_codes(values).flatten())
        differing += int((quantized.codes != cpu_codes(values).flatten()).sum())
    assert differing > 0


def test_codes_differ_from_bitsandbytes_cpu_backend_in_a_known_number() -> None:
    # its CPU backend looks a value up in a table of 65,536 bins, so that a value next to a midpoint
    # takes the neighbour's code, and an exact zero takes index 131 instead of 127
    num_codes = num_neighbours = num_zeros = 0
    for index, absmax in enumerate(exact_scales()):
        ours = quantize_absmax(absmax).codes.int()
        theirs = peer_result(f"scales/{index}").int()
        is_zero = absmax == 0.5
        assert (ours[is_zero] == 127).all()
        assert (theirs[is_zero] == 131).all()
        differing = (ours != theirs) & ~is_zero
        assert ((ours - theirs)[differing].abs() == 1).all()
        num_codes += absmax.numel()
        num_neighbours += int(differing.sum())
        num_zeros += int(is_zero.sum())
    assert (num_codes, num_neighbours, num_zeros) == (262_144, 285, 116)


def test_group_without_spread_decodes_to_the_mean() -> None:
    for num_blocks in (1, 255, 256, 300):
        absmax = torch.full((num_blocks,), 0.25)
        quantized = quantize_absmax(absmax)
        assert not quantized.codes.any()
        assert not quantized.group_absmax.any()
        assert_equal(dequantize_absmax(quantized), absmax)


def test_last_group_is_scaled_by_its_own_scales_only() -> None:
    absmax = torch.cat((torch.full((256,), 2.0), torch.full((256,), 4.0), torch.tensor([3.5])))
    absmax[-1] = 3.0
    quantized = quantize_absmax(absmax)
    assert quantized.mean.item() == 3
    assert quantized.group_absmax.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("num_blocks", [1, 255, 256, 257, 1000])
def test_scales_decode_with_two_roundings(num_blocks: int) -> None:
    quantized = QuantizedAbsmax(
        torch.randint(256, (num_blocks,), dtype=torch.uint8),
        torch.rand(-(-num_blocks // GROUP_SIZE)),
        torch.rand(1) + 1,
    )
    group = torch.arange(num_blocks) // GROUP_SIZE
    # exact in float64, so that each rounding is one conversion
    products = DYNAMIC_MAP[quantized.codes.long()].double() * quantized.group_absmax[group].double()
    expected = (products.float().double() + quantized.mean.double()).float()
    assert_equal(dequantize_absmax(quantized), expected)


def test_decoded_scale_errs_by_half_a_cell_at_most() -> None:
    absmax = torch.rand(10_000) + 1
    quantized = quantize_absmax(absmax)
    group_absmax = quantized.group_absmax.repeat_interleave(GROUP_SIZE)[:10_000]
    # the widest gap of the map is the one in the middle of -0.99296874 and the ends of [-1, 1]
    widest = max(DYNAMIC_MAP.diff().max() / 2, 1 + DYNAMIC_MAP[0])
    error = (dequantize_absmax(quantized) - absmax).abs()
    # the mean and the scale are rounded once each
    assert (error <= widest * group_absmax + 2 * 2 * torch.finfo(torch.float32).eps).all()
