"""kernels/glu.py: no worse than torch, interpreted and on a GPU; in place where it may be."""

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from support.ahead_of_time import GPUS, CompiledLaunch, compile_launch, on_each_gpu
from support.equality import assert_equal, assert_no_worse_than
from support.interpreter import interpreted_results
from support.layer_cases import (
    TINY_GATES,
    GateCase,
    gate_cases,
    gate_gradient_apart,
    gate_inputs,
    gate_results,
    gate_results_of_autograd,
)
from torch import Tensor

from kernels import glu as module
from kernels.glu import (
    ACTIVATIONS,
    Activation,
    glu,
    glu_backward,
    glu_backward_reference,
    glu_reference,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA = torch.device("cuda")
# inner sizes of real models, and a prime
WIDTHS = [1536, 4864, 11008, 14336, 28672, 997]
CPU_CASES = gate_cases([(0, 64), (1, 1), (67, 997), (3, 4864)], DTYPES)
GPU_CASES = gate_cases(
    [(0, 64), (1, 1), (1, 14336), (67, 997), (131, 4864), (33, 11008), (513, 14336)], DTYPES
)


def truth_of(case: GateCase) -> dict[str, Tensor]:
    """Forward and back in float64."""
    inputs = gate_inputs(case)
    gate_up = inputs["gate_up"].double().requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    if case.activation == "silu":
        h = gate * torch.sigmoid(gate) * up
    elif case.activation == "clamped_swish":
        gate = gate.clamp(max=7.0)
        h = gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    else:
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        h = 0.5 * gate * (1 + torch.tanh(inner)) * up
    (grad,) = torch.autograd.grad(h, gate_up, inputs["grad_h"].double())
    return {"h": h.detach(), "grad_gate_up": grad, "h_again": h.detach()}


def assert_as_good_as_torch(case: GateCase, actual: dict[str, Tensor]) -> None:
    """The half of the gates and that of what they gate differ in size, so each is compared."""
    truth, baseline = truth_of(case), gate_results_of_autograd(case, glu_reference)
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        assert actual[name].shape == expected.shape, name
        if case.num_rows == 0:
            continue
        tensors = (actual[name], baseline[name], expected)
        for parts in zip(*(tensor.split(case.width, dim=1) for tensor in tensors), strict=True):
            assert_no_worse_than(*parts, what=name)


def interpreted(prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in interpreted_results("glu").items()
        if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
    }


@pytest.mark.parametrize("case", TINY_GATES, ids=str)
def test_interpreted_kernels_are_as_good_as_torch(case: GateCase) -> None:
    assert_as_good_as_torch(case, interpreted(f"{case}/"))


@pytest.mark.parametrize("case", TINY_GATES, ids=str)
def test_interpreted_gradient_and_result_in_place_are_those_apart(case: GateCase) -> None:
    in_place, apart = interpreted(f"{case}/"), interpreted(f"{case}/apart/")
    assert_equal(in_place["grad_gate_up"], apart["grad_gate_up"])
    assert_equal(in_place["h_again"], apart["h_again"])
    # the same arithmetic forward and back
    assert_equal(in_place["h_again"], in_place["h"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_buffer_is_gated_as_torch_does_and_kept(dtype: torch.dtype) -> None:
    gate_up = gate_inputs(GateCase(5, 97, dtype))["gate_up"]
    gate, up = gate_up.split((97, 97), dim=1)
    before = gate_up.clone()
    assert_equal(glu(gate_up, "silu"), F.silu(gate) * up)
    assert_equal(glu(gate_up, "gelu_tanh"), F.gelu(gate, approximate="tanh") * up)
    most = gate.clamp(max=7.0)
    expected = most * torch.sigmoid(1.702 * most) * (up.clamp(-7.0, 7.0) + 1)
    assert_equal(glu(gate_up, "clamped_swish"), expected)
    assert_equal(gate_up, before)


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_written_out_gradient_is_as_good_as_autograds(case: GateCase) -> None:
    assert_as_good_as_torch(case, gate_results(case, glu, glu_backward))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_gradient_in_place_is_the_references(
    dtype: torch.dtype, activation: Activation
) -> None:
    inputs = gate_inputs(GateCase(5, 97, dtype, activation, is_strided=True))
    expected, h = glu_backward_reference(inputs["grad_h"], inputs["gate_up"], activation)
    glu_backward(inputs["grad_h"], inputs["gate_up"], activation)
    assert_equal(inputs["gate_up"], expected)
    assert_equal(inputs["grad_h"], h)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: glu(torch.ones(3, 4), cast(Any, "relu")), "^the activation must be one of silu"),
        (
            lambda: glu(torch.ones(3, 4).int(), "silu"),
            "^gate_up must be bfloat16, float16 or float32",
        ),
        (
            lambda: glu(torch.ones(3, 5), "silu"),
            r"^gate_up must be .* rows of two halves: .* \(3, 5\)",
        ),
        (lambda: glu(torch.ones(1, 3, 4), "silu"), r"^gate_up must be a matrix .* \(1, 3, 4\)"),
        (lambda: glu(torch.ones(4, 3).T, "silu"), "^gate_up must have contiguous rows"),
        (
            lambda: glu(torch.ones(3, 4, requires_grad=True), "silu"),
            "^nothing is recorded for autograd",
        ),
        (
            lambda: glu(torch.ones(3, 4), "silu", torch.ones(3, 4)),
            "^out must have half of gate_up's columns and its dtype",
        ),
        (
            lambda: glu(torch.ones(3, 4), "silu", torch.ones(2).expand(3, 2)),
            "^out must have rows that do not overlap",
        ),
        (
            lambda: glu_backward(torch.ones(3, 4), torch.ones(3, 4), "silu"),
            "^grad_h must have half of gate_up's columns and its dtype",
        ),
        (
            lambda: glu_backward(torch.ones(3, 2).half(), torch.ones(3, 4), "silu"),
            "^grad_h must have half of gate_up's columns and its dtype",
        ),
        (
            lambda: glu_backward(torch.ones(3, 2, device="meta"), torch.ones(3, 4), "silu"),
            "must be on one device: got meta and cpu",
        ),
        (
            lambda: glu_backward(torch.ones(2, 3).T, torch.ones(3, 4), "silu"),
            "^grad_h must have contiguous rows",
        ),
        (
            lambda: glu_backward(torch.ones(3, 2), torch.ones(4).expand(3, 4), "silu"),
            "^gate_up must have rows that do not overlap",
        ),
        (
            lambda: glu_backward(torch.ones(3, 2, requires_grad=True), torch.ones(3, 4), "silu"),
            "^nothing is recorded for autograd",
        ),
    ],
    ids=[
        "activation",
        "dtype",
        "odd",
        "three dimensions",
        "scattered",
        "recorded",
        "out's width",
        "out overlaps",
        "gradient's width",
        "gradient's dtype",
        "gradient's device",
        "gradient scattered",
        "written over itself",
        "gradient recorded",
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def halves_and_gates(dtype: torch.dtype, width: int, num_extra: int) -> tuple[Tensor, Tensor]:
    h = torch.empty(2, width + num_extra, dtype=dtype)[:, :width]
    gate_up = torch.empty(2, 2 * width + num_extra, dtype=dtype)[:, : 2 * width]
    return h, gate_up


def compile_forward(
    dtype: torch.dtype,
    width: int,
    capability: int,
    num_extra: int = 0,
    activation: Activation = "silu",
) -> CompiledLaunch:
    h, gate_up = halves_and_gates(dtype, width, num_extra)
    return compile_launch(
        module, "_glu_kernel", lambda: module._launch_glu(gate_up, activation, h), capability
    )


def compile_backward(
    dtype: torch.dtype,
    width: int,
    capability: int,
    num_extra: int = 0,
    activation: Activation = "silu",
) -> CompiledLaunch:
    grad_h, gate_up = halves_and_gates(dtype, width, num_extra)
    return compile_launch(
        module,
        "_glu_backward_kernel",
        lambda: module._launch_glu_backward(grad_h, gate_up, activation, gate_up, grad_h),
        capability,
    )


COMPILED = [
    (dtype, width, capability)
    for dtype in DTYPES
    for capability in GPUS[dtype]
    for width in (WIDTHS if capability == 90 else (14336, 997))
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("compile_kernel", [compile_forward, compile_backward])
@pytest.mark.parametrize(
    ("dtype", "width", "capability"),
    COMPILED,
    ids=[f"{str(dtype)[6:]}-F{width}-sm{capability}" for dtype, width, capability in COMPILED],
)
def test_kernels_compile_without_spilling(
    compile_kernel: Callable[..., CompiledLaunch],
    dtype: torch.dtype,
    width: int,
    capability: int,
    activation: Activation,
    record_property: Callable[[str, object], None],
) -> None:
    compiled = compile_kernel(dtype, width, capability, activation=activation)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)


@pytest.mark.parametrize("num_extra", [0, 16], ids=["whole", "part of wider rows"])
@on_each_gpu(DTYPES)
def test_values_are_moved_once_in_vectors_of_16_bytes_past_shared_memory(
    dtype: torch.dtype, capability: int, num_extra: int
) -> None:
    for compiled, num_read, num_written in (
        (compile_forward(dtype, 14336, capability, num_extra), 2, 1),
        (compile_backward(dtype, 14336, capability, num_extra), 3, 3),
    ):
        assert compiled.shared_bytes == 0
        assert not compiled.find(r"bar\.sync")
        for way, number in (("ld", num_read), ("st", num_written)):
            accesses = compiled.find(rf"{way}\.global\S+")
            assert accesses == [f"{way}.global.v4.b32"] * (number * module.CHUNKS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_value_costs_fewer_instructions_than_memory_leaves_time_for(
    dtype: torch.dtype, activation: Activation
) -> None:
    # an H100 has time for 9 instructions a byte at 3 TB/s, 6 bytes forward and 12 back; half of it
    # leaves room for waiting
    values = module.CHUNKS * module.VECTOR_BYTES // dtype.itemsize
    forward = compile_forward(dtype, 14336, 90, activation=activation)
    backward = compile_backward(dtype, 14336, 90, activation=activation)
    assert forward.count_instructions() <= 6 * 9 / 2 * values
    assert backward.count_instructions() <= 12 * 9 / 2 * values


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernels_are_as_good_as_torch(case: GateCase) -> None:
    actual = gate_results(case, glu, glu_backward, CUDA)
    assert_as_good_as_torch(case, {name: tensor.cpu() for name, tensor in actual.items()})
    for name, tensor in gate_results(case, glu, glu_backward, CUDA).items():
        assert_equal(tensor, actual[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_gradient_and_result_in_place_are_those_apart(case: GateCase) -> None:
    in_place = gate_results(case, glu, glu_backward, CUDA)
    apart = gate_gradient_apart(case, module._launch_glu_backward, CUDA)
    assert_equal(in_place["grad_gate_up"], apart["grad_gate_up"])
    assert_equal(in_place["h_again"], apart["h_again"])
    assert_equal(in_place["h_again"], in_place["h"])


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_kernels_reach_beyond_int32() -> None:
    num_rows, width = 75_000, 14336
    assert num_rows * 2 * width > 2**31
    gate_up = torch.empty(num_rows, 2 * width, dtype=torch.bfloat16, device=CUDA).normal_()
    last = gate_up[-3:].clone()
    h = glu(gate_up, "silu")
    expected = glu(last, "silu")
    assert_equal(h[-3:], expected)
    grad_gate_up, _ = glu_backward(h, gate_up, "silu")
    short, _ = glu_backward(expected, last, "silu")
    assert_equal(grad_gate_up[-3:], short)
