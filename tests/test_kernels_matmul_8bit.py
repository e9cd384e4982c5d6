"""kernels/matmul_8bit.py, by tiles and by pointers: whole numbers exactly, others as torch does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.ahead_of_time import TENSOR_CORE_INSTRUCTION, compile_launch
from support.cases_8bit import (
    FORMATS,
    TINY_MATMULS,
    MatmulCase,
    Operands,
    product,
    product_by_hand,
    whole_operands,
)
from support.equality import assert_equal, assert_no_worse_than, assert_summed_in_float32
from support.interpreter import interpreted_results
from torch import Tensor

from kernels import matmul_8bit as module
from kernels import matmul_8bit_pointers
from kernels.device import H200, meta_stands_for
from kernels.fp8 import E4M3, Fp8Rows, Fp8Weight, LowRankTail
from kernels.matmul_8bit import matmul_8bit
from kernels.rotation import INT8, EightBitWeight, RotatedRows, empty_rotated_rows
from kernels.rows_8bit import empty_8bit_rows, quantize_rows

CUDA, META = torch.device("cuda"), torch.device("meta")
HALVES = (torch.bfloat16, torch.float16)


def exact_product(case: MatmulCase) -> Tensor:
    return product_by_hand(whole_operands(case)).to(case.dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", TINY_MATMULS, ids=str)
def test_on_a_cpu_whole_numbers_are_exact(case: MatmulCase, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    assert_equal(product(case, matmul_8bit), exact_product(case))


@pytest.mark.parametrize("kernel", ["tiles", "pointers"])
@pytest.mark.parametrize("case", TINY_MATMULS, ids=str)
def test_interpreted_kernels_add_whole_numbers_exactly(case: MatmulCase, kernel: str) -> None:
    results = interpreted_results("matmul_8bit", "interpreted_8bit.py")
    assert_equal(results[f"{kernel}-{case}"], exact_product(case))


def drawn(case: MatmulCase, device: torch.device) -> Operands:
    """Draw a layer's operands: rows quantized with their scales, an update of a tenth of y."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rows = draw(case.M, case.K).to(case.dtype)
    x = quantize_rows(rows, empty_8bit_rows(rows.shape, case.format, device))
    w: EightBitWeight
    if case.format == INT8:
        scales = torch.full((case.N,), 0.02 / 30, device=device)
        w = RotatedRows((draw(case.N, case.K) * 30).round().clamp(-127, 127).to(INT8), scales)
    else:
        w = Fp8Weight((draw(case.N, case.K) * 30).to(E4M3), torch.tensor(0.02 / 30, device=device))
    B = draw(case.T, case.N).T if case.is_B_transposed else draw(case.N, case.T)
    tail = LowRankTail(draw(case.M, case.T).to(case.dtype), (B * 0.02).to(case.dtype))
    bias = draw(case.N).to(case.dtype) if case.has_bias else None
    return Operands(x, w, tail, bias)


def multiplied(compute: Callable[..., Any], case: MatmulCase, operands: Operands) -> Tensor:
    out = torch.empty(case.M, case.N, dtype=case.dtype, device=operands.w.values.device)
    compute(operands.x, operands.w, out, operands.tail, operands.bias)
    return out


def absolute_values(values: Tensor) -> Tensor:
    return values.float().abs().to(values.dtype)


