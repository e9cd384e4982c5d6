"""kernels/rows_8bit.py and kernels/rotation.py: equal the references, interpreted and on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ahead_of_time import compile_launch
from support.cases_8bit import (
    FORMATS,
    TINY_ROWS,
    RowsCase,
    non_finite_rows,
    quantized_rows,
    rows_cases,
    rows_of,
)
from support.equality import assert_equal
from support.interpreter import interpreted_results
from torch import Tensor

from kernels import rows_8bit as module
from kernels.device import H200, meta_stands_for
from kernels.fp8 import E4M3, LEAST_LARGEST, Fp8Rows
from kernels.rotation import (
    INT8,
    WIDTH,
    EightBitRows,
    RotatedRows,
    empty_rotated_rows,
    rotated,
)
from kernels.rows_8bit import empty_8bit_rows, quantize_rows, quantize_rows_reference

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
BOTH = pytest.mark.parametrize("format", FORMATS, ids=["E4M3", "INT8"])
HALVES = (torch.bfloat16, torch.float16)


def mixed_by_hand(x: Tensor) -> Tensor:  # (M, D) float64 -> (M, D)
    """Multiply every 16 columns by Sylvester's matrix."""
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        H = torch.kron(H, torch.tensor([[1, 1], [1, -1]], dtype=torch.float64))
    return (x.view(x.shape[0], -1, 16) @ H).view(x.shape)


def assert_equal_rows(actual: EightBitRows, expected: EightBitRows) -> None:
    assert_equal(actual.scales.cpu(), expected.scales)
    assert actual.values.dtype == expected.values.dtype
    assert_equal(actual.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))


def interpreted(name: str, format: torch.dtype) -> EightBitRows:
    results = interpreted_results("rows_8bit", "interpreted_8bit.py")
    kind = Fp8Rows if format == E4M3 else RotatedRows
    return kind(results[f"{name}/values"].view(format), results[f"{name}/scales"])


def in_new_rows(x: Tensor, format: torch.dtype = E4M3) -> EightBitRows:
    return quantize_rows(x, empty_8bit_rows(x.shape, format, x.device))


@pytest.mark.parametrize("case", TINY_ROWS, ids=str)
def test_interpreted_kernel_equals_the_reference(case: RowsCase) -> None:
    expected = quantized_rows(case, quantize_rows_reference)
    assert_equal_rows(interpreted(str(case), case.format), expected)


def assert_two_rows_are_nan(found: EightBitRows) -> None:
    x, format = non_finite_rows(), found.values.dtype
    assert found.scales.isnan().tolist() == [False, True, True, False]
    # the scale of those in INT8 says it alone
    assert format == INT8 or found.values[1:3].isnan().all()
    expected = in_new_rows(x[::3].contiguous(), format)
    finite = found._replace(values=found.values[::3].contiguous(), scales=found.scales[::3])
    assert_equal_rows(finite, expected)


@BOTH
def test_a_row_that_is_not_finite_is_nan_and_no_other_row(format: torch.dtype) -> None:
    assert_two_rows_are_nan(in_new_rows(non_finite_rows(), format))


@BOTH
def test_interpreted_kernel_makes_a_row_nan_that_is_not_finite(format: torch.dtype) -> None:
    assert_two_rows_are_nan(interpreted(f"non-finite-{format}", format))


@pytest.mark.parametrize("case", rows_cases([(40, 304)], HALVES), ids=str)
def test_every_value_errs_by_half_a_step_at_most(case: RowsCase) -> None:
    x = rows_of(case).double()
    # else a row of zeros, or one whose numbers are next to nothing
    is_large = x.abs().amax(1) >= LEAST_LARGEST
    found = quantized_rows(case, quantize_rows)
    scales = found.scales.double()[:, None]
    if case.format == INT8:
        x = mixed_by_hand(x)
        bound, largest = scales / 2, 127.0
    else:
        # of 3 bits, or of the subnormal numbers' step of 2^-9
        bound, largest = torch.maximum(x.abs() / 16, scales * 2.0**-10), 448.0
    error = (found.values.double() * scales - x).abs()
    # scale, its inverse and the product round, and the sums of a rotation: four of 2^-24 at most
    assert (error <= bound + 2.0**-21 * x.abs().amax(1, keepdim=True)).all()
    assert_equal(found.values.float().abs().amax(1), torch.where(is_large, largest, 0.0))


def test_the_rotation_is_that_of_hadamards_matrix_and_its_own_inverse() -> None:
    x = torch.randint(-9, 10, (5, 48), generator=torch.Generator().manual_seed(0)).float()
    assert_equal(rotated(x).double(), mixed_by_hand(x.double()))
    assert_equal(rotated(rotated(x)), x * WIDTH)


