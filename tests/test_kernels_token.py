"""kernels/token_*.py: a pass's kernels for one token against their references and the truth."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ahead_of_time import CompiledLaunch, compile_launch, on_each_gpu
from support.equality import assert_equal, assert_no_worse_than
from support.interpreter import interpreted_results
from support.nf4_cases import WeightCase
from support.token_cases import (
    EPS,
    TINY,
    AttentionCase,
    Case,
    GluCase,
    HeadsCase,
    LinearCase,
    NormCase,
    results,
)
from torch import Tensor
from torch.nn import functional as F

from kernels import nf4_matmul_fused, token_attention, token_glu, token_heads, token_norm
from kernels.low_rank import LowRank
from kernels.rope_tables import RopeTables
from kernels.softcap import ERROR as SOFTCAP_ERROR
from kernels.token_linear import token_linear, token_linear_reference
from nf4.levels import LEVELS
from nf4.weight import NF4Weight, dequantize

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCRIPT = "interpreted_token.py"
REFERENCES: dict[str, Callable[..., Any]] = {
    "norm": token_norm.token_norm_reference,
    "glu": token_glu.token_glu_reference,
    "linear": token_linear_reference,
    "heads": token_heads.token_heads_reference,
    "attn": token_attention.token_attention_reference,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "norm": token_norm.token_norm,
    "glu": token_glu.token_glu,
    "linear": token_linear,
    "heads": token_heads.token_heads,
    "attn": token_attention.token_attention,
}
LLAMA = WeightCase((4096, 1024, 1024), 4096)
# wider than any on a GPU
WIDE = AttentionCase(HeadsCase((0, 150), 4, 2, 1024, torch.float32))


def _rounded(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Expand a weight in float64, whose levels are rounded to `dtype`."""
    ratio = (LEVELS.to(dtype).double() / LEVELS.double()).nan_to_num(1.0)
    exact = dequantize(weight, torch.float32).double()
    # the level of each weight, found by its code
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), -1).flatten().long()
    factors = [
        ratio[codes[2 * span : 2 * span + rows * weight.in_features]].view(rows, -1)
        for span, rows in zip(_byte_starts(weight), weight.rows, strict=True)
    ]
    return exact * torch.cat(factors)


def _byte_starts(weight: NF4Weight) -> list[int]:
    sizes = [rows * weight.in_features // 2 for rows in weight.rows]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def norm_truth(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    A: Tensor,
    is_centred: bool,
) -> tuple[Tensor, ...]:
    r = (x if delta is None else x + delta).double()
    wide = r - r.mean(1, keepdim=True) if is_centred else r
    y = wide / (wide.square().mean(1, keepdim=True) + eps).sqrt() * (weight.double() + offset)
    return y, y @ A.double().T, r


def glu_truth(gate_up: Tensor, activation: str, A: Tensor) -> tuple[Tensor, ...]:
    gate, up = gate_up.double().chunk(2, 1)
    if activation == "clamped_swish":
        gate = gate.clamp(max=7.0)
        y = gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    else:
        y = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    return y, y @ A.double().T


def linear_truth(
    x: Tensor, weight: NF4Weight, bias: Tensor | None, h: Tensor | None, low_rank: LowRank | None
) -> tuple[Tensor, ...]:
    y = x.double() @ _rounded(weight, x.dtype).T
    if low_rank is not None:
        assert h is not None
        start = 0
        for rows, first in zip(weight.rows, low_rank.starts.tolist(), strict=True):
            B = low_rank.B[start : start + rows].double()
            y[:, start : start + rows] += h[:, first : first + B.shape[1]].double() @ B.T
            start += rows
    return (y if bias is None else y + bias.double(),)


def heads_truth(
    qkv: Tensor, keys: Tensor, values: Tensor, places: Any, tables: RopeTables, norms: Any
) -> tuple[Tensor, ...]:
    B, H_kv, _, E = keys.shape
    heads = qkv.view(B, -1, E).double()
    query, key, value = heads.split((heads.shape[1] - 2 * H_kv, H_kv, H_kv), 1)

    def rotated(part: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            part = part / (part.square().mean(-1, keepdim=True) + EPS).sqrt()
            part = part * (weight.double() + norms.offset)
        c, s = (table[places.table].double()[:, None] for table in (tables.cos, tables.sin))
        turned, rest = part[..., : 2 * c.shape[-1]], part[..., 2 * c.shape[-1] :]
        if tables.is_interleaved:
            turned = torch.cat((turned[..., ::2], turned[..., 1::2]), -1)
        x1, x2 = turned.chunk(2, -1)
        turned = torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1)
        if tables.is_interleaved:
            turned = torch.stack(turned.chunk(2, -1), -1).flatten(-2)
        return torch.cat((turned, rest), -1)

    query = rotated(query, norms and norms.query)
    if tables.query_factor is not None:
        query = query * tables.query_factor[places.table].double()[:, None, None]
    key = rotated(key, norms and norms.key)
    return query, key, value


