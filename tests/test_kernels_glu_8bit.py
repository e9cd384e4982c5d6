"""kernels/glu_8bit.py, and norms that write 8 bits: `glu` and `rms_norm`, quantized."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ahead_of_time import CompiledLaunch, compile_launch
from support.cases_8bit import (
    FORMATS,
    GATES_IN_8_BITS,
    NORMS_IN_8_BITS,
    gate_in_8_bits,
    in_both,
    norm_in_8_bits,
)
from support.equality import assert_equal
from support.interpreter import interpreted_results
from support.layer_cases import (
    GateCase,
    NormCase,
    gate_cases,
    gate_results,
    norm_cases,
    norm_results,
)
from torch import Tensor

from kernels import glu_8bit as module
from kernels import rms_norm as norm_module
from kernels.device import H200, meta_stands_for
from kernels.fp8 import E4M3, Fp8Rows
from kernels.glu import glu, glu_backward
from kernels.glu_8bit import glu_8bit
from kernels.rms_norm import rms_norm
from kernels.rms_norm_backward import rms_norm_backward
from kernels.rotation import EightBitRows
from kernels.rows_8bit import empty_8bit_rows, quantize_rows_reference

CUDA = torch.device("cuda")
HALVES = (torch.bfloat16, torch.float16)
IN_8_BITS = ("values", "scales")
Results = dict[str, Tensor]


def assert_quantized(actual: Results, plain: Results, format: torch.dtype) -> None:
    """What is in 16 bits is what the plain functions compute; what is in 8, that quantized."""
    names = {name.rpartition("/")[0] for name in actual if name.endswith(IN_8_BITS)}
    assert len(names) == 1
    assert actual.keys() - plain.keys() == {f"{n}/{part}" for n in names for part in IN_8_BITS}
    for name, tensor in plain.items():
        assert_equal(actual[name].cpu(), tensor.cpu(), name)
    for name in names:
        values, scales = (actual[f"{name}/{part}"].cpu() for part in IN_8_BITS)
        assert values.dtype == format
        expected = empty_8bit_rows(plain[name].shape, format, torch.device("cpu"))
        if plain[name].shape[0]:
            quantize_rows_reference(plain[name].cpu(), expected)
        assert_equal(scales, expected.scales, name)
        assert_equal(values.view(torch.uint8), expected.values.view(torch.uint8), name)


def interpreted(kernel: str, case: str, script: str = "interpreted_kernels.py") -> Results:
    results = interpreted_results(kernel, script)
    names = [name.removeprefix(f"{case}/") for name in results if name.startswith(f"{case}/")]
    return {name: results[f"{case}/{name}"] for name in names if "apart" not in name}


def interpreted_in_8_bits(kernel: str, case: object, format: torch.dtype) -> Results:
    found = interpreted(kernel, f"{format}-{case}", "interpreted_8bit.py")
    return {k: v.view(format) if k.endswith("/values") else v for k, v in found.items()}


@pytest.mark.parametrize(("case", "format"), in_both(GATES_IN_8_BITS), ids=str)
def test_interpreted_gates_are_quantized_on_the_way(case: GateCase, format: torch.dtype) -> None:
    found = interpreted_in_8_bits("glu_8bit", case, format)
    assert_quantized(found, interpreted("glu", str(case)), format)


@pytest.mark.parametrize(("case", "format"), in_both(NORMS_IN_8_BITS), ids=str)
def test_interpreted_norms_are_quantized_on_the_way(case: NormCase, format: torch.dtype) -> None:
    found = interpreted_in_8_bits("rms_norm", case, format)
    assert_quantized(found, interpreted("rms_norm", str(case)), format)


CPU_GATES = gate_cases([(0, 64), (67, 97), (67, 112)], HALVES)
CPU_NORMS = norm_cases([(0, 64), (5, 97), (5, 112)], HALVES)


@pytest.mark.parametrize(("case", "format"), in_both(CPU_GATES), ids=str)
def test_on_a_cpu_gates_are_quantized(case: GateCase, format: torch.dtype) -> None:
    actual = gate_in_8_bits(case, format, glu_8bit, glu_backward)
    assert_quantized(actual, gate_results(case, glu, glu_backward), format)


@pytest.mark.parametrize(("case", "format"), in_both(CPU_NORMS), ids=str)
def test_on_a_cpu_norms_are_quantized(case: NormCase, format: torch.dtype) -> None:
    actual = norm_in_8_bits(case, format, rms_norm, rms_norm_backward)
    assert_quantized(actual, norm_results(case, rms_norm, rms_norm_backward), format)


# inner sizes of real models, a prime, and one that no program holds
GPU_GATES = gate_cases([(0, 64), (1, 1), (67, 997), (131, 4864), (129, 14336), (9, 28672)], HALVES)
GPU_NORMS = norm_cases([(0, 64), (1, 1), (67, 997), (131, 4096), (9, 16384), (5, 18448)], HALVES)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "format"), in_both(GPU_GATES), ids=str)
def test_gpu_gates_are_quantized_on_the_way(case: GateCase, format: torch.dtype) -> None:
    actual = gate_in_8_bits(case, format, glu_8bit, glu_backward, CUDA)
    assert_quantized(actual, gate_results(case, glu, glu_backward, CUDA), format)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "format"), in_both(GPU_NORMS), ids=str)
def test_gpu_norms_are_quantized_on_the_way(case: NormCase, format: torch.dtype) -> None:
    actual = norm_in_8_bits(case, format, rms_norm, rms_norm_backward, CUDA)
    assert_quantized(actual, norm_results(case, rms_norm, rms_norm_backward, CUDA), format)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def rows_of(matrix: Tensor, format: torch.dtype = E4M3) -> EightBitRows:
    return empty_8bit_rows(matrix.shape, format, matrix.device)


def launch_gates(width: int, format: torch.dtype = E4M3) -> None:
    gate_up, out = meta(8, 2 * width + 64)[:, : 2 * width], meta(8, width + 64)[:, :width]
    glu_8bit(gate_up, "gelu_tanh", out, rows_of(out, format))


def launch_norm(width: int, format: torch.dtype = E4M3) -> None:
    x, out = meta(8, width), meta(8, width + 64)[:, :width]
    rms_norm(x, meta(width), 1e-5, x, out, in_8_bits=rows_of(out, format))


# the inner size of an 8B and the longest that a program holds; an 8B's rows and the longest
COMPILED: dict[str, tuple[Any, str, Callable[..., None], tuple[int, int]]] = {
    "gates": (module, "_glu_8bit_kernel", launch_gates, (14336, 16384)),
    "norm": (norm_module, "_rms_norm_kernel", launch_norm, (4096, 8192)),
}


def compiled_for(kernel: str, width: int, capability: int, format: torch.dtype) -> CompiledLaunch:
    where, name, launch, _ = COMPILED[kernel]
    with meta_stands_for(H200._replace(capability=(capability // 10, capability % 10))):
        return compile_launch(where, name, lambda: launch(width, format), capability)


@pytest.mark.parametrize("is_longest", [False, True], ids=["8B", "longest"])
@pytest.mark.parametrize(
    ("capability", "format"),
    [(capability, format) for capability in (89, 90, 100, 120) for format in FORMATS],
    ids=str,
)
@pytest.mark.parametrize("kernel", COMPILED)
def test_kernels_that_quantize_compile_without_spilling(
    kernel: str, capability: int, format: torch.dtype, is_longest: bool
) -> None:
    compiled = compiled_for(kernel, COMPILED[kernel][3][is_longest], capability, format)
    compiled.assert_fits(capability)
    # two values at once
    assert bool(compiled.find(r"cvt\.rn\.satfinite\.e4m3x2")) == (format == E4M3)
    wide = {"st.global.v4.b32", "st.global.v2.b32", "st.global.b32"}
    assert set(compiled.find(r"st\.global\.\S+")) <= wide


@pytest.mark.parametrize("launch", [launch_gates, launch_norm])
def test_a_gpu_without_e4m3_is_refused(launch: Callable[..., None]) -> None:
    with (
        meta_stands_for(H200._replace(capability=(8, 6))),
        pytest.raises(RuntimeError, match=r"8\.9 or later"),
    ):
        launch(4096)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Fp8Rows(torch.empty(3, 5, dtype=E4M3), torch.empty(3)), r"^the values must be .*\(3, 4\)"),
        (Fp8Rows(torch.empty(3, 4, dtype=E4M3), torch.empty(4)), r"^the scales must be .*\(3,\)"),
        (Fp8Rows(torch.empty(3, 4), torch.empty(3)), "^the values must be torch.float8_e4m3fn"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: Fp8Rows, message: str) -> None:
    x = torch.ones(3, 4).half()
    with pytest.raises(ValueError, match=message):
        rms_norm(x, torch.ones(4).half(), 1e-5, in_8_bits=rows)
    with pytest.raises(ValueError, match=message):
        glu_8bit(torch.ones(3, 8).half(), "silu", x, rows)


def test_float32_has_no_e4m3() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"in bfloat16 or float16: got .* torch\.float32"):
        rms_norm(x, torch.ones(4), 1e-5, in_8_bits=rows_of(x))
