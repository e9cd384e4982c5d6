"""kernels/nf4_matmul.py: right to the rounding, interpreted and on a GPU; compiles for four."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from ahead_of_time import CompiledLaunch, compile_launch
from equality import assert_equal, assert_no_worse_than, assert_summed_in_float32
from interpreter import interpreted_results
from nf4_cases import (
    TINY_PRODUCTS,
    ProductCase,
    WeightCase,
    random_rows,
    random_weight,
    to_device,
)
from torch import Tensor

from kernels import nf4_matmul as module
from kernels.nf4_matmul import FUSED_MAX_ROWS, matmul_path, nf4_matmul, nf4_matmul_transposed
from nf4.weight import NF4Weight, dequantize, empty_weight, quantize

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")

# multiples of 16 everywhere; of nothing, in three members; one of everything
COMPILED_WEIGHTS = [
    WeightCase((128,), 192, double_quant=True),
    WeightCase((128,), 192, double_quant=False),
    WeightCase((33, 31, 7), 193, 32, double_quant=True),
    WeightCase((1,), 1, 4096, double_quant=False),
]
GPU_PRODUCTS = [
    ProductCase(weight, num_rows, dtype, transposed)
    for weight, dtype, transposed, num_rows in product(
        [
            WeightCase((512, 256, 256), 1024),
            WeightCase((33, 31, 7), 193, 32),
            WeightCase((257,), 1031, double_quant=False),
            WeightCase((1030,), 1376, 4096),
        ],
        DTYPES,
        (False, True),
        (1, 3, 16, 17, 64, 300),
    )
]


def multiply(x: Tensor, weight: NF4Weight, transposed: bool) -> Tensor:
    return (nf4_matmul_transposed if transposed else nf4_matmul)(x, weight)


def dense(x: Tensor, matrix: Tensor, transposed: bool) -> Tensor:
    return x @ matrix if transposed else x @ matrix.T


def assert_product_is_right(actual: Tensor, case: ProductCase, device: torch.device) -> None:
    """A float32 product is summed in float32, a 16-bit one errs at most twice as much as torch's.

    Of float32 products torch's is no measure: it may happen to sum in a luckier order.
    """
    x, matrix = random_rows(case), dequantize(random_weight(case.weight), case.dtype)
    truth = dense(x.double(), matrix.double(), case.transposed)
    assert actual.dtype == case.dtype
    if case.dtype == torch.float32:
        magnitudes = dense(x.double().abs(), matrix.double().abs(), case.transposed)
        assert_summed_in_float32(actual.cpu(), truth, magnitudes, x.shape[1], str(case))
    else:
        baseline = dense(x.to(device), matrix.to(device), case.transposed).cpu()
        assert_no_worse_than(actual.cpu(), baseline, truth, what=str(case))


def test_cases_are_of_both_directions_and_with_an_odd_stride() -> None:
    for cases in (TINY_PRODUCTS, GPU_PRODUCTS):
        assert {case.transposed for case in cases} == {False, True}
        assert any(random_rows(case).stride(0) % 2 for case in cases)
        assert any(case.weight.in_features % 64 for case in cases)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(64,), (33, 31, 7)], ids=str)
def test_reference_accumulates_in_float32_and_rounds_once(
    rows: tuple[int, ...], dtype: torch.dtype, transposed: bool
) -> None:
    case = ProductCase(WeightCase(rows, 193), 5, dtype, transposed)
    x, weight = random_rows(case), random_weight(case.weight)
    y = multiply(x, weight, transposed)
    matrix = dequantize(weight, dtype).double()
    truth = dense(x.double(), matrix, transposed)
    magnitudes = dense(x.double().abs(), matrix.abs(), transposed)
    assert y.dtype == dtype
    assert_summed_in_float32(y, truth, magnitudes, num_terms=x.shape[1])


def test_cpu_tensor_multiplies_without_a_gpu_and_keeps_its_dtype() -> None:
    weight = random_weight(WeightCase((8, 4), 64))
    for dtype in DTYPES:
        y = nf4_matmul(torch.randn(3, 64).to(dtype), weight)
        assert (y.shape, y.dtype) == ((3, 12), dtype)


def test_few_rows_are_fused_and_many_expand() -> None:
    paths = [matmul_path(n) for n in (1, FUSED_MAX_ROWS, FUSED_MAX_ROWS + 1, 8192)]
    assert paths == ["fused", "fused", "expand", "expand"]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 63), r"x must be a matrix with 64 columns, .* got shape \(3, 63\)"),
        (torch.ones(2, 3, 64), r"x must be a matrix with 64 columns, .* got shape \(2, 3, 64\)"),
        (torch.ones(64, 3).T, r"each row contiguous: .* with strides \(1, 3\)"),
        (torch.ones(3, 64, dtype=torch.float64), "bfloat16, float16 or float32: got torch.float64"),
        (torch.ones(3, 64, device="meta"), "must be on one device: got meta and cpu"),
    ],
    ids=["columns", "dimensions", "strides", "dtype", "device"],
)
def test_rows_that_do_not_fit_are_refused(x: Tensor, message: str) -> None:
    weight = random_weight(WeightCase((64,), 64))
    with pytest.raises(ValueError, match=message):
        nf4_matmul(x, weight)
    with pytest.raises(ValueError, match=message.replace("x must", "grad_y must")):
        nf4_matmul_transposed(x, weight)


@pytest.mark.parametrize("case", TINY_PRODUCTS, ids=str)
def test_interpreted_product_is_right(case: ProductCase) -> None:
    assert_product_is_right(interpreted_results()[str(case)], case, CPU)


def compiled_launch(case: ProductCase, capability: int, **options: int) -> CompiledLaunch:
    weight = case.weight
    empty = empty_weight(
        weight.rows, weight.in_features, weight.block_size, weight.double_quant, CPU
    )
    x = torch.zeros(case.num_rows, empty.shape[not case.transposed], dtype=case.dtype)
    return compile_launch(
        module,
        "_nf4_matmul_kernel",
        lambda: module._launch_nf4_matmul(x, empty, case.transposed),
        capability,
        **options,
    )


@pytest.mark.parametrize("capability", [80, 89, 90, 100], ids="sm{}".format)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", COMPILED_WEIGHTS, ids=str)
def test_kernel_compiles_without_spilling(
    weight: WeightCase,
    dtype: torch.dtype,
    transposed: bool,
    capability: int,
    record_property: Callable[[str, object], None],
) -> None:
    compiled = compiled_launch(ProductCase(weight, 3, dtype, transposed), capability)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)


def test_a_spill_is_seen() -> None:
    case = ProductCase(COMPILED_WEIGHTS[0], 3, torch.float32, False)
    compiled = compiled_launch(case, 90, maxnreg=32)
    assert compiled.registers <= 32
    with pytest.raises(AssertionError, match="bytes of registers are spilled"):
        compiled.assert_fits(90)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["fused", "expand"])
@pytest.mark.parametrize("case", GPU_PRODUCTS, ids=str)
def test_gpu_product_is_right(
    case: ProductCase, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "matmul_path", lambda num_rows: path)
    device = torch.device("cuda")
    rows = random_rows(case)
    # a copy would be contiguous: rows of x start anywhere, and what lies between them is NaN
    wide = torch.full((case.num_rows, rows.stride(0)), float("nan"), dtype=case.dtype)
    x = wide.to(device)[:, : rows.shape[1]].copy_(rows)
    y = multiply(x, to_device(random_weight(case.weight), device), case.transposed)
    assert y.device.type == "cuda"
    assert_product_is_right(y, case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("path", ["fused", "expand"])
def test_gpu_rows_in_float32_are_not_rounded_to_tf32(
    path: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "matmul_path", lambda num_rows: path)
    weight = quantize(torch.rand(192, 192) + 1)
    # tf32 keeps 10 bits: it would make these ones, and every sum too small by one in 4,096
    x = torch.full((3, 192), 1 + 2.0**-12)
    truth = dense(x.double(), dequantize(weight, torch.float32).double(), transposed)
    y = multiply(x.cuda(), to_device(weight, torch.device("cuda")), transposed).cpu()
    # all terms are positive
    assert_summed_in_float32(y, truth, truth, num_terms=192)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["fused", "expand"])
@pytest.mark.parametrize("case", GPU_PRODUCTS, ids=str)
def test_two_gpu_products_are_bit_equal(
    case: ProductCase, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "matmul_path", lambda num_rows: path)
    device = torch.device("cuda")
    # contiguous here
    x, weight = random_rows(case).to(device), to_device(random_weight(case.weight), device)
    first = multiply(x, weight, case.transposed)
    assert_equal(multiply(x, weight, case.transposed), first)


@pytest.mark.gpu
def test_gpu_rows_and_a_cpu_weight_are_refused() -> None:
    weight = random_weight(WeightCase((64,), 64))
    with pytest.raises(ValueError, match="x and the weight must be on one device: got cuda:0 and"):
        nf4_matmul(torch.ones(3, 64, device="cuda"), weight)
