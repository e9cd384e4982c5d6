"""kernels/nf4_to_fp8.py: equals the reference, interpreted and on a GPU; compiles where it runs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.ahead_of_time import compile_launch
from support.cases_8bit import TINY_8BIT_WEIGHTS
from support.equality import assert_equal
from support.interpreter import interpreted_results
from support.nf4_cases import WeightCase, random_matrices, random_weight, to_device
from torch import Tensor

from kernels import nf4_to_fp8 as module
from kernels.device import H200, meta_stands_for
from kernels.fp8 import E4M3, LEAST_LARGEST
from kernels.nf4_to_fp8 import fp8_scale, nf4_to_fp8, nf4_to_fp8_reference
from nf4.double_quant import QuantizedAbsmax
from nf4.weight import NF4Weight, dequantize, empty_weight, quantize

CUDA, META = torch.device("cuda"), torch.device("meta")
WAYS = pytest.mark.parametrize("is_transposed", [False, True], ids=["as-it-is", "transposed"])


def expected(weight: NF4Weight, is_transposed: bool) -> Tensor:
    values = nf4_to_fp8_reference(weight, fp8_scale(weight))
    return values.T.contiguous() if is_transposed else values


def assert_equal_values(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype == E4M3
    assert_equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))


@WAYS
@pytest.mark.parametrize("case", TINY_8BIT_WEIGHTS, ids=str)
def test_interpreted_kernel_equals_the_reference(case: WeightCase, is_transposed: bool) -> None:
    results = interpreted_results("nf4_to_fp8", "interpreted_8bit.py")
    found = results[f"{case}-{is_transposed}"].view(E4M3)
    assert_equal_values(found, expected(random_weight(case), is_transposed))


@WAYS
@pytest.mark.parametrize("case", TINY_8BIT_WEIGHTS, ids=str)
def test_every_weight_errs_by_a_sixteenth_at_most(case: WeightCase, is_transposed: bool) -> None:
    weight = random_weight(case)
    scale = fp8_scale(weight)
    found = nf4_to_fp8(weight, scale, is_transposed)
    assert found.scale is scale
    values = found.values.T if is_transposed else found.values
    W = dequantize(weight, torch.float32).double()
    error = (values.double() * scale.double() - W).abs()
    # half of a step of 3 bits, or of the subnormal numbers' step of 2^-9
    bound = torch.maximum(W.abs() / 16, scale.double() * 2.0**-10)
    assert (error <= bound * (1 + 1e-6)).all()
    # the block with the largest absmax holds a weight of that magnitude
    assert values.float().abs().max() == 448


def test_a_weight_of_zeros_has_zeros_and_a_scale() -> None:
    weight = quantize(torch.zeros(16, 64))
    scale = fp8_scale(weight)
    assert scale == torch.tensor(LEAST_LARGEST) / 448
    assert not nf4_to_fp8(weight, scale).values.float().any()


def test_an_outlier_keeps_its_value_and_the_rest_its_octaves() -> None:
    matrix = next(random_matrices(WeightCase((16,), 64))).clamp(-3, 3)
    matrix[3, 5] = 2000
    weight = quantize(matrix, double_quant=False)
    scale = fp8_scale(weight)
    W8 = nf4_to_fp8(weight, scale).values.double() * scale.double()
    W = dequantize(weight, torch.float32).double()
    assert W[3, 5] == 2000
    # the scale rounds twice
    assert abs(W8[3, 5] - 2000) <= 2000 * 2.0**-23
    # the others are normal numbers of E4M3, or err by less than the largest of them
    assert (W8 - W)[W.abs() <= 3].abs().max() <= 3 / 16
    assert W8[7].any()


def test_a_negative_scale_of_a_block_counts_by_its_magnitude() -> None:
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight = quantize(matrix)
    assert isinstance(weight.absmax, QuantizedAbsmax)
    negative = replace(weight, absmax=replace(weight.absmax, mean=torch.tensor([-100.0])))
    scale = fp8_scale(negative)
    largest = dequantize(negative, torch.float32).abs().max()
    assert largest > 90
    assert scale == largest * (1 / 448)
    assert nf4_to_fp8(negative, scale).values.float().abs().max() == 448


WEIGHT = random_weight(TINY_8BIT_WEIGHTS[2])  # (64, 80)
ONE = torch.ones(())


@pytest.mark.parametrize(
    ("weight", "scale", "is_transposed", "out", "message"),
    [
        (random_weight(WeightCase((16,), 72)), ONE, False, None, "got 16 and 72; multiply it in"),
        (random_weight(WeightCase((16, 8), 64)), ONE, False, None, "got 8 and 64; multiply it in"),
        (WEIGHT, torch.ones(1), False, None, r"the scale must be torch.float32 of shape \(\)"),
        (WEIGHT, ONE, True, torch.zeros(64, 80).to(E4M3), r"shape \(80, 64\): got .*\(64, 80\)"),
        (WEIGHT, ONE, False, torch.zeros(64, 80), "out must be torch.float8_e4m3fn"),
        (WEIGHT, ONE, False, torch.zeros(80, 64).to(E4M3).T, "out must be contiguous"),
        (WEIGHT, ONE.to(META), False, None, "must be on one device: got cpu and meta"),
    ],
    ids=["columns", "a member's rows", "scale", "shape", "dtype", "strides", "device"],
)
def test_arguments_that_do_not_fit_are_refused(
    weight: NF4Weight, scale: Tensor, is_transposed: bool, out: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        nf4_to_fp8(weight, scale, is_transposed, out)


def meta_weight(case: WeightCase) -> tuple[NF4Weight, Tensor]:
    weight = empty_weight(case.rows, case.in_features, case.block_size, case.double_quant, META)
    return weight, torch.empty((), device=META)


def test_a_gpu_without_e4m3_is_refused() -> None:
    weight, scale = meta_weight(WeightCase((64,), 64))
    with (
        meta_stands_for(H200._replace(capability=(8, 6))),
        pytest.raises(RuntimeError, match=r"8\.9 or later: this GPU has \(8, 6\)"),
    ):
        nf4_to_fp8(weight, scale)


COMPILED = [
    WeightCase((4096, 1024, 1024), 4096),
    WeightCase((4096,), 14_336),
    WeightCase((4096,), 4096, 64, False),
]


@WAYS
@pytest.mark.parametrize("case", COMPILED, ids=str)
@pytest.mark.parametrize("capability", [89, 90, 100, 120])
def test_kernel_compiles_to_16_bytes_a_store_without_spilling(
    capability: int,
    case: WeightCase,
    is_transposed: bool,
    record_property: Callable[[str, object], None],
) -> None:
    weight, scale = meta_weight(case)
    shape = weight.shape[::-1] if is_transposed else weight.shape
    out = torch.empty(shape, dtype=E4M3, device=META)
    compiled = compile_launch(
        module,
        "_nf4_to_fp8_transposed_kernel" if is_transposed else "_nf4_to_fp8_kernel",
        lambda: module._launch_nf4_to_fp8(weight, scale, out, is_transposed),
        capability,
    )
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    assert set(compiled.find(r"st\.global\.\S+")) == {"st.global.v4.b32"}
    # a GPU's own conversion, of two numbers at once: 64 of a thread
    assert len(compiled.find(r"cvt\.rn\.satfinite\.e4m3x2")) == 32
    # values change places, bytes of four to 4 KB; as they are, they go past shared memory
    assert compiled.shared_bytes == 4096 * is_transposed


GPU_WEIGHTS = [
    WeightCase((512, 128, 128), 1024),
    WeightCase((512, 128, 128), 1024, 64, False),
    WeightCase((208, 48), 1072),
    WeightCase((4096,), 4096),
]


@pytest.mark.gpu
@WAYS
@pytest.mark.parametrize("case", [*TINY_8BIT_WEIGHTS, *GPU_WEIGHTS], ids=str)
def test_gpu_kernel_equals_the_reference(case: WeightCase, is_transposed: bool) -> None:
    weight = random_weight(case)
    on_gpu = to_device(weight, CUDA)
    scale = fp8_scale(on_gpu)
    assert_equal(scale.cpu(), fp8_scale(weight))
    found: Any = nf4_to_fp8(on_gpu, scale, is_transposed)
    assert_equal_values(found.values, expected(weight, is_transposed))


@pytest.mark.gpu
@pytest.mark.slow
@WAYS
def test_gpu_kernel_reaches_beyond_int32(is_transposed: bool) -> None:
    rows, in_features = (65_552, 16), 32_768
    assert sum(rows) * in_features > 2**31
    weight = empty_weight(rows, in_features, 64, True, CUDA)
    assert isinstance(weight.absmax, QuantizedAbsmax)
    weight.packed.random_(256)
    weight.absmax.codes.random_(256)
    weight.absmax.group_absmax.uniform_(0.1, 0.5)
    weight.absmax.mean.fill_(1)
    scale = fp8_scale(weight)
    values = nf4_to_fp8_reference(weight, scale)
    found = nf4_to_fp8(weight, scale, is_transposed).values
    found = found.T if is_transposed else found
    assert torch.equal(found.view(torch.uint8), values.view(torch.uint8))
