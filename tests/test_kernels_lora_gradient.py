"""kernels/lora_gradient.py: whole numbers exactly, others as torch does; compiles where it runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ahead_of_time import GPUS, TENSOR_CORE_INSTRUCTION, CompiledLaunch, compile_launch
from support.equality import assert_equal, assert_no_worse_than, assert_summed_in_float32
from support.interpreter import interpreted_results
from support.lora_extension_cases import ExtensionCase
from support.lora_gradient_cases import (
    NUM_MULTIPROCESSORS,
    TINY_GRADIENTS,
    gradient_cases,
    gradient_inputs,
    gradients,
    gradients_by_hand,
    updates_of,
)
from torch import Tensor

from kernels import lora_gradient as module
from kernels.device import H200, meta_stands_for
from kernels.lora_extension import Update
from kernels.lora_gradient import lora_gradient, lora_gradient_reference, one_pass_obstacle
from kernels.lora_gradient_products import add_product

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.bfloat16, torch.float16)
CUDA, META = torch.device("cuda"), torch.device("meta")
CPU_CASES = gradient_cases(
    [(70, (5, 3), (0, 1), 2, 4), (65, (7, 2, 3), (0, 2), 3, 64), (9, (40,), (0,), 33, 64)], DTYPES
)
# rows of Llama-3-8B's groups
GROUPS = {"qkv": (4096, 1024, 1024), "o": (4096,), "gate_up": (14336, 14336)}


def named(cases: list[tuple[int, ExtensionCase]]) -> Any:
    ids = [f"M{num_tokens}-{case}" for num_tokens, case in cases]
    return pytest.mark.parametrize(("num_tokens", "case"), cases, ids=ids)


def case_of(group: str, rank: int, dtype: torch.dtype) -> ExtensionCase:
    rows = GROUPS[group]
    num_ranks = rank * len(rows)
    tail = num_ranks + -num_ranks % 64
    return ExtensionCase(rows, tuple(range(len(rows))), 1, rank, tail, dtype)


def assert_found(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert_equal(found[name], tensor, name)


@named(CPU_CASES + TINY_GRADIENTS)
def test_on_a_cpu_whole_numbers_are_exact(num_tokens: int, case: ExtensionCase) -> None:
    found = gradients(num_tokens, case, lora_gradient)
    assert_found(found, gradients_by_hand(num_tokens, case))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_on_a_cpu_a_product_is_not_rounded_before_it_is_added(dtype: torch.dtype) -> None:
    M = 70
    start, a, b = torch.randn(5, 3), torch.randn(5, M).to(dtype), torch.randn(M, 3).to(dtype)
    total = start.clone()
    add_product(total, a, b, 10 / 3)
    start, a, b = start.double(), a.double(), b.double()
    magnitudes = start.abs() + 10 / 3 * a.abs() @ b.abs()
    # a product each, its factor and what there is
    assert_summed_in_float32(total, start + 10 / 3 * a @ b, magnitudes, M + 2)


@named(TINY_GRADIENTS)
def test_interpreted_kernel_adds_whole_numbers_exactly(
    num_tokens: int, case: ExtensionCase
) -> None:
    results = interpreted_results("lora_gradient")
    found = {name: results[f"M{num_tokens}-{case}/{name}"] for name in ("grad_h", "grad_B")}
    assert_found(found, gradients_by_hand(num_tokens, case))


@pytest.mark.parametrize("num_stripes", [1, 8, 12, 56, 300])
@pytest.mark.parametrize("num_tiles", [1, 2, 31, 32, 128, 1000])
def test_programs_take_all_tiles_and_end_together(num_tiles: int, num_stripes: int) -> None:
    tiles = module._tiles_per_group(num_tiles, num_stripes, 132)
    num_groups = -(-num_tiles // tiles)
    assert 1 <= num_groups <= module.MAX_GROUPS
    # no worse than one group, or as many as fit one round
    rounds = -(-num_groups * num_stripes // 132)
    for other in (1, max(min(132 // num_stripes, num_tiles, module.MAX_GROUPS), 1)):
        other_rounds = -(-other * num_stripes // 132)
        assert rounds * (tiles + 2) <= other_rounds * (-(-num_tiles // other) + 2)


UPDATES = (
    Update(slice(0, 5), slice(0, 3), slice(0, 5), 2.0),
    Update(slice(5, 7), slice(3, 6), slice(5, 7), 2.0),
)
GIVEN = {
    "grad_y": torch.zeros(4, 7),
    "h": torch.zeros(4, 64),
    "sB": torch.zeros(7, 64),
    "grad_h": torch.zeros(4, 64),
    "grad_B": torch.zeros(7, 3),
    "updates": UPDATES,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": torch.zeros(3, 64)}, r"^h and grad_h must be .* \(4, 7\): got \(3, 64\), "),
        ({"grad_h": torch.zeros(4, 32)}, r"^h and grad_h must be .* \(4, 32\) and \(7, 64\)$"),
        ({"sB": torch.zeros(6, 64)}, r"^h and grad_h must be .* and \(6, 64\)$"),
        ({"updates": ()}, "^the gradient of B must have the rows of the updates"),
        ({"grad_B": torch.zeros(8, 3)}, r"^the gradient of B must have .*: got \(8, 3\)$"),
        ({"grad_B": torch.zeros(7, 33)}, r"^the gradient of B must have .*: got \(7, 33\)$"),
        ({"grad_B": torch.zeros(7, 3).half()}, "^the gradient of B must be torch.float32"),
        (
            {"grad_B": torch.zeros(3, 7).T},
            r"^the gradient of B must be contiguous: got strides \(1, 7\)$",
        ),
        ({"h": torch.zeros(4, 64).half()}, "must share a dtype: got torch.float32, torch.float16"),
        ({"grad_h": torch.zeros(64, 4).T}, "must have contiguous rows: got strides"),
        ({"grad_y": torch.zeros(4, 7, device=META)}, "^y's gradient and h must be on one device"),
        ({"grad_B": torch.zeros(7, 3, device=META)}, "gradient of B must be on one device"),
    ],
    ids=[
        "h too short",
        "grad_h too narrow",
        "s B too short",
        "no update",
        "B too long",
        "ranks too many",
        "B in 16 bit",
        "B scattered",
        "dtypes differ",
        "scattered",
        "y elsewhere",
        "B elsewhere",
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_gradient(**(GIVEN | changes))


def compile_kernel(kernel: str, case: ExtensionCase, capability: int) -> CompiledLaunch:
    # nothing is read, so nothing is drawn
    M, N, T = 8192, case.num_rows, case.tail

    def empty(rows: int, columns: int, width: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(rows, width, dtype=dtype, device=META)[:, :columns]

    grad_B = empty(N, case.rank, case.rank, torch.float32)
    matrices = (empty(M, N, N + T), empty(M, T, T), empty(N, T, 4096 + T), empty(M, T, N + T))
    arguments = (*matrices, grad_B, updates_of(case), NUM_MULTIPROCESSORS)
    return compile_launch(
        module, kernel, lambda: module._launch_lora_gradient(*arguments), capability
    )


# all for one GPU; for the others the most updates at the usual rank; not sm_75
COMPILED = [
    (case_of(group, rank, dtype), capability)
    for dtype in HALVES
    for capability in GPUS[dtype]
    for rank in (3, 8, 16)
    for group in GROUPS
    if capability == 90 or (capability >= 80 and (group, rank) == ("qkv", 16))
]


@pytest.mark.parametrize(
    ("case", "capability"),
    COMPILED,
    ids=[f"{case}-sm{capability}" for case, capability in COMPILED],
)
def test_kernels_compile_without_spilling(
    case: ExtensionCase, capability: int, record_property: Callable[[str, object], None]
) -> None:
    for kernel, instruction in (
        ("_lora_gradient_kernel", TENSOR_CORE_INSTRUCTION[capability]),
        ("_lora_gradient_sum_kernel", None),
    ):
        compiled = compile_kernel(kernel, case, capability)
        record_property(kernel, str(compiled))
        compiled.assert_fits(capability)
        compiled.assert_multiplies_as(instruction)


@pytest.mark.parametrize(
    ("capability", "rank", "dtype", "obstacle"),
    [
        ((7, 5), 16, torch.float16, "one pass needs the tensor cores of 8.0 and later, not (7, 5)"),
        ((8, 0), 16, torch.bfloat16, ""),
        ((8, 6), 3, torch.float16, ""),
        ((9, 0), 16, torch.bfloat16, ""),
        ((9, 0), 17, torch.bfloat16, "one pass is for ranks up to 16, not 17"),
        ((12, 1), 16, torch.bfloat16, ""),
        (
            (12, 1),
            16,
            torch.float32,
            "one pass multiplies in bfloat16 or float16, not in torch.float32",
        ),
    ],
    ids=str,
)
def test_one_pass_is_taken_where_there_are_tensor_cores(
    capability: tuple[int, int], rank: int, dtype: torch.dtype, obstacle: str
) -> None:
    with meta_stands_for(H200._replace(capability=capability)):
        grad_y = torch.empty(4, 4, dtype=dtype, device=META)
        assert one_pass_obstacle(grad_y, rank) == obstacle


@pytest.mark.parametrize(
    ("rank", "chosen"), [(16, "_launch_lora_gradient"), (17, "lora_gradient_by_products")]
)
def test_a_gpu_takes_the_one_pass_or_the_products_and_never_both(
    monkeypatch: pytest.MonkeyPatch, rank: int, chosen: str
) -> None:
    taken = []
    for name in ("_launch_lora_gradient", "lora_gradient_by_products", "lora_gradient_reference"):
        monkeypatch.setattr(module, name, lambda *_, name=name: taken.append(name))
    updates = (Update(slice(0, 5), slice(0, rank), slice(0, 5), 2.0),)
    grad_y, h, sB, grad_h = (
        torch.empty(shape, dtype=torch.bfloat16, device=META)
        for shape in ((4, 5), (4, 64), (5, 64), (4, 64))
    )
    lora_gradient(grad_y, h, sB, grad_h, torch.empty(5, rank, device=META), updates)
    assert taken == [chosen]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_an_h100_copies_16_bytes_at_a_time_and_multiplies_them_in_place(
    group: str, dtype: torch.dtype
) -> None:
    compiled = compile_kernel("_lora_gradient_kernel", case_of(group, 16, dtype), 90)
    copies = compiled.find(r"cp\.async\.c\w\.\S+ \[[^]]*\], \[[^]]*\], (\w+)")
    assert copies
    assert set(copies) == {"0x10"}
    assert compiled.find(r"wgmma\.mma_async")
    # a tile does not pass through the registers on its way to either product
    assert not compiled.find("ldmatrix")


# a rest in every direction, and ranks that are no power of two
GPU_CASES = gradient_cases(
    [
        (1, (1,), (0,), 1, 1),
        (1003, (600, 40, 40), (0, 2), 5, 64),
        (8192, GROUPS["qkv"], (0, 1, 2), 16, 64),
        (2048, GROUPS["gate_up"], (0, 1), 16, 64),
        (2111, GROUPS["o"], (0,), 32, 64),
        (300, (576, 192, 192), (0, 1, 2), 64, 192),
        (0, (40,), (0,), 16, 64),
    ],
    HALVES,
)


@pytest.mark.gpu
@named(GPU_CASES + CPU_CASES + TINY_GRADIENTS)
def test_gpu_kernel_adds_whole_numbers_exactly(num_tokens: int, case: ExtensionCase) -> None:
    found = gradients(num_tokens, case, lora_gradient, CUDA)
    expected = gradients_by_hand(num_tokens, case)
    assert_found({name: tensor.cpu() for name, tensor in found.items()}, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rank", [16, 24])
@pytest.mark.parametrize("group", GROUPS)
def test_gpu_kernel_errs_no_more_than_torch_and_repeats_its_bits(
    group: str, rank: int, dtype: torch.dtype
) -> None:
    case = case_of(group, rank, dtype)

    def found(compute: Callable[..., Any], wide: bool = False) -> tuple[Tensor, Tensor]:
        matrices = gradient_inputs(4096, case, CUDA)
        generator = torch.Generator(CUDA).manual_seed(1)
        for matrix in matrices[:3]:
            matrix.mul_(torch.rand(matrix.shape, generator=generator, device=CUDA))
        given = [matrix.double() if wide else matrix for matrix in matrices]
        compute(*given, updates_of(case))
        return given[3], given[4]

    def in_float64(
        grad_y: Tensor, h: Tensor, sB: Tensor, grad_h: Tensor, grad_B: Tensor, *_: Any
    ) -> None:
        torch.mm(grad_y, sB, out=grad_h)
        for update in updates_of(case):
            grad_B[update.B] += update.scaling * grad_y[:, update.y].T @ h[:, update.A]

    actual, again = found(lora_gradient), found(lora_gradient)
    baseline, truth = found(lora_gradient_reference), found(in_float64, wide=True)
    for name, ours, repeated, torchs, true in zip(
        ("grad_h", "grad_B"), actual, again, baseline, truth, strict=True
    ):
        assert_equal(repeated, ours, name)
        assert_no_worse_than(ours, torchs, true, what=name)


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_kernel_reaches_beyond_int32() -> None:
    case = ExtensionCase((262_200, 16), (0, 1), 1, 16, 64, torch.bfloat16)
    assert 8200 * case.num_rows > 2**31
    # a sum of whole numbers that float32 holds, and both round it once
    found = gradients(8200, case, lora_gradient, CUDA)
    matrices = gradient_inputs(8200, case, CUDA)
    lora_gradient_reference(*matrices, updates_of(case))
    assert_equal(found["grad_B"], matrices[4])
    assert_equal(found["grad_h"], matrices[3].contiguous())