def attention_truth(
    query: Tensor, keys: Tensor, values: Tensor, place: Tensor, scores: Any, A: Tensor | None
) -> tuple[Tensor, ...]:
    rows = []
    for q, k, v, last in zip(query, keys, values, place.tolist(), strict=True):
        first = 0 if scores.window is None else max(0, last + 1 - scores.window)
        shared = q.shape[0] // k.shape[0]
        k = k[:, first : last + 1].double().repeat_interleave(shared, 0)
        v = v[:, first : last + 1].double().repeat_interleave(shared, 0)
        s = (k @ q.double()[:, :, None])[..., 0] * scores.scale
        if scores.cap is not None:
            s = scores.cap * torch.tanh(s / scores.cap)
        if scores.sinks is not None:
            s = torch.cat((s, scores.sinks.double()[:, None]), 1)
            v = F.pad(v, (0, 0, 0, 1))
        rows.append((s.softmax(1)[:, None] @ v).flatten())
    mixed = torch.stack(rows)
    return (mixed,) if A is None else (mixed, mixed @ A.double().T)


TRUTHS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "norm": norm_truth,
    "glu": glu_truth,
    "linear": linear_truth,
    "heads": heads_truth,
    "attn": attention_truth,
}


def softcap_allowance(case: Case, name: str) -> float:
    """What a capped score's error does: a probability errs by twice as much, relatively, and the
    values that it weighs, and A, carry that on."""
    if not isinstance(case, AttentionCase) or case.cap is None:
        return 0.0
    _, _, values, _, _, A = case.inputs(CPU)
    error = 2 * SOFTCAP_ERROR * case.cap * float(values.nan_to_num().abs().max())
    return error if name == "0" else error * float(A.abs().sum(1).max())


def sum_allowance(case: Case, name: str, truth: Tensor) -> float:
    """What a product with A errs by in one number, where torch's own error may be nothing by luck.

    A sum of n terms in float32, added up in pairs, errs by at most log2(n) roundings of the sum of
    their sizes (Higham 2002, section 4.2).
    """
    if not isinstance(case, AttentionCase) or name == "0":
        return 0.0
    _, _, _, _, _, A = case.inputs(CPU)
    sizes = truth.abs() @ A.double().abs().T
    return math.log2(truth.shape[1]) * torch.finfo(torch.float32).eps * float(sizes.max())


def assert_right(kernel: str, case: Case, found: dict[str, Tensor]) -> None:
    """What a kernel returns errs at most twice as much as its reference, plain torch."""
    expected = results(case, REFERENCES[kernel], CPU)
    assert found.keys() == expected.keys()
    truth = TRUTHS[kernel](*case.inputs(CPU))
    for name in found.keys() - {"keys", "values"}:
        allowance = softcap_allowance(case, name) + sum_allowance(case, name, truth[0])
        assert_no_worse_than(
            found[name], expected[name], truth[int(name)], what=name, allowance=allowance
        )
    if isinstance(case, HeadsCase):
        before = dict(zip(("keys", "values"), case.cache(CPU), strict=True))
        sequences = torch.arange(len(case.places))
        for name, exact in zip(("keys", "values"), truth[1:], strict=True):
            at = (sequences, slice(None), case.place(CPU))
            assert_no_worse_than(found[name][at], expected[name][at], exact, what=name)
            # and nothing else was written
            others = torch.ones_like(before[name], dtype=torch.bool)
            others[at] = False
            left, right = (part[name][others].nan_to_num(7.0) for part in (found, before))
            assert torch.equal(left, right), name


TINY_CASES = [(kernel, case) for kernel, cases in TINY.items() for case in cases]


@pytest.mark.parametrize(("kernel", "case"), TINY_CASES, ids=str)
def test_interpreted_kernels_are_as_good_as_torch(kernel: str, case: Case) -> None:
    found = {
        name.removeprefix(f"{case}/"): tensor
        for name, tensor in interpreted_results(kernel, SCRIPT).items()
        if name.startswith(f"{case}/")
    }
    assert_right(kernel, case, found)


@pytest.mark.parametrize(
    "case", [c for c in TINY["attn"] if c.heads.dtype == torch.float32] + [WIDE], ids=str
)
def test_attentions_reference_is_the_truth(case: AttentionCase) -> None:
    found, truth = results(case, FUNCTIONS["attn"], CPU), attention_truth(*case.inputs(CPU))
    # float32 sums of at most 200 tokens
    allowed = 200 * torch.finfo(torch.float32).eps * float(truth[0].abs().max())
    assert float((found["0"] - truth[0]).abs().max()) <= allowed


