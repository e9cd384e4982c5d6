"""kernels/swiglu.py: no worse than torch, interpreted and on a GPU; in place where it may be."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ahead_of_time import CompiledLaunch, compile_launch
from equality import assert_equal, assert_no_worse_than
from interpreter import interpreted_results
from layer_cases import (
    TINY_GATES,
    GateCase,
    gate_cases,
    gate_gradient_apart,
    gate_inputs,
    gate_results,
    gate_results_of_autograd,
)
from torch import Tensor

from kernels import swiglu as module
from kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_reference, swiglu_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITIES = [80, 89, 90, 100]
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
    h = gate * torch.sigmoid(gate) * up
    (grad,) = torch.autograd.grad(h, gate_up, inputs["grad_h"].double())
    return {"h": h.detach(), "grad_gate_up": grad, "h_again": h.detach()}


def assert_as_good_as_torch(case: GateCase, actual: dict[str, Tensor]) -> None:
    """The half of the gates and that of what they gate differ in size, so each is compared."""
    truth, baseline = truth_of(case), gate_results_of_autograd(case, swiglu_reference)
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
        for name, tensor in interpreted_results().items()
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
    assert_equal(swiglu(gate_up), F.silu(gate) * up)
    assert_equal(gate_up, before)


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_written_out_gradient_is_as_good_as_autograds(case: GateCase) -> None:
    assert_as_good_as_torch(case, gate_results(case, swiglu, swiglu_backward))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_gradient_in_place_is_the_references(dtype: torch.dtype) -> None:
    inputs = gate_inputs(GateCase(5, 97, dtype, is_strided=True))
    expected, h = swiglu_backward_reference(inputs["grad_h"], inputs["gate_up"])
    swiglu_backward(inputs["grad_h"], inputs["gate_up"])
    assert_equal(inputs["gate_up"], expected)
    assert_equal(inputs["grad_h"], h)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swiglu(torch.ones(3, 4).int()), "^gate_up must be bfloat16, float16 or float32"),
        (lambda: swiglu(torch.ones(3, 5)), r"^gate_up must be .* rows of two halves: .* \(3, 5\)"),
        (lambda: swiglu(torch.ones(1, 3, 4)), r"^gate_up must be a matrix .* \(1, 3, 4\)"),
        (lambda: swiglu(torch.ones(4, 3).T), "^gate_up must have contiguous rows"),
        (
            lambda: swiglu(torch.ones(3, 4, requires_grad=True)),
            "^nothing is recorded for autograd",
        ),
        (
            lambda: swiglu(torch.ones(3, 4), torch.ones(3, 4)),
            "^out must have half of gate_up's columns and its dtype",
        ),
        (
            lambda: swiglu(torch.ones(3, 4), torch.ones(2).expand(3, 2)),
            "^out must have rows that do not overlap",
        ),
        (
            lambda: swiglu_backward(torch.ones(3, 4), torch.ones(3, 4)),
            "^grad_h must have half of gate_up's columns and its dtype",
        ),
        (
            lambda: swiglu_backward(torch.ones(3, 2).half(), torch.ones(3, 4)),
            "^grad_h must have half of gate_up's columns and its dtype",
        ),
        (
            lambda: swiglu_backward(torch.ones(3, 2, device="meta"), torch.ones(3, 4)),
            "must be on one device: got meta and cpu",
        ),
        (
            lambda: swiglu_backward(torch.ones(2, 3).T, torch.ones(3, 4)),
            "^grad_h must have contiguous rows",
        ),
        (
            lambda: swiglu_backward(torch.ones(3, 2), torch.ones(4).expand(3, 4)),
            "^gate_up must have rows that do not overlap",
        ),
        (
            lambda: swiglu_backward(torch.ones(3, 2, requires_grad=True), torch.ones(3, 4)),
            "^nothing is recorded for autograd",
        ),
    ],
    ids=[
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
    dtype: torch.dtype, width: int, capability: int, num_extra: int = 0
) -> CompiledLaunch:
    h, gate_up = halves_and_gates(dtype, width, num_extra)
    return compile_launch(
        module, "_swiglu_kernel", lambda: module._launch_swiglu(gate_up, h), capability
    )


def compile_backward(
    dtype: torch.dtype, width: int, capability: int, num_extra: int = 0
) -> CompiledLaunch:
    grad_h, gate_up = halves_and_gates(dtype, width, num_extra)
    return compile_launch(
        module,
        "_swiglu_backward_kernel",
        lambda: module._launch_swiglu_backward(grad_h, gate_up, gate_up, grad_h),
        capability,
    )


COMPILED = [
    (dtype, width, capability)
    for capability in CAPABILITIES
    for dtype in DTYPES
    for width in (WIDTHS if capability == 90 else (14336, 997))
]


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
    record_property: Callable[[str, object], None],
) -> None:
    compiled = compile_kernel(dtype, width, capability)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)


@pytest.mark.parametrize("num_extra", [0, 16], ids=["whole", "part of wider rows"])
@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_moved_once_in_vectors_of_16_bytes_past_shared_memory(
    dtype: torch.dtype, capability: int, num_extra: int
) -> None:
    for compiled, num_read, num_written in (
        (compile_forward(dtype, 14336, capability, num_extra), 2, 1),
        (compile_backward(dtype, 14336, capability, num_extra), 3, 3),
    ):
        assert compiled.shared_bytes == 0
        assert "bar.sync" not in compiled.ptx
        for way, number in (("ld", num_read), ("st", num_written)):
            accesses = re.findall(rf"{way}\.global\S+", compiled.ptx)
            assert accesses == [f"{way}.global.v4.b32"] * (number * module.CHUNKS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_value_costs_fewer_instructions_than_memory_leaves_time_for(
    dtype: torch.dtype,
) -> None:
    # an H100 has time for 9 instructions a byte at 3 TB/s, 6 bytes forward and 12 back; half of it
    # leaves room for waiting
    values = module.CHUNKS * module.VECTOR_BYTES // dtype.itemsize
    assert compile_forward(dtype, 14336, 90).count_instructions() <= 6 * 9 / 2 * values
    assert compile_backward(dtype, 14336, 90).count_instructions() <= 12 * 9 / 2 * values


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernels_are_as_good_as_torch(case: GateCase) -> None:
    actual = gate_results(case, swiglu, swiglu_backward, CUDA)
    assert_as_good_as_torch(case, {name: tensor.cpu() for name, tensor in actual.items()})
    for name, tensor in gate_results(case, swiglu, swiglu_backward, CUDA).items():
        assert_equal(tensor, actual[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_gradient_and_result_in_place_are_those_apart(case: GateCase) -> None:
    in_place = gate_results(case, swiglu, swiglu_backward, CUDA)
    apart = gate_gradient_apart(case, module._launch_swiglu_backward, CUDA)
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
    h = swiglu(gate_up)
    expected = swiglu(last)
    assert_equal(h[-3:], expected)
    grad_gate_up, _ = swiglu_backward(h, gate_up)
    short, _ = swiglu_backward(expected, last)
    assert_equal(grad_gate_up[-3:], short)