@pytest.mark.parametrize("format", FORMATS, ids=["E4M3", "INT8"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_on_a_cpu_sums_are_those_of_float32(dtype: torch.dtype, format: torch.dtype) -> None:
    case = MatmulCase(20, 48, 160, 64, dtype, has_bias=True, format=format)
    operands = drawn(case, torch.device("cpu"))
    absolute = Operands(
        operands.x._replace(values=absolute_values(operands.x.values)),
        operands.w._replace(values=absolute_values(operands.w.values)),
        operands.tail and LowRankTail(*(part.abs() for part in operands.tail)),
        None if operands.bias is None else operands.bias.abs(),
    )
    assert_summed_in_float32(
        multiplied(matmul_8bit, case, operands),
        product_by_hand(operands),
        product_by_hand(absolute),
        case.K + case.T + 4,
    )


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape).to(dtype)


def half(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.float16)


def fp8(*shape: int) -> Tensor:
    return zeros(*shape, dtype=E4M3)


def int8(*shape: int) -> Tensor:
    return zeros(*shape, dtype=INT8)


X, W = Fp8Rows(fp8(4, 32), zeros(4)), Fp8Weight(fp8(48, 32), zeros())
ROTATED = RotatedRows(int8(4, 32), zeros(4))
GIVEN: dict[str, Any] = {"x": X, "w": W, "out": half(4, 48)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"w": W._replace(values=fp8(48, 48))},
            r"^for x of .*, \(4, 32\), .*: got \(48, 48\)",
        ),
        ({"out": half(4, 32)}, r"got \(48, 32\) and \(4, 32\) in torch.float16$"),
        ({"out": zeros(4, 48)}, "in bfloat16 or float16: got .* in torch.float32$"),
        (
            {"w": W._replace(values=fp8(40, 32)), "out": half(4, 40)},
            "multiples of 16: got 40 and 32; multiply it in 16 bits$",
        ),
        ({"x": X._replace(values=half(4, 32))}, "^x must be torch.float8_e4m3fn"),
        ({"x": ROTATED}, "^W must be torch.int8 .*: got torch.float8_e4m3fn"),
        ({"w": RotatedRows(int8(48, 32), zeros(48))}, "^W must be torch.float8_e4m3fn"),
        (
            {"x": ROTATED, "w": RotatedRows(int8(48, 32), zeros())},
            r"^the scales of W must be .* \(48,\): got .*\(\)",
        ),
        ({"x": X._replace(scales=zeros(5))}, r"^the scales of x must be .* \(4,\): got .*\(5,\)"),
        ({"w": W._replace(scale=zeros(1))}, r"^the scales of W must be .* \(\): got .*\(1,\)"),
        ({"w": W._replace(values=fp8(32, 48).T)}, "^W must have contiguous rows"),
        ({"x": X._replace(values=fp8(4, 40)[:, :32])}, "^x must .* 16 bytes: got a step of 40 byt"),
        (
            {"x": X._replace(values=fp8(4, 48)[:, 8:40])},
            "^x must have rows that begin at",
        ),
        ({"tail": LowRankTail(half(4, 8), half(48, 8))}, "multiple of 16: got 8$"),
        ({"tail": LowRankTail(half(4, 16), half(48, 32))}, r"^B must be .*16\): got .*\(48, 32\)"),
        ({"tail": LowRankTail(zeros(4, 16), half(48, 16))}, "^h must be torch.float16"),
        ({"tail": LowRankTail(half(4, 20)[:, :16], half(48, 16))}, "^h must .*step of 40 bytes"),
        ({"tail": LowRankTail(half(4, 16), half(16, 52)[:, :48].T)}, "^B must .*step of 104 bytes"),
        ({"bias": half(47)}, r"^the bias must be .* \(48,\): got .*\(47,\)"),
        ({"out": half(1, 48).expand(4, 48)}, "^out must have rows that do not overlap"),
        ({"out": half(4, 52)[:, :48]}, "^out must .*step of 104 bytes"),
        ({"out": half(4, 48).to(META)}, "must be on one device"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul_8bit(**(GIVEN | changes))


def meta_arguments(
    M: int = 8192,
    N: int = 4096,
    K: int = 4096,
    T: int = 64,
    is_B_transposed: bool = False,
    format: torch.dtype = E4M3,
) -> tuple[Any, ...]:
    """Make a layer's operands in bfloat16 without values, y as a part of wider rows."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    x = empty_8bit_rows((M, K), format, META)
    w: EightBitWeight = Fp8Weight(empty(N, K, dtype=E4M3), empty(dtype=torch.float32))
    if format == INT8:
        w = empty_rotated_rows((N, K), META)
    B = empty(T, N + 64)[:, :N].T if is_B_transposed else empty(N, K + T)[:, K:]
    tail = LowRankTail(empty(M, K + T)[:, K:], B) if T else None
    return x, w, empty(M, N + 64)[:, :N], tail, None if T else empty(N)


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        ((8, 9), "launch_matmul_8bit_pointers"),
        ((9, 0), "_launch_matmul_8bit"),
        ((10, 3), "_launch_matmul_8bit"),
        ((12, 0), "launch_matmul_8bit_pointers"),
    ],
    ids=str,
)
def test_gpus_take_tiles_or_pointers(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    taken: list[str] = []
    for name in ("launch_matmul_8bit_pointers", "_launch_matmul_8bit"):
        monkeypatch.setattr(module, name, lambda *_, name=name: taken.append(name))
    with meta_stands_for(H200._replace(capability=capability)):
        matmul_8bit(*meta_arguments())
        # no rows, nothing to do
        matmul_8bit(*meta_arguments(M=0))
    assert taken == [chosen]


def test_a_gpu_without_e4m3_is_refused_and_has_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    monkeypatch.setattr(module, "launch_matmul_8bit_pointers", lambda *_: taken.append(True))
    with meta_stands_for(H200._replace(capability=(8, 6))):
        matmul_8bit(*meta_arguments(format=INT8))
        with pytest.raises(RuntimeError, match=r"8\.9 or later: this GPU has \(8, 6\)"):
            matmul_8bit(*meta_arguments())
    assert taken == [True]


# the products of E4M3; those of 16 bits are everywhere the same
E4M3_INSTRUCTION = {
    89: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
    90: "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3",
    100: "tcgen05.mma.cta_group::1.kind::f8f6f4",
    120: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
}
# and of INT8
INT8_INSTRUCTION = {
    80: "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    86: "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    90: "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8",
    100: "tcgen05.mma.cta_group::1.kind::i8",
    120: "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
}


@pytest.mark.parametrize(
    ("T", "is_B_transposed"), [(64, False), (64, True), (192, False), (0, False)], ids=str
)
@pytest.mark.parametrize(
    ("capability", "format"),
    [*((c, E4M3) for c in E4M3_INSTRUCTION), *((c, INT8) for c in INT8_INSTRUCTION)],
    ids=str,
)
def test_kernel_compiles_without_spilling(
    capability: int,
    format: torch.dtype,
    T: int,
    is_B_transposed: bool,
    record_property: Callable[[str, object], None],
) -> None:
    arguments = meta_arguments(T=T, is_B_transposed=is_B_transposed, format=format)
    own = (E4M3_INSTRUCTION if format == E4M3 else INT8_INSTRUCTION)[capability]
    of_pointers = matmul_8bit_pointers, "_matmul_8bit_pointers_kernel"
    with meta_stands_for(H200._replace(capability=(capability // 10, capability % 10))):
        compiled = compile_launch(
            *(of_pointers if capability not in (90, 100) else (module, "_matmul_8bit_kernel")),
            lambda: matmul_8bit(*arguments),
            capability,
        )
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    found = set(compiled.find(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S+"))
    of_16_bits = found - {own}
    assert own in found
    assert bool(of_16_bits) == bool(T)
    instruction = TENSOR_CORE_INSTRUCTION[capability]
    assert instruction is not None
    assert all(name.startswith(instruction) for name in of_16_bits)
    if capability not in (90, 100):
        assert set(compiled.find(r"st\.global\.\S+")) == {"st.global.v4.b32"}
    else:
        assert compiled.find(r"cp\.async\.bulk\.tensor\.2d\.global")
        assert not compiled.find(r"st\.global")
    if capability == 90 and format == E4M3:
        # a step is multiplied while the next one waits for its turn
        assert "wgmma.wait_group.sync.aligned 1" in compiled.find(r"wgmma\.wait_group\S+ \d")


GPU_CASES = [
    *TINY_MATMULS,
    MatmulCase(300, 512, 4096, has_bias=True, is_strided=True),
    MatmulCase(2049, 4096, 1024, 192, is_B_transposed=True),
    MatmulCase(300, 512, 4096, has_bias=True, is_strided=True, format=INT8),
    MatmulCase(2049, 4096, 1024, 192, is_B_transposed=True, format=INT8),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernel_adds_whole_numbers_exactly(case: MatmulCase, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    assert_equal(product(case, matmul_8bit, CUDA).cpu(), exact_product(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [case for case in GPU_CASES if case.M < 2000], ids=str)
def test_gpu_kernel_by_pointers_adds_whole_numbers_exactly(
    case: MatmulCase, dtype: torch.dtype
) -> None:
    case = replace(case, dtype=dtype)
    launch = matmul_8bit_pointers.launch_matmul_8bit_pointers
    assert_equal(product(case, launch, CUDA).cpu(), exact_product(case))


def by_torch(x: Fp8Rows, w: Fp8Weight, out: Tensor, tail: LowRankTail, bias: None) -> None:
    """Multiply as torch does, with fast sums, and add the update to the rounded product."""
    scales = x.scales[:, None], w.scale.expand(1, w.values.shape[0]).contiguous()
    y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x.values, w.values.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    out.copy_(y.addmm_(tail.h, tail.B.T))


@pytest.mark.gpu
@pytest.mark.parametrize("is_B_transposed", [False, True], ids=["B", "B-transposed"])
@pytest.mark.parametrize("K", [4096, 14_336])
def test_gpu_kernel_errs_no_more_than_torch_and_repeats_its_bits(
    K: int, is_B_transposed: bool
) -> None:
    case = MatmulCase(520, 1024, K, 64, torch.bfloat16, is_B_transposed)
    operands = drawn(case, CUDA)
    actual = multiplied(matmul_8bit, case, operands)
    assert_equal(multiplied(matmul_8bit, case, operands), actual)
    assert_no_worse_than(actual, multiplied(by_torch, case, operands), product_by_hand(operands))


@pytest.mark.gpu
def test_gpu_kernel_passes_a_nan_of_a_row_on_to_that_row() -> None:
    x = torch.ones(5, 64, device=CUDA, dtype=torch.bfloat16)
    x[2, 7] = float("nan")
    w = Fp8Weight(torch.ones(32, 64, device=CUDA).to(E4M3), torch.ones((), device=CUDA))
    out = torch.empty(5, 32, dtype=torch.bfloat16, device=CUDA)
    matmul_8bit(quantize_rows(x, empty_8bit_rows(x.shape, E4M3, CUDA)), w, out)
    assert out.isnan().any(1).tolist() == [False, False, True, False, False]
    assert out[2].isnan().all()
    assert (out[3] == 64).all()
