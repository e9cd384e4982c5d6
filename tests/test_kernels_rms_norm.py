"""kernels/rms_norm.py: no worse than torch, interpreted and on a GPU; compiles for 4 GPUs."""

import re
from collections.abc import Callable

import pytest
import torch
from ahead_of_time import CompiledLaunch, compile_launch
from equality import assert_equal, assert_no_worse_than
from interpreter import interpreted_results
from layer_cases import EPS, TINY_NORMS, NormCase, norm_cases, norm_inputs, norm_results
from torch import Tensor

from kernels import rms_norm as module
from kernels.rms_norm import rms_norm, rms_norm_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITIES = [80, 89, 90, 100]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# hidden sizes of real models, and rows that are read twice
WIDTHS = [576, 896, 2048, 4096, 5120, 8192, 16384, 20480]
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


def reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return rms_norm_reference(x, weight, eps, residual)


def public(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight, eps, residual)


def truth_of(case: NormCase) -> dict[str, Tensor]:
    """In float64, but for r, which is rounded before it is normalized."""
    inputs = norm_inputs(case)
    rounded = inputs["x"] + inputs["residual"] if case.has_residual else inputs["x"]
    r = rounded.double().requires_grad_()
    weight = inputs["weight"].double()
    y = weight * r / (r.square().mean(dim=1, keepdim=True) + EPS).sqrt()
    (grad,) = torch.autograd.grad(y, r, inputs["grad_y"].double())
    if case.has_grad_r:
        grad = grad + inputs["grad_r"].double()
    results = {"y": y.detach(), "r": rounded.double(), "grad_x": grad}
    return results | ({"grad_residual": grad} if case.has_residual else {})


def assert_as_good_as_torch(case: NormCase, actual: dict[str, Tensor]) -> None:
    """Rows differ in scale, so each is compared with its own truth."""
    truth, baseline = truth_of(case), norm_results(case, reference)
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        assert actual[name].shape == expected.shape, name
        for row in range(case.num_rows):
            assert_no_worse_than(
                actual[name][row], baseline[name][row], expected[row], what=f"{name}[{row}]"
            )
    assert_equal(actual["r"], baseline["r"], "r")


@pytest.mark.parametrize("case", TINY_NORMS, ids=str)
def test_interpreted_kernels_are_as_good_as_torch(case: NormCase) -> None:
    prefix = f"{case}/"
    actual = {
        name.removeprefix(prefix): tensor
        for name, tensor in interpreted_results().items()
        if name.startswith(prefix)
    }
    assert_as_good_as_torch(case, actual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_tensor_is_normalized_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    for case in norm_cases([(7, 97)], (dtype,)):
        inputs = norm_inputs(case)
        residual = inputs["residual"] if case.has_residual else None
        y, r = rms_norm(inputs["x"], inputs["weight"], EPS, residual)
        added = inputs["x"] if residual is None else inputs["x"] + residual
        wide = added.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)
        assert_equal(r, added)
        assert_equal(y, (wide * scale * inputs["weight"].float()).to(dtype))


def test_leading_dimensions_are_kept() -> None:
    x, residual, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.rand(8)
    y, r = rms_norm(x, weight, EPS, residual)
    flat_y, flat_r = rms_norm(x.view(6, 8), weight, EPS, residual.view(6, 8))
    assert_equal(y, flat_y.view(2, 3, 8))
    assert_equal(r, flat_r.view(2, 3, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 4).int(), torch.ones(4)), "^x must be bfloat16, float16 or float32: got"),
        ((torch.ones(3, 4), torch.ones(5)), r"rows as long as the weight: got shapes \(3, 4\) and"),
        ((torch.ones(3, 4), torch.ones(4), torch.ones(1, 4)), r"x's shape .*: got \(1, 4\) and"),
        ((torch.ones(3, 4), torch.ones(4), torch.ones(3, 4).half()), "got .* and torch.float16$"),
        ((torch.ones(3, 4), torch.ones(4, device="meta")), "on one device: got cpu and"),
        ((torch.ones(3, 4), torch.ones(4, requires_grad=True)), "weight must be frozen"),
    ],
    ids=["dtype", "width", "residual's shape", "residual's dtype", "device", "trainable"],
)
def test_arguments_that_do_not_fit_are_refused(arguments: tuple[Tensor, ...], message: str) -> None:
    x, weight, *residual = arguments
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, EPS, *residual)


def compile_forward(
    dtype: torch.dtype, width: int, has_residual: bool, capability: int
) -> CompiledLaunch:
    x, weight = torch.empty(2, width, dtype=dtype), torch.empty(width, dtype=dtype)
    residual = x if has_residual else None
    return compile_launch(
        module,
        "_rms_norm_kernel",
        lambda: module._launch_rms_norm(x, weight, EPS, residual),
        capability,
    )


def compile_backward(
    dtype: torch.dtype, width: int, has_grad_r: bool, capability: int
) -> CompiledLaunch:
    x, weight = torch.empty(2, width, dtype=dtype), torch.empty(width, dtype=dtype)
    grad_r = x if has_grad_r else None
    return compile_launch(
        module,
        "_rms_norm_backward_kernel",
        lambda: module._launch_rms_norm_backward(x, grad_r, x, torch.empty(2), weight),
        capability,
    )


