"""kernels/rope.py: equal to the reference, forward and back; rotations as complex numbers do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.ahead_of_time import GPUS, CompiledLaunch, compile_launch, on_each_gpu
from support.equality import assert_equal
from support.interpreter import interpreted_results
from support.layer_cases import (
    TINY_ROPES,
    RopeCase,
    rope_cases,
    rope_inputs,
    rope_results,
    rope_results_of_autograd,
    tables_of,
)
from torch import Tensor

from kernels import rope as forward_module
from kernels import rope_backward as backward_module
from kernels.rope import rope, rope_reference, rotate_reference
from kernels.rope_backward import rope_backward
from kernels.rope_tables import RopeTables
from llama.rope import rope_tables

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA = torch.device("cuda")
EPS = torch.finfo(torch.float32).eps
# Llama 3 8B and 70B, Llama 3.2 1B, SmolLM, 80 columns, the tests' tiny model
HEADS = [(32, 8, 128), (64, 8, 128), (32, 8, 64), (9, 3, 64), (14, 2, 80), (8, 4, 12)]
# of these a part of each head turns, or pairs are interleaved: Phi-4-mini, GLM-4, Command-R
TURNED = [(24, 8, 128, 96, False), (32, 2, 128, 64, True), (64, 8, 128, 128, True)]
# of these queries have a factor: Ministral-3
SCALED = (32, 8, 128, 128, False, True)
CPU_CASES = rope_cases([(0, 5, 2, 1, 8), (1, 1, 1, 1, 2), (3, 31, 8, 4, 12)], DTYPES)
CPU_CASES += rope_cases([(3, 31, 8, 4, 12)], DTYPES, 8)
CPU_CASES += rope_cases([(3, 31, 8, 4, 12)], DTYPES, 8, True)
CPU_CASES += rope_cases([(3, 31, 8, 4, 12)], DTYPES, scales_queries=True)
GPU_CASES = rope_cases(
    [(0, 5, 2, 1, 8), (1, 1, 1, 1, 2), (3, 131, 8, 4, 12)]
    + [(2, 67, *heads) for heads in HEADS]
    + [(1, 2049, 32, 8, 128)],
    DTYPES,
)
for num_heads, num_kv_heads, head_dim, rotary_dim, is_interleaved in TURNED:
    shape = (2, 67, num_heads, num_kv_heads, head_dim)
    GPU_CASES += rope_cases([shape], DTYPES, rotary_dim, is_interleaved)
GPU_CASES += rope_cases([(2, 67, *SCALED[:3]), (3, 131, 9, 3, 12)], DTYPES, scales_queries=True)


def test_rotation_multiplies_complex_numbers() -> None:
    x = torch.randn(2, 3, 7, 10)
    frequencies = torch.rand(5)
    positions = torch.arange(4, 11)
    rotated = rotate_reference(x, RopeTables(*rope_tables(frequencies, positions)))
    pairs = torch.complex(*x.double().chunk(2, dim=-1))
    angles = positions[:, None].double() * frequencies.double()
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((expected.real, expected.imag), dim=-1)
    assert rotated.shape == x.shape
    assert rotated.dtype == x.dtype
    assert rotated.isfinite().all()
    # the angle is rounded once, cosine and sine to two units, the two products and their sum once
    tolerance = (float(angles.max()) + 5) * EPS * 2 * float(x.abs().max())
    assert (rotated.double() - expected).abs().max() <= tolerance


def test_interleaved_pairs_are_neighbours_and_the_rest_stays() -> None:
    x = torch.randn(2, 3, 7, 16)
    cos, sin = rope_tables(torch.rand(5), torch.arange(4, 11))
    halves = x[..., :10].unflatten(-1, (5, 2)).mT.flatten(-2)
    expected = rotate_reference(halves, RopeTables(cos, sin)).unflatten(-1, (2, 5)).mT.flatten(-2)
    rotated = rotate_reference(x, RopeTables(cos, sin, True))
    assert_equal(rotated, torch.cat((expected, x[..., 10:]), -1))
    rotated = rotate_reference(x, RopeTables(cos, sin))
    expected = rotate_reference(x[..., :10].contiguous(), RopeTables(cos, sin))
    assert_equal(rotated, torch.cat((expected, x[..., 10:]), -1))


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(1, 2, 5, 8).bfloat16()
    tables = RopeTables(*rope_tables(torch.tensor([1.0, 0.5, 0.25, 0.125]), torch.arange(5)))
    assert_equal(rotate_reference(x, tables), rotate_reference(x.float(), tables).bfloat16())


def assert_equals_the_reference(case: RopeCase, actual: dict[str, Tensor]) -> None:
    expected = rope_results_of_autograd(case, rope_reference)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, name)


@pytest.mark.parametrize("case", TINY_ROPES, ids=str)
def test_interpreted_kernels_equal_the_reference(case: RopeCase) -> None:
    prefix = f"{case}/"
    actual = {
        name.removeprefix(prefix): tensor
        for name, tensor in interpreted_results("rope").items()
        if name.startswith(prefix)
    }
    assert_equals_the_reference(case, actual)


def forward_of(case: RopeCase) -> Callable[..., Any]:
    return partial(rope, head_dim=case.head_dim)


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_written_out_gradient_equals_autograds(case: RopeCase) -> None:
    assert_equals_the_reference(case, rope_results(case, forward_of(case), rope_backward))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_buffer_is_rotated_row_by_row_and_kept(dtype: torch.dtype) -> None:
    case = RopeCase(2, 5, 3, 1, 12, dtype)
    inputs = rope_inputs(case)
    qkv, positions, cos, sin = (inputs[name] for name in ("qkv", "positions", "cos", "sin"))
    before = qkv.clone()
    query, key, value = rope(qkv, positions, RopeTables(cos, sin), 3, 1, 12)
    assert_equal(qkv, before)
    assert query.shape == (2, 3, 5, 12)
    assert key.shape == value.shape == (2, 1, 5, 12)
    for b in range(2):
        for t in range(5):
            heads = qkv[b, t].view(5, 12)
            row = positions[b, t]
            rotated = rotate_reference(heads, RopeTables(cos[row], sin[row]))
            assert_equal(query[b, :, t], rotated[:3])
            assert_equal(key[b, :, t], rotated[3:4])
            assert_equal(value[b, :, t], heads[4:])


def test_gradient_is_the_rotation_back() -> None:
    # in float64, where the rotation is orthogonal to the last digits
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(7, 5)
    y = rotate_reference(x, RopeTables(angles.cos(), angles.sin()))
    grad_y = torch.randn(2, 3, 7, 10).double()
    (grad,) = torch.autograd.grad(y, x, grad_y)
    # the reference works in float32
    expected = rotate_reference(grad_y, RopeTables(angles.cos(), -angles.sin()))
    assert_equal(grad, expected)


def test_a_query_is_multiplied_by_the_factor_of_its_position() -> None:
    case = RopeCase(2, 5, 3, 1, 12, torch.float32, scales_queries=True)
    inputs = rope_inputs(case)
    qkv, positions, factors = (inputs[name] for name in ("qkv", "positions", "query_factor"))
    # powers of two, which round nothing
    tables = tables_of(case, inputs)._replace(query_factor=2.0 ** (4 * factors).floor())
    found = rope(qkv, positions, tables, 3, 1, 12)
    plain = rope(qkv, positions, tables._replace(query_factor=None), 3, 1, 12)
    assert tables.query_factor is not None
    of_tokens = tables.query_factor[positions][:, None, :, None]
    assert len(of_tokens.unique()) > 2
    for actual, expected in zip(found, (of_tokens * plain[0], *plain[1:]), strict=True):
        assert_equal(actual, expected)


def valid_arguments() -> dict[str, Tensor]:
    inputs = rope_inputs(RopeCase(2, 5, 3, 1, 12, torch.float32))
    return {name: inputs[name] for name in ("qkv", "positions", "cos", "sin")}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qkv", lambda t: t.double(), "^qkv must be bfloat16, float16 or float32: got"),
        ("qkv", lambda t: t[0], "^qkv must have three dimensions"),
        ("qkv", lambda t: t[..., :-12], r"^qkv must be torch.float32 of shape \(2, 5, 60\): got"),
        ("qkv", lambda t: t.mT.contiguous().mT, "^qkv must have contiguous rows: got"),
        ("qkv", lambda t: t[:, :1].expand(2, 5, 60), "^qkv must have rows that do not overlap"),
        ("qkv", lambda t: t.clone().requires_grad_(), "^nothing is recorded for autograd"),
        (
            "positions",
            lambda t: t[:, 1:],
            r"^positions must be .* of shape \(2, 5\): got .* \(2, 4",
        ),
        (
            "positions",
            lambda t: t.float(),
            "^positions must be int32 or int64 .* got torch.float32",
        ),
        ("positions", lambda t: t.to("meta"), "must be on one device"),
        ("cos", lambda t: t.bfloat16(), "^cos and sin must be .* float32 .* got torch.bfloat16"),
        ("cos", lambda t: t.T.contiguous().T, "^cos and sin must be contiguous"),
        ("sin", lambda t: t[:-1], "^cos and sin must be .* float32 matrices of one shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    arguments = valid_arguments()
    arguments[name] = change(arguments[name])
    qkv, positions, cos, sin = arguments.values()
    with pytest.raises(ValueError, match=message):
        rope(qkv, positions, RopeTables(cos, sin), 3, 1, 12)


@pytest.mark.parametrize(
    ("factor", "rotary_dim", "message"),
    [
        (torch.ones(36), 12, r"^query_factor must be torch.float32 of shape \(37,\): got"),
        (torch.ones(37).half(), 12, "^query_factor must be torch.float32 .* got torch.float16"),
        (torch.ones(74)[::2], 12, "^query_factor must be contiguous"),
        (torch.ones(37, device="meta"), 12, "must be on one device"),
        (torch.ones(37), 8, "^all dimensions of a head must turn .* factor: got 8 of 12"),
    ],
)
def test_factors_that_do_not_fit_are_refused(factor: Tensor, rotary_dim: int, message: str) -> None:
    case = RopeCase(2, 5, 3, 1, 12, torch.float32, rotary_dim=rotary_dim)
    inputs = rope_inputs(case)
    tables = tables_of(case, inputs)._replace(query_factor=factor)
    with pytest.raises(ValueError, match=message):
        rope(inputs["qkv"], inputs["positions"], tables, 3, 1, 12)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("grad_q", lambda t: t.double(), "^grad_q must be bfloat16, float16 or float32: got"),
        ("grad_q", lambda t: t[0], "^grad_q and grad_k must have four dimensions"),
        ("grad_q", lambda t: t[..., :8], "^heads must have .* got 8 dimensions and 6 columns"),
        ("grad_q", lambda t: t[..., :7], "^heads must have .* got 7 dimensions and 6 columns"),
        (
            "grad_q",
            lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
            "^grad_q must have contiguous heads: got",
        ),
        ("grad_k", lambda t: t.half(), "^grad_k must be torch.float32 .* got torch.float16"),
        ("grad_k", lambda t: t[:1], r"^grad_k must be .* of shape \(2, 1, 5, 12\)"),
        # the gradient of a sum is one number
        (
            "grad_v",
            lambda t: torch.ones(()).expand(t.shape),
            "^grad_v must have contiguous heads: got",
        ),
        ("grad_v", lambda t: t.clone().requires_grad_(), "^nothing is recorded for autograd"),
        (
            "positions",
            lambda t: t[:, 1:],
            r"^positions must be .* of shape \(2, 5\): got .* \(2, 4",
        ),
        ("positions", lambda t: t.to("meta"), "must be on one device"),
        ("out", lambda t: t[..., :-12], r"^out must be torch.float32 of shape \(2, 5, 60\): got"),
        ("out", lambda t: t[:1].expand(2, 5, 60), "^out must have rows that do not overlap"),
        ("out", lambda t: t.half(), "^out must be torch.float32 .* got torch.float16"),
        ("out", lambda t: t.to("meta"), "must be on one device"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    arguments = rope_inputs(RopeCase(2, 5, 3, 1, 12, torch.float32))
    del arguments["query_factor"]
    arguments["out"] = arguments.pop("qkv")
    arguments[name] = change(arguments[name])
    tables = RopeTables(arguments.pop("cos"), arguments.pop("sin"))
    with pytest.raises(ValueError, match=message):
        rope_backward(**arguments, tables=tables)


def tables_for(head_dim: int, *turned: Any) -> RopeTables:
    rotary_dim, is_interleaved, *scaled = turned or (head_dim, False)
    table = torch.zeros(64, rotary_dim // 2)
    return RopeTables(table, table, is_interleaved, torch.ones(64) if scaled else None)


def compile_forward(dtype: torch.dtype, heads: tuple[Any, ...], capability: int) -> CompiledLaunch:
    num_heads, num_kv_heads, head_dim, *_ = heads
    qkv = torch.empty(2, 32, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    positions, tables = torch.zeros(2, 32, dtype=torch.int64), tables_for(*heads[2:])
    return compile_launch(
        forward_module,
        "_rope_kernel",
        lambda: forward_module._launch_rope(qkv, positions, tables, num_heads, num_kv_heads),
        capability,
    )


def compile_backward(
    dtype: torch.dtype, heads: tuple[Any, ...], capability: int, num_extra: int = 0
) -> CompiledLaunch:
    num_heads, num_kv_heads, head_dim, *_ = heads
    width = (num_heads + 2 * num_kv_heads) * head_dim
    out = torch.empty(2, 32, width + num_extra, dtype=dtype)[..., :width]
    grad_q = torch.empty(2, 32, num_heads, head_dim, dtype=dtype).transpose(1, 2)
    grad_k = torch.empty(2, 32, num_kv_heads, head_dim, dtype=dtype).transpose(1, 2)
    positions, tables = torch.zeros(2, 32, dtype=torch.int64), tables_for(*heads[2:])
    return compile_launch(
        backward_module,
        "_rope_backward_kernel",
        lambda: backward_module._launch_rope_backward(
            grad_q, grad_k, grad_k, positions, tables, out
        ),
        capability,
    )


COMPILED = [
    (dtype, heads, capability)
    for dtype in DTYPES
    for capability in GPUS[dtype]
    for heads in (
        [*HEADS, *TURNED, SCALED] if capability == 90 else [*HEADS[:2], *TURNED[:2], SCALED]
    )
]


@pytest.mark.parametrize("compile_kernel", [compile_forward, compile_backward])
@pytest.mark.parametrize(
    ("dtype", "heads", "capability"),
    COMPILED,
    ids=[
        f"{str(dtype)[6:]}-H{heads[0]}+{'x'.join(map(str, heads[1:]))}-sm{capability}"
        for dtype, heads, capability in COMPILED
    ],
)
def test_kernels_compile_without_spilling(
    compile_kernel: Callable[..., CompiledLaunch],
    dtype: torch.dtype,
    heads: tuple[Any, ...],
    capability: int,
    record_property: Callable[[str, object], None],
) -> None:
    compiled = compile_kernel(dtype, heads, capability)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    # each product is rounded, as in torch
    assert not compiled.find("fma")


@on_each_gpu(DTYPES)
def test_heads_are_moved_once_in_vectors_of_16_bytes_past_shared_memory(
    dtype: torch.dtype, capability: int
) -> None:
    # of a tile, 16 heads of 128 in 16 bit: 32 heads are two, 8 are half of one
    per_tile = 16 * 2 // dtype.itemsize
    forward_tiles = -(-40 // per_tile)
    backward_tiles = 32 // per_tile + 2 * -(-8 // per_tile)
    # 8 angles a thread in 16 bit, 4 in float32
    angles = 2 * (2 if dtype.itemsize == 2 else 1)
    for compiled, most_tiles in (
        (
            compile_forward(dtype, HEADS[0], capability),
            min(forward_tiles, forward_module.MAX_TILES),
        ),
        (compile_backward(dtype, HEADS[0], capability), backward_tiles),
        (compile_backward(dtype, HEADS[0], capability, num_extra=16), backward_tiles),
    ):
        assert compiled.shared_bytes == 0
        assert not compiled.find(r"bar\.sync")
        stores = compiled.find(r"st\.global\S+")
        assert stores == ["st.global.v4.b32"] * 2 * most_tiles
        loads = compiled.find(r"ld\.global\S+")
        # and the position
        assert sorted(loads) == ["ld.global.b64"] + ["ld.global.v4.b32"] * (2 * most_tiles + angles)


# of the gradient, what does not turn is copied in narrower tiles
@pytest.mark.parametrize(
    ("compile_kernel", "heads"),
    [(compile_forward, heads) for heads in TURNED] + [(compile_backward, TURNED[2])],
)
def test_parts_of_heads_and_interleaved_pairs_are_moved_in_vectors_of_16_bytes_too(
    compile_kernel: Callable[..., CompiledLaunch], heads: tuple[Any, ...]
) -> None:
    compiled = compile_kernel(torch.bfloat16, heads, 90)
    assert compiled.shared_bytes == 0
    accesses = set(compiled.find(r"(?:st|ld)\.global\S+"))
    # and the position
    assert accesses == {"ld.global.b64", "ld.global.v4.b32", "st.global.v4.b32"}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernels_equal_the_reference(case: RopeCase) -> None:
    for _ in range(2):
        actual = rope_results(case, forward_of(case), rope_backward, CUDA)
        assert_equals_the_reference(case, {name: t.cpu() for name, t in actual.items()})


@pytest.mark.gpu
def test_gpu_results_lie_in_the_buffer_and_its_other_columns_stay() -> None:
    case = RopeCase(2, 5, 3, 1, 12, torch.bfloat16)
    inputs = rope_inputs(case, CUDA)
    wide = torch.full((2, 5, 64), 777.0, dtype=torch.bfloat16, device=CUDA)
    wide[..., :60] = inputs["qkv"]
    tables = tables_of(case, inputs)
    query, key, value = rope(wide[..., :60], inputs["positions"], tables, 3, 1, 12)
    assert query.data_ptr() == wide.data_ptr()
    assert key.data_ptr() == wide[..., 36:].data_ptr()
    assert value.data_ptr() == wide[..., 48:].data_ptr()
    assert bool((wide[..., 60:] == 777).all())


@pytest.mark.gpu
def test_gpu_position_beyond_the_tables_gives_nan() -> None:
    case = RopeCase(1, 3, 2, 1, 8, torch.float32)
    inputs = rope_inputs(case, CUDA)
    positions = torch.tensor([[0, -1, inputs["cos"].shape[0]]], device=CUDA)
    query, key, value = rope(inputs["qkv"], positions, tables_of(case, inputs), 2, 1, 8)
    for rotated in (query, key):
        assert bool(rotated[:, :, 0].isfinite().all())
        assert bool(rotated[:, :, 1:].isnan().all())
    assert bool(value.isfinite().all())


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_kernels_reach_beyond_int32() -> None:
    num_tokens, width = 2**31 // 6144 + 100, 6144
    assert num_tokens * width > 2**31
    qkv = torch.empty(1, num_tokens, width, dtype=torch.bfloat16, device=CUDA).normal_()
    last = qkv[:, -3:].clone()
    positions = torch.arange(num_tokens, device=CUDA).remainder(7)[None]
    angles = torch.rand(7, 64, device=CUDA)
    tables = RopeTables(angles.cos(), angles.sin())
    expected = rope_reference(last, positions[:, -3:], tables, 32, 8)
    found = rope(qkv, positions, tables, 32, 8, 128)
    for actual, reference in zip(found, expected, strict=True):
        assert_equal(actual[:, :, -3:], reference)
    grad = rope_backward(*found, positions, tables)
    short = rope_backward(*expected, positions[:, -3:], tables)
    assert_equal(grad[:, -3:], short)