@pytest.mark.parametrize(("kernel", "case"), TINY_CASES, ids=str)
def test_a_cpu_tensor_takes_the_reference(kernel: str, case: Case) -> None:
    found = results(case, FUNCTIONS[kernel], CPU)
    for name, tensor in results(case, REFERENCES[kernel], CPU).items():
        assert torch.equal(found[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


def test_heads_equal_norm_and_rotation_bit_for_bit() -> None:
    for case in TINY["heads"]:
        if case.has_norms:
            continue
        expected = results(case, REFERENCES["heads"], CPU)
        for name, tensor in interpreted_results("heads", SCRIPT).items():
            if name.startswith(f"{case}/"):
                own = name.removeprefix(f"{case}/")
                assert_equal(tensor.nan_to_num(7.0), expected[own].nan_to_num(7.0), name)


def _launch_norm(dtype: torch.dtype) -> None:
    x, weight, A = torch.empty(1, 4096, dtype=dtype), torch.empty(4096, dtype=dtype), None
    A = torch.empty(48, 4096, dtype=dtype)
    token_norm._launch_token_norm(x, x, weight, EPS, 1.0, A, True)


def _launch_glu(dtype: torch.dtype) -> None:
    gate_up = torch.empty(1, 28672, dtype=dtype)
    token_glu._launch_token_glu(gate_up, "gelu_tanh", torch.empty(16, 14336, dtype=dtype))


def _cache(dtype: torch.dtype, head_dim: int) -> Tensor:
    return torch.empty(2, 8, 64, head_dim, dtype=dtype)


def _launch_heads(
    dtype: torch.dtype,
    rotary_dim: int = 128,
    is_interleaved: bool = False,
    query_factor: Tensor | None = None,
) -> None:
    cache, place = _cache(dtype, 128), torch.zeros(2, dtype=torch.int64)
    qkv, cos = torch.empty(2, 6144, dtype=dtype), torch.empty(64, rotary_dim // 2)
    weight = torch.empty(128, dtype=dtype)
    norms = token_heads.HeadNorms(weight, weight, EPS, 1.0)
    places = token_heads.Places(place, place)
    tables = RopeTables(cos, cos, is_interleaved, query_factor)
    token_heads._launch_token_heads(qkv, cache, cache, places, tables, norms)


def _launch_attention(
    dtype: torch.dtype, head_dim: int = 128, num_splits: int = 16, has_sinks: bool = False
) -> None:
    cache, place = _cache(dtype, head_dim), torch.zeros(2, dtype=torch.int64)
    query, A = torch.empty(2, 32, head_dim, dtype=dtype), torch.empty(16, 32 * head_dim)
    sinks = torch.empty(32, dtype=dtype) if has_sinks else None
    scores = token_attention.TokenScores(0.1, 50.0, 4096, sinks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_attention, "num_splits", lambda device, num_kv_heads: num_splits)
        token_attention._launch_token_attention(query, cache, cache, place, scores, A.to(dtype))


def _launch_linear(dtype: torch.dtype) -> None:
    case = LinearCase(LLAMA, 1, dtype, 16, (0, 2), True)
    nf4_matmul_fused._launch_nf4_matmul_fused(*case.inputs(CPU))


COMPILED: dict[str, tuple[Any, str, Callable[[torch.dtype], None]]] = {
    "norm": (token_norm, "_token_norm_kernel", _launch_norm),
    "glu": (token_glu, "_token_glu_kernel", _launch_glu),
    "heads": (token_heads, "_token_heads_kernel", _launch_heads),
    "heads-partial": (
        token_heads,
        "_token_heads_kernel",
        lambda dtype: _launch_heads(dtype, 96),
    ),
    "heads-interleaved": (
        token_heads,
        "_token_heads_kernel",
        lambda dtype: _launch_heads(dtype, 64, True),
    ),
    "heads-scaled": (
        token_heads,
        "_token_heads_kernel",
        lambda dtype: _launch_heads(dtype, query_factor=torch.ones(64)),
    ),
    "attn": (token_attention, "_token_attention_kernel", _launch_attention),
    "attn-wide": (
        token_attention,
        "_token_attention_kernel",
        lambda dtype: _launch_attention(dtype, 256),
    ),
    "attn-widest": (
        token_attention,
        "_token_attention_kernel",
        lambda dtype: _launch_attention(dtype, 512),
    ),
    # 16 on an H200 for one sequence of 8 kv heads, 32 for 4
    "splits": (token_attention, "_add_splits_kernel", _launch_attention),
    "splits-wide": (
        token_attention,
        "_add_splits_kernel",
        lambda dtype: _launch_attention(dtype, 256, 32),
    ),
    "splits-widest": (
        token_attention,
        "_add_splits_kernel",
        lambda dtype: _launch_attention(dtype, 512, 32),
    ),
    "splits-sinks": (
        token_attention,
        "_add_splits_kernel",
        lambda dtype: _launch_attention(dtype, 64, has_sinks=True),
    ),
    "linear": (nf4_matmul_fused, "_nf4_matmul_fused_kernel", _launch_linear),
}


def compiled(name: str, dtype: torch.dtype, capability: int) -> CompiledLaunch:
    module, kernel, launch = COMPILED[name]
    with pytest.MonkeyPatch.context() as patch:
        if capability < 80:
            patch.setattr(token_attention, "_has_tensor_cores", lambda query: False)
        return compile_launch(module, kernel, lambda: launch(dtype), capability)


@pytest.mark.parametrize("name", COMPILED)
@on_each_gpu((torch.bfloat16, torch.float16, torch.float32))
def test_kernels_compile_without_spilling(
    name: str,
    dtype: torch.dtype,
    capability: int,
    record_property: Callable[[str, object], None],
) -> None:
    if name == "linear" and (dtype == torch.float32 or capability < 80):
        # products that decode a weight take 16 bits and tensor cores alone
        return
    if name == "attn-widest" and dtype == torch.float32 and capability < 80:
        # more than the shared memory of such a GPU, and refused there
        return
    found = compiled(name, dtype, capability)
    record_property("resources", str(found))
    # two registers of the product's, once before its loop, and of the sums, once behind it
    spilled_bytes = {"linear": 16, "splits-widest": 8}
    found.assert_fits(capability, spilled_bytes.get(name, 0))


GPU_CASES: list[Any] = [
    (kernel, case)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for kernel, case in (
        ("norm", NormCase(1, 4096, 48, dtype)),
        ("norm", NormCase(8, 5120, 3, dtype, False, 1.0)),
        ("norm", NormCase(3, 4096, 16, dtype, True, 0.0, True)),
        ("glu", GluCase(1, 14336, 16, dtype)),
        ("glu", GluCase(8, 1111, 3, dtype, "gelu_tanh")),
        ("glu", GluCase(8, 2880, 3, dtype, "clamped_swish")),
        ("heads", HeadsCase((700,), 32, 8, 128, dtype, 1024)),
        ("heads", HeadsCase((0, 63, 64, 199), 4, 2, 96, dtype, has_norms=True)),
        ("heads", HeadsCase((5, 700), 24, 8, 128, dtype, 1024, rotary_dim=96)),
        ("heads", HeadsCase((5, 700), 32, 2, 128, dtype, 1024, rotary_dim=64, is_interleaved=True)),
        ("heads", HeadsCase((5, 700), 32, 8, 128, dtype, 1024, scales_queries=True)),
        ("attn", AttentionCase(HeadsCase((1000,), 32, 8, 128, dtype, 1024), num_ranks=16)),
        ("attn", AttentionCase(HeadsCase((0, 5, 900), 8, 2, 256, dtype, 1024), 30.0, 512)),
        ("attn", AttentionCase(HeadsCase(tuple(range(9)), 6, 6, 64, dtype), num_ranks=2)),
        (
            "attn",
            AttentionCase(
                HeadsCase((40, 700), 64, 8, 64, dtype, 1024),
                None,
                128,
                num_ranks=16,
                has_sinks=True,
            ),
        ),
        # more queries share a key than a product has rows; the most splits of the widest heads
        ("attn", AttentionCase(HeadsCase((40, 700), 40, 1, 80, dtype, 800), num_ranks=40)),
        ("attn", AttentionCase(HeadsCase((513,), 6, 2, 256, dtype, 600), num_ranks=1)),
        ("attn", AttentionCase(HeadsCase((40, 700), 32, 4, 512, dtype, 800), num_ranks=16)),
        ("heads", HeadsCase((5, 700), 32, 4, 512, dtype, 1024)),
    )
] + [
    ("linear", case)
    for dtype in (torch.bfloat16, torch.float16)
    for case in (
        LinearCase(LLAMA, 1, dtype, 16, (0, 2)),
        LinearCase(LLAMA, 8, dtype, 16, (0, 1, 2), True),
        LinearCase(WeightCase((2048, 2048), 1024), 17, dtype, 40, (1,)),
        LinearCase(WeightCase((512,), 14336), 3, dtype, has_bias=True),
        LinearCase(WeightCase((512, 256), 1024), 2, dtype, 130, (0, 1)),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case"), GPU_CASES, ids=str)
@torch.no_grad()
def test_gpu_kernels_are_as_good_as_torch(kernel: str, case: Case) -> None:
    found = results(case, FUNCTIONS[kernel], CUDA)
    assert_right(kernel, case, found)
    # and the same each time
    for name, tensor in results(case, FUNCTIONS[kernel], CUDA).items():
        assert torch.equal(tensor.nan_to_num(7.0), found[name].nan_to_num(7.0)), name