# all widths for one GPU; for the others a usual one and the largest that registers hold
COMPILED = [
    (dtype, width, capability)
    for capability in CAPABILITIES
    for dtype in DTYPES
    for width in ([*WIDTHS, 997] if capability == 90 else (4096, 16384))
]


@pytest.mark.parametrize("compile_kernel", [compile_forward, compile_backward])
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
    record_property: Callable[[str, object], None],
) -> None:
    # with all that can be read, which needs most registers
    compiled = compile_kernel(dtype, width, True, capability)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    assert "sqrt.rn.f32" in compiled.ptx or compile_kernel is compile_backward
    assert not re.search(r"\.approx|\.full", compiled.ptx)


@pytest.mark.parametrize("has_addend", [False, True], ids=["alone", "with an addend"])
@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_rows_are_moved_once_in_vectors_of_16_bytes(
    dtype: torch.dtype, capability: int, has_addend: bool
) -> None:
    chunks = 4
    forward = compile_forward(dtype, 4096, has_addend, capability)
    backward = compile_backward(dtype, 4096, has_addend, capability)
    for compiled, num_read, num_written, scalars in (
        # the row and the weight; rstd is written, or read
        (forward, 2 + has_addend, 1 + has_addend, ("st", 1)),
        (backward, 3 + has_addend, 1, ("ld", 1)),
    ):
        vectors = {"ld": chunks * num_read, "st": chunks * num_written}
        for way, num_vectors in vectors.items():
            accesses = re.findall(rf"{way}\.global\S+", compiled.ptx)
            assert accesses.count(f"{way}.global.v4.b32") == num_vectors
            assert len(accesses) == num_vectors + (scalars[1] if scalars[0] == way else 0)
        # one number a warp, for the sum over the row
        assert compiled.shared_bytes == 4 * compiled.num_threads // 32


def test_a_row_in_one_warp_needs_no_shared_memory() -> None:
    for compiled in (
        compile_forward(torch.bfloat16, 896, True, 90),
        compile_backward(torch.bfloat16, 896, True, 90),
    ):
        assert compiled.num_threads == 32
        assert compiled.shared_bytes == 0
        assert "bar.sync" not in compiled.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernels_are_as_good_as_torch(case: NormCase) -> None:
    actual = norm_results(case, public, CUDA)
    assert_as_good_as_torch(case, {name: tensor.cpu() for name, tensor in actual.items()})
    for name, tensor in norm_results(case, public, CUDA).items():
        assert_equal(tensor, actual[name], name)


@pytest.mark.gpu
def test_gpu_without_a_residual_the_stream_is_x_itself() -> None:
    x = torch.randn(2, 3, 64, device=CUDA)
    _, r = rms_norm(x, torch.ones(64, device=CUDA), EPS)
    assert r.data_ptr() == x.data_ptr()
    assert r.shape == x.shape


@pytest.mark.gpu
def test_gpu_gradient_of_a_stream_alone_passes_through() -> None:
    x = torch.randn(5, 64, device=CUDA, requires_grad=True)
    residual = torch.randn(5, 64, device=CUDA, requires_grad=True)
    _, r = rms_norm(x, torch.ones(64, device=CUDA), EPS, residual)
    grad_r = torch.randn(5, 64, device=CUDA)
    for grad in torch.autograd.grad(r, (x, residual), grad_r):
        assert_equal(grad, grad_r)


@pytest.mark.gpu
def test_gpu_gradients_of_any_layout_are_taken() -> None:
    x = torch.randn(6, 96, device=CUDA, requires_grad=True)
    weight = torch.rand(96, device=CUDA)
    y, _ = rms_norm(x, weight, EPS)
    # the gradient of a sum is one number, that of a transposed matrix is scattered
    for grad_y in (torch.ones((), device=CUDA).expand(6, 96), torch.randn(96, 6, device=CUDA).T):
        (actual,) = torch.autograd.grad(y, x, grad_y, retain_graph=True)
        (expected,) = torch.autograd.grad(y, x, grad_y.contiguous(), retain_graph=True)
        assert_equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_kernels_reach_beyond_int32() -> None:
    num_rows, width = 524_290, 4096
    assert num_rows * width > 2**31
    x = torch.empty(num_rows, width, dtype=torch.bfloat16, device=CUDA).normal_()
    weight = torch.rand(width, device=CUDA).bfloat16()
    y, _, rstd = module._launch_rms_norm(x, weight, EPS, None)
    grad = module._launch_rms_norm_backward(y, None, x, rstd, weight)
    for rows in (slice(0, 3), slice(num_rows - 3, num_rows)):
        expected, _, expected_rstd = module._launch_rms_norm(x[rows], weight, EPS, None)
        assert_equal(y[rows], expected)
        assert_equal(
            grad[rows],
            module._launch_rms_norm_backward(expected, None, x[rows], expected_rstd, weight),
        )
