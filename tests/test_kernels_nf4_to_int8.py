"""kernels/nf4_to_int8.py: equals the reference, interpreted and on a GPU; compiles where it is."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.ahead_of_time import compile_launch
from support.cases_8bit import TINY_8BIT_WEIGHTS
from support.equality import assert_equal
from support.interpreter import interpreted_results
from support.nf4_cases import WeightCase, random_weight, to_device
from torch import Tensor

from kernels import nf4_to_int8 as module
from kernels.fp8 import LEAST_LARGEST
from kernels.nf4_to_int8 import int8_scales, nf4_to_int8, nf4_to_int8_reference
from kernels.rotation import INT8, WIDTH, RotatedRows, empty_rotated_rows, rotated
from nf4.double_quant import QuantizedAbsmax
from nf4.weight import NF4Weight, dequantize, empty_weight, quantize

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


def expected(weight: NF4Weight) -> Tensor:
    return nf4_to_int8_reference(weight, int8_scales(weight))


@pytest.mark.parametrize("case", TINY_8BIT_WEIGHTS, ids=str)
def test_interpreted_kernel_equals_the_reference(case: WeightCase) -> None:
    found = interpreted_results("nf4_to_int8", "interpreted_8bit.py")[str(case)]
    assert_equal(found, expected(random_weight(case)))


@pytest.mark.parametrize("case", TINY_8BIT_WEIGHTS, ids=str)
def test_every_weight_errs_by_half_a_step_at_most(case: WeightCase) -> None:
    weight = random_weight(case)
    scales = int8_scales(weight)
    found = nf4_to_int8(weight, scales)
    assert found.scales is scales
    W = rotated(dequantize(weight, torch.float32)).double() / WIDTH
    steps = scales.double()[:, None]
    error = (found.values.double() * steps - W).abs()
    # a level's product with absmax, the sums of the rotation and the scale round too
    assert (error <= steps / 2 + 2.0**-20 * W.abs().amax(1, keepdim=True)).all()
    # the largest of a row, but for rows of zeros
    is_large = W.abs().amax(1) * WIDTH >= LEAST_LARGEST
    assert_equal(found.values.int().abs().amax(1), torch.where(is_large, 127, 0).int())


def test_a_product_needs_no_rotation_back() -> None:
    weight = random_weight(TINY_8BIT_WEIGHTS[4])
    W = dequantize(weight, torch.float32).double()
    x = torch.randn(5, W.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, scales = nf4_to_int8(weight, int8_scales(weight))
    y = rotated(x).double() @ values.double().T * scales.double()
    exact = x @ W.T
    assert (y - exact).norm() < 0.01 * exact.norm()


def test_rows_in_slices_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(TINY_8BIT_WEIGHTS[4])
    whole, scales = expected(weight), int8_scales(weight)
    # of 192 columns: two rows and a rest at once
    monkeypatch.setattr(module, "SLICE", 500)
    assert_equal(int8_scales(weight), scales)
    assert_equal(expected(weight), whole)


def test_a_weight_of_zeros_has_zeros_and_scales() -> None:
    weight = quantize(torch.zeros(16, 64))
    scales = int8_scales(weight)
    assert (scales > 0).all()
    assert not nf4_to_int8(weight, scales).values.any()


def test_a_negative_scale_of_a_block_counts_by_its_magnitude() -> None:
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight = quantize(matrix)
    assert isinstance(weight.absmax, QuantizedAbsmax)
    negative = replace(weight, absmax=replace(weight.absmax, mean=torch.tensor([-100.0])))
    scales = int8_scales(negative)
    W = rotated(dequantize(negative, torch.float32)) / WIDTH
    torch.testing.assert_close(scales, W.abs().amax(1) / 127)
    assert (nf4_to_int8(negative, scales).values.int().abs().amax(1) == 127).all()


WEIGHT = random_weight(TINY_8BIT_WEIGHTS[2])  # (64, 80)
SCALES = torch.ones(64)


@pytest.mark.parametrize(
    ("weight", "scales", "out", "message"),
    [
        (random_weight(WeightCase((16,), 72)), torch.ones(16), None, "got 16 and 72; multiply it"),
        (random_weight(WeightCase((16, 8), 64)), torch.ones(24), None, "got 8 and 64; multiply it"),
        (WEIGHT, torch.ones(63), None, r"the scales must be torch.float32 of shape \(64,\)"),
        (WEIGHT, SCALES.half(), None, "the scales must be torch.float32 .*: got torch.float16"),
        (WEIGHT, torch.ones(64, 2)[:, 0], None, "the scales must be contiguous"),
        (WEIGHT, SCALES, torch.zeros(80, 64).to(INT8), r"shape \(64, 80\): got .*\(80, 64\)"),
        (WEIGHT, SCALES, torch.zeros(64, 80), "out must be torch.int8"),
        (WEIGHT, SCALES, torch.zeros(80, 64).to(INT8).T, "out must be contiguous"),
        (WEIGHT, SCALES.to(META), None, "must be on one device: got cpu and meta"),
    ],
    ids=[
        "columns",
        "a member's rows",
        "scales",
        "scales' dtype",
        "scales' strides",
        "shape",
        "dtype",
        "strides",
        "device",
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    weight: NF4Weight, scales: Tensor, out: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        nf4_to_int8(weight, scales, out)


def test_scales_of_a_weight_that_cannot_be_rotated_are_refused() -> None:
    with pytest.raises(ValueError, match="got 16 and 72; multiply it in 16 bits"):
        int8_scales(random_weight(WeightCase((16,), 72)))


COMPILED = [
    WeightCase((14_336, 14_336), 4096),
    WeightCase((4096,), 14_336),
    WeightCase((4096,), 4096, 64, False),
]


@pytest.mark.parametrize("case", COMPILED, ids=str)
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_kernel_compiles_to_16_bytes_a_store_without_spilling(
    capability: int, case: WeightCase, record_property: Callable[[str, object], None]
) -> None:
    weight = empty_weight(case.rows, case.in_features, case.block_size, case.double_quant, META)
    out = empty_rotated_rows(weight.shape, META)
    compiled = compile_launch(
        module,
        "_nf4_to_int8_kernel",
        lambda: module._launch_nf4_to_int8(weight, out),
        capability,
    )
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    assert set(compiled.find(r"st\.global\.\S+")) == {"st.global.v4.b32"}
    # the 16 numbers that are mixed are a thread's own
    assert compiled.shared_bytes == 0
    assert not compiled.find(r"shfl\.sync")


GPU_WEIGHTS = [
    WeightCase((512, 128, 128), 1024),
    WeightCase((512, 128, 128), 1024, 64, False),
    WeightCase((208, 48), 1072),
    WeightCase((4096,), 4096),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*TINY_8BIT_WEIGHTS, *GPU_WEIGHTS], ids=str)
def test_gpu_kernel_equals_the_reference(case: WeightCase) -> None:
    weight = random_weight(case)
    on_gpu = to_device(weight, CUDA)
    scales = int8_scales(on_gpu)
    assert_equal(scales.cpu(), int8_scales(weight))
    assert_equal(nf4_to_int8(on_gpu, scales).values.cpu(), expected(weight))


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_kernel_reaches_beyond_int32() -> None:
    rows, in_features = (65_552, 16), 32_768
    assert sum(rows) * in_features > 2**31
    weight = empty_weight(rows, in_features, 64, True, CUDA)
    assert isinstance(weight.absmax, QuantizedAbsmax)
    weight.packed.random_(256)
    weight.absmax.codes.random_(256)
    weight.absmax.group_absmax.uniform_(0.1, 0.5)
    weight.absmax.mean.fill_(1)
    scales = int8_scales(weight)
    found = nf4_to_int8(weight, scales)
    assert isinstance(found, RotatedRows)
    assert torch.equal(found.values, nf4_to_int8_reference(weight, scales))
