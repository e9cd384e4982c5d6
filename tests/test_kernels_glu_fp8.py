"""kernels/glu_fp8.py, and norms that write E4M3: `glu` and `rms_norm`, quantized, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ahead_of_time import CompiledLaunch, compile_launch
from support.equality import assert_equal
from support.fp8_cases import GATES_IN_FP8, NORMS_IN_FP8, gate_in_fp8, norm_in_fp8
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

from kernels import glu_fp8 as module
from kernels import rms_norm as norm_module
from kernels.device import H200, meta_stands_for
from kernels.fp8 import E4M3, Fp8Rows, empty_fp8_rows
from kernels.fp8_rows import quantize_rows_reference
from kernels.glu import glu, glu_backward
from kernels.glu_fp8 import glu_fp8
from kernels.rms_norm import rms_norm
from kernels.rms_norm_backward import rms_norm_backward

CUDA = torch.device("cuda")
HALVES = (torch.bfloat16, torch.float16)
IN_8_BITS = ("values", "scales")
Results = dict[str, Tensor]


def assert_quantized(actual: Results, plain: Results) -> None:
    """What is in 16 bits is what the plain functions compute; what is in 8, that quantized."""
    names = {name.rpartition("/")[0] for name in actual if name.endswith(IN_8_BITS)}
    assert len(names) == 1
    assert actual.keys() - plain.keys() == {f"{n}/{part}" for n in names for part in IN_8_BITS}
    for name, tensor in plain.items():
        assert_equal(actual[name].cpu(), tensor.cpu(), name)
    for name in names:
        expected = empty_fp8_rows(plain[name].shape, torch.device("cpu"))
        if plain[name].shape[0]:
            quantize_rows_reference(plain[name].cpu(), expected)
        values, scales = (actual[f"{name}/{part}"].cpu() for part in IN_8_BITS)
        assert_equal(scales, expected.scales, name)
        assert_equal(values.view(torch.uint8), expected.values.view(torch.uint8), name)


def interpreted(kernel: str, case: object, script: str = "interpreted_kernels.py") -> Results:
    results = interpreted_results(kernel, script)
    names = [name.removeprefix(f"{case}/") for name in results if name.startswith(f"{case}/")]
    return {name: results[f"{case}/{name}"] for name in names if "apart" not in name}


@pytest.mark.parametrize("case", GATES_IN_FP8, ids=str)
def test_interpreted_gates_are_quantized_on_the_way(case: GateCase) -> None:
    found = interpreted("glu_fp8", case, "interpreted_fp8.py")
    assert_quantized(found, interpreted("glu", case))


@pytest.mark.parametrize("case", NORMS_IN_FP8, ids=str)
def test_interpreted_norms_are_quantized_on_the_way(case: NormCase) -> None:
    found = interpreted("rms_norm", case, "interpreted_fp8.py")
    assert_quantized(found, interpreted("rms_norm", case))


CPU_GATES = gate_cases([(0, 64), (67, 97)], HALVES)
CPU_NORMS = norm_cases([(0, 64), (5, 97)], HALVES)


@pytest.mark.parametrize("case", CPU_GATES, ids=str)
def test_on_a_cpu_gates_are_quantized(case: GateCase) -> None:
    actual = gate_in_fp8(case, glu_fp8, glu_backward)
    assert_quantized(actual, gate_results(case, glu, glu_backward))


@pytest.mark.parametrize("case", CPU_NORMS, ids=str)
def test_on_a_cpu_norms_are_quantized(case: NormCase) -> None:
    actual = norm_in_fp8(case, rms_norm, rms_norm_backward)
    assert_quantized(actual, norm_results(case, rms_norm, rms_norm_backward))


# inner sizes of real models, a prime, and one that no program holds
GPU_GATES = gate_cases([(0, 64), (1, 1), (67, 997), (131, 4864), (129, 14336), (9, 28672)], HALVES)
GPU_NORMS = norm_cases([(0, 64), (1, 1), (67, 997), (131, 4096), (9, 16384), (5, 18440)], HALVES)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_GATES, ids=str)
def test_gpu_gates_are_quantized_on_the_way(case: GateCase) -> None:
    actual = gate_in_fp8(case, glu_fp8, glu_backward, CUDA)
    assert_quantized(actual, gate_results(case, glu, glu_backward, CUDA))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_NORMS, ids=str)
def test_gpu_norms_are_quantized_on_the_way(case: NormCase) -> None:
    actual = norm_in_fp8(case, rms_norm, rms_norm_backward, CUDA)
    assert_quantized(actual, norm_results(case, rms_norm, rms_norm_backward, CUDA))


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def rows_of(matrix: Tensor) -> Fp8Rows:
    return empty_fp8_rows(matrix.shape, matrix.device)


def launch_gates(width: int) -> None:
    gate_up, out = meta(8, 2 * width + 64)[:, : 2 * width], meta(8, width + 64)[:, :width]
    glu_fp8(gate_up, "gelu_tanh", out, rows_of(out))


def launch_norm(width: int) -> None:
    x, out = meta(8, width), meta(8, width + 64)[:, :width]
    rms_norm(x, meta(width), 1e-5, x, out, fp8=rows_of(out))


# the inner size of an 8B and the longest that a program holds; an 8B's rows and the longest
COMPILED: dict[str, tuple[Any, str, Callable[[int], None], tuple[int, int]]] = {
    "gates": (module, "_glu_fp8_kernel", launch_gates, (14336, 16384)),
    "norm": (norm_module, "_rms_norm_kernel", launch_norm, (4096, 8192)),
}


def compiled_for(kernel: str, width: int, capability: int) -> CompiledLaunch:
    where, name, launch, _ = COMPILED[kernel]
    with meta_stands_for(H200._replace(capability=(capability // 10, capability % 10))):
        return compile_launch(where, name, lambda: launch(width), capability)


@pytest.mark.parametrize("is_longest", [False, True], ids=["8B", "longest"])
@pytest.mark.parametrize("capability", [89, 90, 100, 120])
@pytest.mark.parametrize("kernel", COMPILED)
def test_kernels_that_quantize_compile_without_spilling(
    kernel: str, capability: int, is_longest: bool
) -> None:
    compiled = compiled_for(kernel, COMPILED[kernel][3][is_longest], capability)
    compiled.assert_fits(capability)
    # two values at once
    assert compiled.find(r"cvt\.rn\.satfinite\.e4m3x2")
    wide = {"st.global.v4.b32", "st.global.v2.b32", "st.global.b32"}
    assert set(compiled.find(r"st\.global\.\S+")) <= wide


@pytest.mark.parametrize("launch", [launch_gates, launch_norm])
def test_a_gpu_without_e4m3_is_refused(launch: Callable[[int], None]) -> None:
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
        rms_norm(x, torch.ones(4).half(), 1e-5, fp8=rows)
    with pytest.raises(ValueError, match=message):
        glu_fp8(torch.ones(3, 8).half(), "silu", x, rows)


def test_float32_has_no_e4m3() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"in bfloat16 or float16: got .* torch\.float32"):
        rms_norm(x, torch.ones(4), 1e-5, fp8=rows_of(x))
