"""kernels/rms_norm.py: no worse than torch, interpreted and on a GPU; compiles for each GPU."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.ahead_of_time import GPUS, CompiledLaunch, compile_launch, on_each_gpu
from support.equality import assert_equal, assert_no_worse_than
from support.interpreter import interpreted_results
from support.layer_cases import (
    EPS,
    TINY_NORMS,
    NormCase,
    norm_cases,
    norm_inputs,
    norm_results,
    norm_results_of_autograd,
)
from torch import Tensor

from kernels import rms_norm as forward_module
from kernels import rms_norm_backward as backward_module
from kernels import rms_norm_long as long_module
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.rms_norm_backward import rms_norm_backward
from kernels.rms_norm_row import shape_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA = torch.device("cuda")
# hidden sizes of real models, and rows that are read twice
WIDTHS = [576, 896, 2048, 4096, 5120, 8192, 16384, 20480]
CPU_CASES = norm_cases([(0, 64), (1, 1), (1, 4096), (67, 997), (9, 512)], DTYPES)
GPU_CASES = norm_cases(
    [
        (0, 64),
        (1, 1),
        (1, 4096),
        (67, 997),
        (33, 896),
        (257, 4096),
        (9, 5120),
        (5, 8192),
        (3, 20480),
    ],
    DTYPES,
)


def truth_of(case: NormCase) -> dict[str, Tensor]:
    """In float64, but for r, which is rounded before it is normalized."""
    inputs = norm_inputs(case)
    rounded = inputs["x"] + inputs["residual"] if case.has_residual else inputs["x"]
    r = rounded.double().requires_grad_()
    weight = inputs["weight"].double() + case.offset
    wide = r - r.mean(dim=1, keepdim=True) if case.is_centred else r
    rstd = 1 / (wide.square().mean(dim=1) + EPS).sqrt()
    y = weight * wide * rstd[:, None]
    (grad,) = torch.autograd.grad(y, r, inputs["grad_y"].double())
    if case.has_grad_r:
        grad = grad + inputs["grad_r"].double()
    return {"y": y.detach(), "r": rounded.double(), "rstd": rstd.detach(), "grad": grad}


def assert_as_good_as_torch(case: NormCase, actual: dict[str, Tensor]) -> None:
    """Rows differ in scale, so each is compared with its own truth."""
    truth, baseline = truth_of(case), norm_results_of_autograd(case, rms_norm_reference)
    assert actual.keys() - {"y_again"} == truth.keys()
    assert ("y_again" in actual) == bool(case.y_place)
    allowances = [0.0] * case.num_rows
    if case.is_centred:
        # a multiply-add subtracts the mean from g w before that is rounded: the two no longer
        # cancel where they are equal
        inputs = norm_inputs(case)
        largest = (
            (inputs["grad_y"].double() * (inputs["weight"].double() + case.offset))
            .abs()
            .amax(dim=1)
        )
        allowances = (torch.finfo(torch.float32).eps / 2 * largest * truth["rstd"]).tolist()
    if case.y_place:
        # the same arithmetic forward and back
        assert_equal(actual["y_again"], actual["y"], "y again")
    for name, expected in truth.items():
        assert actual[name].shape == expected.shape, name
        if name == "rstd":
            continue
        for row in range(case.num_rows):
            assert_no_worse_than(
                actual[name][row],
                baseline[name][row],
                expected[row],
                what=f"{name}[{row}]",
                allowance=allowances[row] if name == "grad" else 0.0,
            )
    assert_equal(actual["r"], baseline["r"], "r")
    assert actual["rstd"].dtype == torch.float32
    assert actual["rstd"].isfinite().all()
    # half an eps for the squares and for each sum of them, for their mean and for adding eps to it,
    # which the root halves; for the root itself and the division
    tolerance = ((case.width + 2) / 2 + 2) * torch.finfo(torch.float32).eps / 2
    error = (actual["rstd"].double() - truth["rstd"]).abs()
    assert (error <= tolerance * truth["rstd"]).all()


def interpreted(case: NormCase) -> dict[str, Tensor]:
    prefix = f"{case}/"
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in interpreted_results("rms_norm").items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("case", TINY_NORMS, ids=str)
def test_interpreted_kernels_are_as_good_as_torch(case: NormCase) -> None:
    actual = interpreted(case)
    assert_as_good_as_torch(case, actual)
    # y again changes nothing of the rest
    for name, tensor in interpreted(replace(case, y_place="")).items():
        assert_equal(actual[name], tensor, name)


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_written_out_gradient_is_as_good_as_autograds(case: NormCase) -> None:
    assert_as_good_as_torch(case, norm_results(case, rms_norm, rms_norm_backward))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_tensor_is_normalized_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    for case in norm_cases([(7, 97)], (dtype,)):
        inputs = norm_inputs(case)
        residual = inputs["residual"] if case.has_residual else None
        weight = inputs["weight"]
        kind = (case.offset, case.is_centred)
        y, r, rstd = rms_norm(inputs["x"], weight, EPS, residual, None, *kind)
        added = inputs["x"] if residual is None else inputs["x"] + residual
        wide = added.float()
        if case.is_centred:
            wide = wide - wide.mean(dim=-1, keepdim=True)
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)
        assert_equal(r, added)
        assert_equal(rstd, scale.squeeze(1))
        assert_equal(y, (wide * scale * (weight.float() + case.offset)).to(dtype))


def test_a_cpu_gradient_over_another_is_that_in_a_new_tensor() -> None:
    inputs = norm_inputs(NormCase(7, 97, torch.bfloat16, False, True))
    x, weight, grad_y, grad_r = (inputs[name] for name in ("x", "weight", "grad_y", "grad_r"))
    _, r, rstd = rms_norm(x, weight, EPS)
    expected = rms_norm_backward(grad_y, grad_r, r, rstd, weight)
    for name in ("grad_y", "grad_r"):
        grads = {"grad_y": grad_y.clone(), "grad_r": grad_r.clone()}
        found = rms_norm_backward(
            grads["grad_y"], grads["grad_r"], r, rstd, weight, out=grads[name]
        )
        assert found is grads[name]
        assert_equal(found, expected)


def test_a_cpu_result_is_written_again_as_it_was() -> None:
    inputs = norm_inputs(NormCase(7, 97, torch.bfloat16, False, True))
    x, weight, grad_y, grad_r = (inputs[name] for name in ("x", "weight", "grad_y", "grad_r"))
    y, r, rstd = rms_norm(x, weight, EPS)
    expected = rms_norm_backward(grad_y, grad_r, r, rstd, weight)
    # as a layer does: both gradients give way
    found = rms_norm_backward(grad_y, grad_r, r, rstd, weight, out=grad_r, y=grad_y)
    assert found is grad_r
    assert_equal(grad_r, expected)
    assert_equal(grad_y, y)


X, WEIGHT = torch.ones(3, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.int(), WEIGHT), "^x must be bfloat16, float16 or float32: got"),
        ((X, torch.ones(5)), r"rows as long as the weight: got shapes \(3, 4\) and"),
        ((X[None], WEIGHT), r"^x must be a matrix of rows .* \(1, 3, 4\)"),
        ((X, WEIGHT, torch.ones(1, 4)), r"^residual must have x's shape .*: got \(1, 4\) and"),
        ((X, WEIGHT, X.half()), "got .* and torch.float16$"),
        ((torch.ones(4, 3).T, WEIGHT), r"^x must have contiguous rows: got strides \(1, 3\)"),
        ((X, WEIGHT, torch.ones(3, 1).expand(3, 4)), "^residual must have contiguous rows"),
        ((X, torch.ones(8)[::2]), r"^the weight must be contiguous: got strides \(2,\)"),
        ((X, torch.ones(4, device="meta")), "on one device: got cpu and"),
        ((X, torch.ones(4, requires_grad=True)), "weight must be frozen"),
        ((torch.ones(3, 4, requires_grad=True), WEIGHT), "^nothing is recorded for autograd"),
        ((X, WEIGHT, None, torch.ones(3, 5)), r"^out must have x's shape .*: got \(3, 5\) and"),
        ((X, WEIGHT, None, X.half()), "^out must have x's .* and torch.float16$"),
        ((X, WEIGHT, None, torch.ones(4, 3).T), "^out must have contiguous rows"),
        ((X, WEIGHT, None, torch.ones(4).expand(3, 4)), "^out must have rows that do not overlap"),
    ],
    ids=[
        "dtype",
        "width",
        "three dimensions",
        "residual's shape",
        "residual's dtype",
        "scattered",
        "residual scattered",
        "weight scattered",
        "device",
        "trainable",
        "recorded",
        "out's shape",
        "out's dtype",
        "out scattered",
        "out overlaps",
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: tuple[Tensor | None, ...], message: str
) -> None:
    x, weight, residual, out = (*arguments, None, None)[:4]
    assert x is not None
    assert weight is not None
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, EPS, residual, out)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("r", X.double(), "^r must be bfloat16, float16 or float32: got"),
        ("grad_y", X[:2], r"^grad_y must have r's shape .*: got \(2, 4\) and"),
        ("grad_y", torch.ones(()).expand(3, 4), "^grad_y must have contiguous rows"),
        ("grad_r", X.half(), "^grad_r must have r's .* and torch.float16$"),
        ("grad_r", torch.ones(3, 4, requires_grad=True), "^nothing is recorded for autograd"),
        ("rstd", torch.ones(4), r"^rstd must be torch.float32 of shape \(3,\): got"),
        ("rstd", torch.ones(3).half(), "^rstd must be .* got torch.float16"),
        ("rstd", torch.ones(1).expand(3), "^rstd must be contiguous"),
        (
            "rstd",
            torch.ones(3, device="meta"),
            "^rstd and r must be on one device: got meta and cpu",
        ),
        ("weight", torch.ones(5), r"rows as long as the weight: got shapes \(3, 4\) and"),
        ("out", torch.ones(4).expand(3, 4), "^out must have rows that do not overlap"),
        ("y", X[:2], r"^y must have r's shape .*: got \(2, 4\) and"),
        ("y", X.half(), "^y must have r's .* and torch.float16$"),
        ("y", torch.ones(4, 3).T, "^y must have contiguous rows"),
        ("y", torch.ones(4).expand(3, 4), "^y must have rows that do not overlap"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(name: str, value: Tensor, message: str) -> None:
    arguments: dict[str, Any] = {
        "grad_y": X,
        "grad_r": None,
        "r": X,
        "rstd": torch.ones(3),
        "weight": WEIGHT,
    }
    arguments[name] = value
    with pytest.raises(ValueError, match=message):
        rms_norm_backward(**arguments)


def test_a_frozen_pass_takes_what_requires_a_gradient_elsewhere() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        y, r, rstd = rms_norm(x, WEIGHT, EPS)
        grad = rms_norm_backward(torch.ones(3, 4), None, r, rstd, WEIGHT)
    assert r is x
    assert not y.requires_grad
    assert not grad.requires_grad


def compile_forward(
    dtype: torch.dtype,
    width: int,
    has_residual: bool,
    capability: int,
    num_extra: int = 0,
    offset: float = 0.0,
    is_centred: bool = False,
) -> CompiledLaunch:
    x = torch.empty(2, width + num_extra, dtype=dtype)[:, :width]
    weight = torch.empty(width, dtype=dtype)
    residual = x if has_residual else None
    is_long = "CHUNKS" not in shape_of(x, is_centred)
    return compile_launch(
        long_module if is_long else forward_module,
        "_rms_norm_long_kernel" if is_long else "_rms_norm_kernel",
        lambda: forward_module._launch_rms_norm(x, weight, EPS, residual, x, offset, is_centred),
        capability,
    )


def compile_backward(
    dtype: torch.dtype,
    width: int,
    has_grad_r: bool,
    capability: int,
    num_extra: int = 0,
    writes_y: bool = False,
    offset: float = 0.0,
    is_centred: bool = False,
) -> CompiledLaunch:
    x = torch.empty(2, width + num_extra, dtype=dtype)[:, :width]
    weight, rstd = torch.empty(width, dtype=dtype), torch.empty(2)
    grad_r, y = x if has_grad_r else None, x if writes_y else None
    is_long = "CHUNKS" not in shape_of(x, is_centred)
    return compile_launch(
        long_module if is_long else backward_module,
        "_rms_norm_backward_long_kernel" if is_long else "_rms_norm_backward_kernel",
        lambda: backward_module._launch_rms_norm_backward(
            x, grad_r, x, rstd, weight, x, y, offset, is_centred
        ),
        capability,
    )


compile_backward_with_y = partial(compile_backward, writes_y=True)


# all widths for one GPU; for the others a usual one and the largest that registers hold
COMPILED = [
    (dtype, width, capability)
    for dtype in DTYPES
    for capability in GPUS[dtype]
    for width in ([*WIDTHS, 997] if capability == 90 else (4096, 16384))
]


compiled_kernels = pytest.mark.parametrize(
    "compile_kernel",
    [compile_forward, compile_backward, compile_backward_with_y],
    ids=["forward", "backward", "backward with y"],
)


@compiled_kernels
@pytest.mark.parametrize("offset", [0.0, 1.0], ids="offset{:g}".format)
@pytest.mark.parametrize(
    ("dtype", "width", "capability"),
    COMPILED,
    ids=[f"{str(dtype)[6:]}-D{width}-sm{capability}" for dtype, width, capability in COMPILED],
)
def test_kernels_compile_without_spilling(
    compile_kernel: Callable[..., CompiledLaunch],
    dtype: torch.dtype,
    width: int,
    capability: int,
    offset: float,
    record_property: Callable[[str, object], None],
) -> None:
    # with all that can be read, which needs most registers
    compiled = compile_kernel(dtype, width, True, capability, offset=offset)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    assert compiled.find(r"sqrt\.rn\.f32") or compile_kernel is not compile_forward
    assert not compiled.find(r"\.approx|\.full")


# Command-R7B's rows, Command-R's, and Command-R+'s, which are read again
@compiled_kernels
@pytest.mark.parametrize("width", [4096, 8192, 12288])
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [(torch.float16, 75), (torch.bfloat16, 80), (torch.bfloat16, 90)],
    ids=["sm75", "sm80", "sm90"],
)
def test_kernels_that_centre_compile_without_spilling(
    compile_kernel: Callable[..., CompiledLaunch], dtype: torch.dtype, capability: int, width: int
) -> None:
    compiled = compile_kernel(dtype, width, True, capability, is_centred=True)
    compiled.assert_fits(capability)
    assert not compiled.find(r"\.approx|\.full")


@pytest.mark.parametrize("num_extra", [0, 16], ids=["whole", "part of wider rows"])
@pytest.mark.parametrize("has_addend", [False, True], ids=["alone", "with an addend"])
@on_each_gpu(DTYPES)
def test_aligned_rows_are_moved_once_in_vectors_of_16_bytes(
    dtype: torch.dtype, capability: int, has_addend: bool, num_extra: int
) -> None:
    chunks = 4
    forward = compile_forward(dtype, 4096, has_addend, capability, num_extra)
    backward = compile_backward(dtype, 4096, has_addend, capability, num_extra)
    with_y = compile_backward_with_y(dtype, 4096, has_addend, capability, num_extra)
    for compiled, num_read, num_written, scalars in (
        # the row and the weight; rstd is written, or read
        (forward, 2 + has_addend, 1 + has_addend, ("st", 1)),
        (backward, 3 + has_addend, 1, ("ld", 1)),
        (with_y, 3 + has_addend, 2, ("ld", 1)),
    ):
        vectors = {"ld": chunks * num_read, "st": chunks * num_written}
        for way, num_vectors in vectors.items():
            accesses = compiled.find(rf"{way}\.global\S+")
            assert accesses.count(f"{way}.global.v4.b32") == num_vectors
            assert len(accesses) == num_vectors + (scalars[1] if scalars[0] == way else 0)
        # one number a warp, for the sum over the row
        assert compiled.shared_bytes == 4 * compiled.num_threads // 32


def test_a_row_in_one_warp_needs_no_shared_memory() -> None:
    for compiled in (
        compile_forward(torch.bfloat16, 896, True, 90),
        compile_backward(torch.bfloat16, 896, True, 90),
        compile_backward_with_y(torch.bfloat16, 896, True, 90),
    ):
        assert compiled.num_threads == 32
        assert compiled.shared_bytes == 0
        assert not compiled.find(r"bar\.sync")


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernels_are_as_good_as_torch(case: NormCase) -> None:
    actual = norm_results(case, rms_norm, rms_norm_backward, CUDA)
    assert_as_good_as_torch(case, {name: tensor.cpu() for name, tensor in actual.items()})
    for name, tensor in norm_results(case, rms_norm, rms_norm_backward, CUDA).items():
        assert_equal(tensor, actual[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_extra", [0, 16, 3])
@pytest.mark.parametrize("width", [1, 997, 4096, 16400, 20480])
def test_gpu_gradient_over_another_is_that_in_a_new_tensor(
    width: int, num_extra: int, dtype: torch.dtype
) -> None:
    def rows() -> Tensor:
        return torch.randn(257, width + num_extra, device=CUDA).to(dtype)[:, :width]

    grad_y, grad_r, r = rows(), rows(), rows()
    weight = torch.rand(width, device=CUDA).to(dtype)
    result, _, rstd = rms_norm(r, weight, EPS)
    expected = rms_norm_backward(grad_y, grad_r, r, rstd, weight)
    for overwritten in (grad_y, grad_r):
        before = overwritten.clone()
        found = rms_norm_backward(grad_y, grad_r, r, rstd, weight, out=overwritten)
        assert found is overwritten
        assert_equal(found, expected)
        overwritten.copy_(before)
    y = rows()
    assert_equal(rms_norm_backward(grad_y, grad_r, r, rstd, weight, y=y), expected)
    assert_equal(y, result)
    # as a layer does: both gradients give way
    rms_norm_backward(grad_y, grad_r, r, rstd, weight, out=grad_r, y=grad_y)
    assert_equal(grad_r, expected)
    assert_equal(grad_y, result)


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_kernels_reach_beyond_int32() -> None:
    num_rows, width = 524_290, 4096
    assert num_rows * width > 2**31
    x = torch.empty(num_rows, width, dtype=torch.bfloat16, device=CUDA).normal_()
    weight = torch.rand(width, device=CUDA).bfloat16()
    y, _, rstd = rms_norm(x, weight, EPS)
    again = torch.empty_like(y)
    grad = rms_norm_backward(y, None, x, rstd, weight, y=again)
    assert torch.equal(again, y)
    del again
    for rows in (slice(0, 3), slice(num_rows - 3, num_rows)):
        expected, _, expected_rstd = rms_norm(x[rows], weight, EPS)
        assert_equal(y[rows], expected)
        assert_equal(grad[rows], rms_norm_backward(expected, None, x[rows], expected_rstd, weight))
