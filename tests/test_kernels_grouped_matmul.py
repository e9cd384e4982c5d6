"""kernels/grouped_matmul.py: whole numbers exactly, others as torch does; compiles for each GPU."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.ahead_of_time import (
    GPUS,
    SHARED_BYTES_LIMIT,
    TENSOR_CORE_INSTRUCTION,
    CompiledLaunch,
    compile_launch,
    on_each_gpu,
)
from support.equality import assert_equal, assert_no_worse_than, assert_summed_in_float32
from support.grouped_matmul_cases import (
    TINY_GROUPS,
    TINY_ODD_GROUPS,
    GroupedCase,
    grouped_cases,
    grouped_inputs,
    grouped_product,
    grouped_product_by_hand,
    ways,
)
from support.interpreter import interpreted_results
from torch import Tensor

from kernels import grouped_matmul as module
from kernels import grouped_matmul_copied as copied_module
from kernels.ahead import _form_of
from kernels.device import H200, Properties
from kernels.grouped_matmul import grouped_matmul, grouped_matmul_backward_input
from kernels.grouped_matmul_copied import copied_obstacle
from kernels.grouped_matmul_tiles import most_tiles
from kernels.language import TensorDescriptor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.bfloat16, torch.float16)
CUDA, META = torch.device("cuda"), torch.device("meta")
PRODUCTS = {False: grouped_matmul, True: grouped_matmul_backward_input}
LAUNCHES = {
    "loaded": (module, "_grouped_matmul_kernel", module._launch_grouped_matmul),
    "copied": (
        copied_module,
        "_grouped_matmul_copied_kernel",
        copied_module._launch_grouped_matmul_copied,
    ),
}
CPU_CASES = grouped_cases(
    [((4, 0, 7), 5, 6), ((0, 0, 3), 2, 3, 1, 1), ((0, 0), 4, 4)], (torch.bfloat16,)
)
ALL_CASES = TINY_GROUPS + TINY_ODD_GROUPS + CPU_CASES
both_ways = pytest.mark.parametrize("is_transposed", [False, True], ids=["forward", "backward"])


@pytest.mark.parametrize(("case", "is_transposed"), ways(ALL_CASES), ids=str)
def test_on_a_cpu_whole_numbers_are_exact(case: GroupedCase, is_transposed: bool) -> None:
    found = grouped_product(case, is_transposed, PRODUCTS[is_transposed])
    assert_equal(found, grouped_product_by_hand(case, is_transposed))


@pytest.mark.parametrize(
    ("kernel", "case", "is_transposed"),
    [("copied", *way) for way in ways(TINY_GROUPS)]
    + [("loaded", *way) for way in ways(TINY_GROUPS + TINY_ODD_GROUPS)],
    ids=str,
)
def test_interpreted_kernels_add_whole_numbers_exactly(
    kernel: str, case: GroupedCase, is_transposed: bool
) -> None:
    found = interpreted_results("grouped_matmul")[f"{kernel}-{case}-{is_transposed}"]
    assert_equal(found, grouped_product_by_hand(case, is_transposed))


@both_ways
def test_a_new_result_has_the_dtype_of_the_rows(is_transposed: bool) -> None:
    case = GroupedCase((2, 3), 4, 6, torch.bfloat16)
    given = grouped_inputs(case, is_transposed)
    found = PRODUCTS[is_transposed](given["x"], given["W"], given["offsets"])
    assert_equal(found, grouped_product_by_hand(case, is_transposed))


@pytest.mark.parametrize("num_experts", [1, 5, 128])
@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 1000])
def test_there_are_never_more_tiles_than_programs_for_them(num_rows: int, num_experts: int) -> None:
    tile = copied_module.TILE
    bound = most_tiles(num_rows, num_experts, 300, tile)
    for _ in range(20):
        cuts = torch.randint(num_rows + 1, (num_experts - 1,)).sort().values.tolist()
        sizes = [stop - start for start, stop in pairwise([0, *cuts, num_rows])]
        assert sum(-(-size // tile.BLOCK_M) for size in sizes) * -(-300 // tile.BLOCK_N) <= bound


GIVEN: dict[str, Any] = {
    "x": torch.zeros(4, 6),
    "W": torch.zeros(2, 5, 6),
    "offsets": torch.tensor([0, 1, 4, 4], dtype=torch.int32),
    "out": torch.zeros(4, 5),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4, 6).int()}, "^x must be bfloat16, float16 or float32"),
        ({"x": torch.zeros(6)}, r"^x must be a matrix as wide as dimension 2 of W.* \(6,\)"),
        ({"x": torch.zeros(4, 5)}, r"^x must be a matrix as wide .* \(4, 5\) and \(2, 5, 6\)$"),
        ({"W": torch.zeros(5, 6)}, r"^x must be a matrix as wide .* and \(5, 6\)$"),
        ({"W": torch.zeros(4, 5, 6)}, "^W must have .* of the 3 experts .*: got 4 from expert 0"),
        ({"first_expert": 2}, "^W must have .*: got 2 from expert 2 on$"),
        ({"first_expert": -1}, "^W must have .*: got 2 from expert -1 on$"),
        ({"W": torch.zeros(2, 5, 6).half()}, "^W must be torch.float32 of shape"),
        ({"offsets": torch.tensor([0, 1, 4, 4])}, "^offsets must be torch.int32"),
        (
            {"offsets": torch.zeros(8, dtype=torch.int32)[::2]},
            r"^offsets must be contiguous: got strides \(2,\)",
        ),
        ({"x": torch.zeros(6, 4).T}, "^x must have contiguous rows"),
        ({"W": torch.zeros(2, 6, 5).mT}, "^W must have contiguous rows"),
        ({"out": torch.zeros(4, 6)}, r"^out must be torch.float32 of shape \(4, 5\)"),
        ({"out": torch.zeros(4, 5).half()}, "^out must be torch.float32"),
        ({"out": torch.zeros(5, 4).T}, "^out must have contiguous rows"),
        ({"out": torch.zeros(1, 5).expand(4, 5)}, "^out must have rows that do not overlap"),
        ({"W": torch.zeros(2, 5, 6, device=META)}, "^x and W must be on one device"),
        ({"out": torch.zeros(4, 5, device=META)}, "^x and out must be on one device"),
        ({"x": torch.zeros(4, 6, requires_grad=True)}, "^nothing is recorded for autograd"),
        ({"bias": torch.zeros(3, 5)}, r"^bias must be torch.float32 of shape \(2, 5\)"),
        ({"bias": torch.zeros(2, 5).int()}, "^bias must be bfloat16, float16 or float32"),
        ({"bias": torch.zeros(5, 2).T}, "^bias must be contiguous"),
        ({"bias": torch.zeros(2, 5, device=META)}, "^x and bias must be on one device"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(GIVEN | changes))


def test_a_gradient_that_does_not_fit_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"^grad must be .* dimension 1 of W, of three"):
        grouped_matmul_backward_input(GIVEN["x"], GIVEN["W"], GIVEN["offsets"])


def halves(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def odd_address(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows * columns + 1).bfloat16()[1:].view(rows, columns)


SM80, SM120 = Properties((8, 0), 108, 163 << 10), Properties((12, 0), 188, 99 << 10)


@pytest.mark.parametrize(
    ("x", "W", "y", "gpu", "obstacle"),
    [
        (halves(9, 16), halves(2, 32, 16), halves(9, 32), H200, ""),
        (halves(9, 32)[:, :16], halves(2, 32, 48)[..., 16:32], halves(9, 48)[:, :32], H200, ""),
        (halves(9, 16), halves(2, 32, 16), halves(9, 32), H200._replace(capability=(10, 0)), ""),
        (halves(9, 16), halves(2, 32, 16), halves(9, 32), SM80, "from 9.0 on"),
        (halves(9, 16), halves(2, 32, 16), halves(9, 32), SM120, "232,448 bytes"),
        (halves(9, 16).float(), halves(2, 32, 16), halves(9, 32), H200, "not in torch.float32"),
        (halves(9, 8), halves(2, 32, 8), halves(9, 32), H200, "multiples of 16"),
        (halves(9, 16), halves(2, 24, 16), halves(9, 24), H200, "multiples of 16"),
        (halves(9, 16)[:, :8], halves(2, 32, 16)[..., :8], halves(9, 32), H200, "multiples of 16"),
        (halves(9, 24)[:, :16], halves(2, 32, 16), halves(9, 32), H200, "multiples of 16"),
        (halves(9, 16), halves(2, 32, 24)[..., :16], halves(9, 32), H200, "multiples of 16"),
        (halves(9, 16), halves(2, 32, 16), halves(9, 40)[:, :32], H200, "multiples of 16"),
        (halves(9, 16)[:, :0], halves(2, 32, 16)[..., :0], halves(9, 32), H200, "not 0"),
        (halves(1, 16).expand(9, 16), halves(2, 32, 16), halves(9, 32), H200, "multiples of 16"),
        (halves(9, 16), halves(1, 32, 16).expand(2, 32, 16), halves(9, 32), H200, "multiples"),
        (odd_address(9, 16), halves(2, 32, 16), halves(9, 32), H200, "addresses"),
    ],
    ids=[
        "fits",
        "strided",
        "sm100",
        "sm80",
        "sm120",
        "float32",
        "narrow x",
        "odd columns",
        "odd part",
        "odd rows of x",
        "odd rows of W",
        "odd rows of y",
        "no columns",
        "repeated row",
        "repeated matrix",
        "odd address",
    ],
)
def test_tiles_are_copied_where_hardware_can(
    x: Tensor, W: Tensor, y: Tensor, gpu: Properties, obstacle: str
) -> None:
    found = copied_obstacle(x, W, y, gpu)
    assert obstacle in found
    assert bool(obstacle) == bool(found)


@pytest.mark.parametrize(
    ("width", "chosen"), [(16, "_launch_grouped_matmul_copied"), (17, "_launch_grouped_matmul")]
)
@both_ways
def test_a_gpu_takes_the_kernel_that_fits(
    monkeypatch: pytest.MonkeyPatch, is_transposed: bool, width: int, chosen: str
) -> None:
    taken: list[tuple[Any, ...]] = []
    for name in ("_launch_grouped_matmul", "_launch_grouped_matmul_copied"):
        monkeypatch.setattr(module, name, lambda *given, name=name: taken.append((name, *given)))
    x, W, offsets = halves(4, width), halves(2, width, width), halves(4).int()
    out = PRODUCTS[is_transposed](x, W, offsets, first_expert=1)
    assert taken == [(chosen, x, W, offsets, out, 1, is_transposed, H200, None)]


@both_ways
def test_nothing_is_launched_for_no_rows(
    monkeypatch: pytest.MonkeyPatch, is_transposed: bool
) -> None:
    for name in ("_launch_grouped_matmul", "_launch_grouped_matmul_copied"):
        monkeypatch.setattr(module, name, None)
    out = PRODUCTS[is_transposed](halves(0, 8), halves(2, 8, 8), halves(3).int())
    assert out.shape == (0, 8)


def test_a_descriptor_is_compiled_once_for_its_dtype_and_block() -> None:
    forms = {
        _form_of(TensorDescriptor.from_tensor(matrix, block))
        for matrix in (halves(64, 64), halves(32, 128), halves(64, 64).half())
        for block in ([16, 16], [16, 32])
    }
    assert len(forms) == 4


# Qwen3-30B-A3B's gate and up, the smallest that is copied, and rows that begin at no vector
QWEN, SMALL, ODD = (128, 1536, 2048), (1, 16, 16), (5, 97, 101)


def compile_product(
    kernel: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    capability: int,
    is_transposed: bool,
    has_bias: bool = False,
) -> CompiledLaunch:
    (E, N, K), R = shape, 4096
    file, name, launch = LAUNCHES[kernel]
    gpu = Properties(divmod(capability, 10), 100, SHARED_BYTES_LIMIT[capability])
    widths = (N, K) if is_transposed else (K, N)
    x, y = (torch.empty(R, width, dtype=dtype, device=META) for width in widths)
    W = torch.empty(E, N, K, dtype=dtype, device=META)
    offsets = torch.empty(E + 1, dtype=torch.int32, device=META)
    bias = torch.empty(E, N, dtype=dtype, device=META) if has_bias else None
    given = (x, W, offsets, y, 0, is_transposed, gpu, bias)
    return compile_launch(file, name, partial(launch, *given), capability)


@both_ways
# float16 is multiplied by the instructions of bfloat16, but for the GPUs that have none
@on_each_gpu(DTYPES, GPUS | {torch.float16: (75, 90)})
def test_kernels_compile_without_spilling(
    dtype: torch.dtype,
    capability: int,
    is_transposed: bool,
    record_property: Callable[[str, object], None],
) -> None:
    products = None if dtype == torch.float32 else TENSOR_CORE_INSTRUCTION[capability]
    copies = products and SHARED_BYTES_LIMIT[capability] >= copied_module.SHARED_BYTES
    compiled = {
        (kernel, shape): compile_product(kernel, shape, dtype, capability, is_transposed)
        for kernel, shape in (
            ("loaded", QWEN),
            ("loaded", ODD),
            *((("copied", QWEN), ("copied", SMALL)) if copies and capability >= 90 else ()),
        )
    }
    for key, one in compiled.items():
        record_property(str(key), str(one))
        one.assert_fits(capability)
        one.assert_multiplies_as(products)


# gpt-oss-20b's gate and up
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_kernels_with_biases_compile_without_spilling(
    capability: int, record_property: Callable[[str, object], None]
) -> None:
    products = TENSOR_CORE_INSTRUCTION[capability]
    kernel = "copied" if SHARED_BYTES_LIMIT[capability] >= copied_module.SHARED_BYTES else "loaded"
    compiled = compile_product(
        kernel, (32, 5760, 2880), torch.bfloat16, capability, False, has_bias=True
    )
    record_property(kernel, str(compiled))
    compiled.assert_fits(capability)
    compiled.assert_multiplies_as(products)


@both_ways
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_h100_copies_tiles_by_hardware_while_it_multiplies(
    dtype: torch.dtype, is_transposed: bool
) -> None:
    compiled = compile_product("copied", QWEN, dtype, 90, is_transposed)
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    products = compiled.find(r"wgmma\.mma_async\S+")
    assert set(products) == {f"wgmma.mma_async.sync.aligned.m64n256k16.f32.{kind}.{kind}"}
    # one product is under way while the next tiles are waited for. The loop over tiles and that
    # over columns are one: a tile's sums are awaited in it, the last product behind it
    waits = compiled.find(r"wgmma\.wait_group\.sync\.aligned (\d)")
    assert sorted(waits) == ["0", "0", "1"]
    assert compiled.find("%nctaid.x")
    # x and W, before the loop and in it
    copies = compiled.find(r"cp\.async\.bulk\.tensor\.(\d)d")
    num_stages = copied_module.TILE.num_stages
    assert copies.count("2") == copies.count("3") == num_stages
    # a tile does not pass through the registers on its way to the product
    assert not compiled.find(r"ld\.global\.v\d")


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@both_ways
def test_loads_of_16_bytes_are_under_way_while_a_tile_is_multiplied(
    is_transposed: bool, capability: int
) -> None:
    compiled = compile_product("loaded", QWEN, torch.bfloat16, capability, is_transposed)
    loads = compiled.find(r"cp\.async\.c\w\.\S+ \[[^]]*\], \[[^]]*\], (\w+)")
    assert set(loads) == {"0x10"}
    # of each matrix, before the loop and in it
    assert len(loads) % module.TILE.num_stages == 0
    assert compiled.find(r"cp\.async\.wait_group")


# and several tiles of a program, in every direction with a rest
GPU_CASES = ways(
    ALL_CASES
    + grouped_cases(
        [((300, 0, 1, 511, 128, 257), 528, 400), ((0,) * 60 + (1,) * 40, 144, 80, 30, 55)], DTYPES
    )
)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "is_transposed"), GPU_CASES, ids=str)
def test_gpu_kernels_add_whole_numbers_exactly(case: GroupedCase, is_transposed: bool) -> None:
    found = grouped_product(case, is_transposed, PRODUCTS[is_transposed], CUDA)
    assert_equal(found.cpu(), grouped_product_by_hand(case, is_transposed))


def rows_of_experts(sizes: tuple[int, ...]) -> Tensor:
    offsets = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0)
    return offsets.to(torch.int32).to(CUDA)


@pytest.mark.gpu
@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2048, 2047], ids=["aligned", "odd"])
def test_gpu_kernels_err_no_more_than_torch_and_repeat_their_bits(
    width: int, dtype: torch.dtype, is_transposed: bool
) -> None:
    sizes = (513, 0, 64, 1, 300, 129)
    generator = torch.Generator(CUDA).manual_seed(0)
    W = torch.randn(len(sizes), 768, width, generator=generator, device=CUDA).to(dtype)
    right = W if is_transposed else W.mT
    x = torch.randn(sum(sizes), right.shape[1], generator=generator, device=CUDA).to(dtype)
    offsets, product = rows_of_experts(sizes), PRODUCTS[is_transposed]

    def by_torch(x: Tensor, right: Tensor) -> Tensor:
        return torch.cat([part @ w for part, w in zip(x.split(sizes), right, strict=True)])

    actual = product(x, W, offsets)
    assert_equal(product(x, W, offsets), actual)
    truth = by_torch(x.double(), right.double())
    if dtype == torch.float32:
        # whose largest error is a matter of the order of the sums, which cuBLAS chooses
        magnitudes = by_torch(x.double().abs(), right.double().abs())
        assert_summed_in_float32(actual, truth, magnitudes, x.shape[1])
    else:
        assert_no_worse_than(actual, by_torch(x, right), truth)


@pytest.mark.gpu
@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1024, 1023], ids=["aligned", "odd"])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(
    width: int, dtype: torch.dtype, is_transposed: bool
) -> None:
    W = torch.randn(1, 528, width, device=CUDA).to(dtype)
    x = torch.randn(700, W.shape[1 if is_transposed else 2], device=CUDA).to(dtype)
    product = PRODUCTS[is_transposed]
    whole = product(x, W, rows_of_experts((700,)))
    for start, stop in ((0, 1), (0, 64), (131, 133), (200, 329), (699, 700)):
        part = product(x[start:stop].clone(), W, rows_of_experts((stop - start,)))
        assert_equal(part, whole[start:stop], f"rows {start} to {stop}")


@pytest.mark.gpu
@both_ways
@pytest.mark.parametrize("N", [272, 97], ids=["aligned", "odd"])
def test_a_captured_product_reads_the_offsets_at_each_replay(N: int, is_transposed: bool) -> None:
    case = GroupedCase((130, 0, 131, 3), N, 80, torch.bfloat16)
    given = grouped_inputs(case, is_transposed, CUDA)
    product = PRODUCTS[is_transposed]
    product(*given.values())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product(*given.values())
    x, W = given["x"].double(), given["W"].double()
    right = W if is_transposed else W.mT
    for sizes in ((264, 0, 0, 0), (1, 1, 1, 261), (0, 132, 132, 0)):
        given["offsets"].copy_(rows_of_experts(sizes))
        given["out"].fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        parts = [part @ w for part, w in zip(x.split(sizes), right, strict=True)]
        assert_equal(given["out"], torch.cat(parts).to(case.dtype), str(sizes))


@pytest.mark.gpu
@pytest.mark.slow
@both_ways
@pytest.mark.parametrize("gap", [16, 1], ids=["copied", "loaded"])
def test_gpu_kernels_reach_beyond_int32(gap: int, is_transposed: bool) -> None:
    E, N, K, R = 128, 4096, 4176, 525_000
    assert min(E * N * K, R * N) > 2**31
    generator = torch.Generator(CUDA).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        wide = torch.empty(*shape[:-1], shape[-1] + gap, dtype=torch.bfloat16, device=CUDA)
        return wide.random_(-2, 3, generator=generator)[..., gap:]

    W, x = draw(E, N, K), draw(R, N if is_transposed else K)
    sizes = (R // E,) * (E - 1)
    offsets = rows_of_experts((*sizes, R - sum(sizes)))
    found = PRODUCTS[is_transposed](x, W, offsets)
    assert bool(copied_obstacle(x, W, found, H200)) == (gap == 1)
    last = W[-1].float()
    # whole numbers that float32 holds
    expected = x[-200:].float() @ (last if is_transposed else last.T)
    assert_equal(found[-200:], expected.to(torch.bfloat16))