def test_an_outlier_costs_the_others_less_behind_the_rotation() -> None:
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).half()
    x[0, 9] = 100
    found = in_new_rows(x, INT8)
    back = rotated(found.values.float() * found.scales[:, None]) / WIDTH
    # a step is 100 / 127 without a rotation; behind it the largest is a fourth, by the root of 16
    assert (back - x).square().mean().sqrt() < 100 / 127 / 12**0.5 / 3


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
        (
            torch.ones(4, 40).half(),
            empty_rotated_rows((4, 40), CPU),
            "^rows to be rotated must have a multiple of 16 columns: got 40",
        ),
        (
            torch.ones(4, 48).half(),
            RotatedRows(VALUES, torch.ones(4)),
            "^the values must be torch.int8 .*: got torch.float8_e4m3fn",
        ),
    ],
    ids=[
        "vector",
        "empty",
        "float32",
        "scattered",
        "values",
        "scales",
        "overlapping",
        "no multiple of 16",
        "another format",
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    x: Tensor, out: EightBitRows | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_rows(x, out or empty_8bit_rows(x.shape, E4M3, CPU))


@pytest.mark.parametrize(
    ("width", "format", "chosen"),
    [
        (65_536, E4M3, "_quantize_rows_kernel"),
        (65_544, E4M3, "_quantize_long_rows_kernel"),
        (16_384, INT8, "_quantize_rows_kernel"),
        (16_400, INT8, "_quantize_long_rows_kernel"),
    ],
    ids=str,
)
def test_rows_that_fit_the_registers_are_read_once(
    monkeypatch: pytest.MonkeyPatch, width: int, format: torch.dtype, chosen: str
) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: taken.append(kernel))
    in_new_rows(torch.empty(4, width, dtype=torch.bfloat16, device=META), format)
    assert taken == [getattr(module, chosen)]


def test_a_gpu_without_e4m3_is_refused_and_has_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    x = torch.empty(4, 4096, dtype=torch.bfloat16, device=META)
    with meta_stands_for(H200._replace(capability=(8, 0))):
        in_new_rows(x, INT8)
        with pytest.raises(RuntimeError, match=r"8\.9 or later: this GPU has \(8, 0\)"):
            in_new_rows(x)


# hidden sizes of 8B and 70B models; their gate and up; a 405B's; a part of wider rows
@pytest.mark.parametrize("width", [4096, 8192, 14_336, 28_672, 57_344, 106_496])
@pytest.mark.parametrize(
    ("capability", "format"),
    [
        *((capability, E4M3) for capability in (89, 90, 100, 120)),
        *((capability, INT8) for capability in (80, 86, 90, 120)),
    ],
    ids=str,
)
def test_kernel_compiles_to_16_bytes_a_load_without_spilling(
    width: int,
    capability: int,
    format: torch.dtype,
    record_property: Callable[[str, object], None],
) -> None:
    x = torch.empty(8192, width + 64, dtype=torch.bfloat16, device=META)[:, :width]
    out = empty_8bit_rows((8192, width), format, META)
    is_long = width > (16_384 if format == INT8 else 65_536)
    name = "_quantize_long_rows_kernel" if is_long else "_quantize_rows_kernel"
    compiled = compile_launch(
        module, name, lambda: module._launch_quantize_rows(x, out), capability
    )
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    assert set(compiled.find(r"ld\.global\.\S+")) == {"ld.global.v4.b32"}
    # 8 values, and the scale
    assert set(compiled.find(r"st\.global\.\S+")) == {"st.global.v2.b32", "st.global.b32"}


GPU_ROWS = rows_cases([(64, 4096), (3, 28_736), (5, 57_344), (2, 70_000), (70, 1008)], HALVES)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*TINY_ROWS, *GPU_ROWS], ids=str)
def test_gpu_kernel_equals_the_reference(case: RowsCase) -> None:
    found = quantized_rows(case, quantize_rows, CUDA)
    assert_equal_rows(found, quantized_rows(case, quantize_rows_reference))


@pytest.mark.gpu
@BOTH
def test_gpu_kernel_makes_a_row_nan_that_is_not_finite(format: torch.dtype) -> None:
    found = in_new_rows(non_finite_rows(CUDA), format)
    assert_two_rows_are_nan(found._replace(values=found.values.cpu(), scales=found.scales.cpu()))


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gpu_kernel_rounds_every_number_of_16_bits_as_torch_does(
    dtype: torch.dtype, format: torch.dtype
) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = numbers[numbers.isfinite()].view(-1, 64)
    assert_equal_rows(in_new_rows(x.cuda(), format), in_new_rows(x, format))
