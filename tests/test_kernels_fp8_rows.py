"""kernels/fp8_rows.py: equals the reference, interpreted and on a GPU; compiles where it runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ahead_of_time import compile_launch
from support.equality import assert_equal
from support.fp8_cases import (
    TINY_ROWS,
    RowsCase,
    non_finite_rows,
    quantized_rows,
    rows_cases,
    rows_of,
)
from support.interpreter import interpreted_results
from torch import Tensor

from kernels import fp8_rows as module
from kernels.device import H200, meta_stands_for
from kernels.fp8 import E4M3, LEAST_LARGEST, Fp8Rows
from kernels.fp8_rows import quantize_rows, quantize_rows_reference

CUDA, META = torch.device("cuda"), torch.device("meta")
HALVES = (torch.bfloat16, torch.float16)


def assert_equal_rows(actual: Fp8Rows, expected: Fp8Rows) -> None:
    assert_equal(actual.scales.cpu(), expected.scales)
    assert actual.values.dtype == E4M3
    assert_equal(actual.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.parametrize("case", TINY_ROWS, ids=str)
def test_interpreted_kernel_equals_the_reference(case: RowsCase) -> None:
    results = interpreted_results("fp8_rows", "interpreted_fp8.py")
    values = results[f"{case}/values"].view(E4M3)
    found = Fp8Rows(values, results[f"{case}/scales"])
    assert_equal_rows(found, quantized_rows(case, quantize_rows_reference))


def assert_two_rows_are_nan(found: Fp8Rows) -> None:
    x = non_finite_rows()
    assert found.scales.isnan().tolist() == [False, True, True, False]
    assert found.values[1:3].isnan().all()
    expected = quantize_rows(x[::3].contiguous())
    assert_equal_rows(Fp8Rows(found.values[::3].contiguous(), found.scales[::3]), expected)


def test_a_row_that_is_not_finite_is_nan_and_no_other_row() -> None:
    assert_two_rows_are_nan(quantize_rows(non_finite_rows()))


def test_interpreted_kernel_makes_a_row_nan_that_is_not_finite() -> None:
    results = interpreted_results("fp8_rows", "interpreted_fp8.py")
    values = results["non-finite/values"].view(E4M3)
    assert_two_rows_are_nan(Fp8Rows(values, results["non-finite/scales"]))


@pytest.mark.parametrize("case", rows_cases([(40, 300)], HALVES), ids=str)
def test_every_value_errs_by_a_sixteenth_at_most(case: RowsCase) -> None:
    x = rows_of(case).double()
    found = quantized_rows(case, quantize_rows)
    error = (found.values.double() * found.scales.double()[:, None] - x).abs()
    # half of a step of 3 bits, or of the subnormal numbers' step of 2^-9
    bound = torch.maximum(x.abs() / 16, found.scales.double()[:, None] * 2.0**-10)
    assert (error <= bound * (1 + 1e-6)).all()
    largest = found.values.float().abs().amax(1)
    # else a row of zeros, or one whose numbers are next to nothing
    is_large = x.abs().amax(1) >= LEAST_LARGEST
    assert_equal(largest, torch.where(is_large, 448.0, 0.0))


VALUES = torch.empty(4, 48, dtype=E4M3)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.ones(4), None, r"^x must be a matrix with columns .*: got shape \(4,\) in"),
        (torch.ones(4, 0).half(), None, r"got shape \(4, 0\) in torch.float16$"),
        (torch.ones(4, 48), None, "got shape .* in torch.float32$"),
        (torch.ones(48, 4).half().T, None, "^x must have contiguous rows"),
        (torch.ones(4, 40).half(), Fp8Rows(VALUES, torch.ones(4)), r"shape \(4, 40\): got .*48\)"),
        (torch.ones(4, 48).half(), Fp8Rows(VALUES, torch.ones(3)), r"scales .* \(4,\): got .*3,"),
        (
            torch.ones(4, 48).half(),
            Fp8Rows(VALUES[:1].expand(4, 48), torch.ones(4)),
            "^the values must have rows that do not overlap",
        ),
    ],
    ids=["vector", "empty", "float32", "scattered", "values", "scales", "overlapping"],
)
def test_arguments_that_do_not_fit_are_refused(
    x: Tensor, out: Fp8Rows | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_rows(x, out)


@pytest.mark.parametrize(
    ("width", "chosen"),
    [(65_536, "_quantize_rows_kernel"), (65_544, "_quantize_long_rows_kernel")],
)
def test_rows_that_fit_the_registers_are_read_once(
    monkeypatch: pytest.MonkeyPatch, width: int, chosen: str
) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: taken.append(kernel))
    quantize_rows(torch.empty(4, width, dtype=torch.bfloat16, device=META))
    assert taken == [getattr(module, chosen)]


def test_a_gpu_without_e4m3_is_refused() -> None:
    x = torch.empty(4, 4096, dtype=torch.bfloat16, device=META)
    with (
        meta_stands_for(H200._replace(capability=(8, 0))),
        pytest.raises(RuntimeError, match=r"8\.9 or later: this GPU has \(8, 0\)"),
    ):
        quantize_rows(x)


# hidden sizes of 8B and 70B models; their gate and up; a 405B's; a part of wider rows
@pytest.mark.parametrize("width", [4096, 8192, 14_336, 28_672, 57_344, 106_496])
@pytest.mark.parametrize("capability", [89, 90, 100, 120])
def test_kernel_compiles_to_16_bytes_a_load_without_spilling(
    width: int, capability: int, record_property: Callable[[str, object], None]
) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
        return torch.empty(*shape, dtype=dtype, device=META)

    x = empty(8192, width + 64, dtype=torch.bfloat16)[:, :width]
    out = Fp8Rows(empty(8192, width, dtype=E4M3), empty(8192))
    name = "_quantize_rows_kernel" if width < 65_536 else "_quantize_long_rows_kernel"
    compiled = compile_launch(
        module, name, lambda: module._launch_quantize_rows(x, out), capability
    )
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    assert set(compiled.find(r"ld\.global\.\S+")) == {"ld.global.v4.b32"}
    # 8 values, and the scale
    assert set(compiled.find(r"st\.global\.\S+")) == {"st.global.v2.b32", "st.global.b32"}


GPU_ROWS = rows_cases([(64, 4096), (3, 28_736), (5, 57_344), (2, 70_000), (70, 1000)], HALVES)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*TINY_ROWS, *GPU_ROWS], ids=str)
def test_gpu_kernel_equals_the_reference(case: RowsCase) -> None:
    found = quantized_rows(case, quantize_rows, CUDA)
    assert_equal_rows(found, quantized_rows(case, quantize_rows_reference))


@pytest.mark.gpu
def test_gpu_kernel_makes_a_row_nan_that_is_not_finite() -> None:
    found = quantize_rows(non_finite_rows(CUDA))
    assert_two_rows_are_nan(Fp8Rows(found.values.cpu(), found.scales.cpu()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gpu_kernel_rounds_every_number_of_16_bits_as_torch_does(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = numbers[numbers.isfinite()].view(-1, 64)
    assert_equal_rows(quantize_rows(x.cuda()), quantize_rows(x))
