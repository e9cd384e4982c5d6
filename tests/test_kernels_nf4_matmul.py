"""kernels/nf4_matmul.py: right to the rounding, interpreted and on a GPU; compiles for each."""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from support.ahead_of_time import GPUS, TENSOR_CORE_INSTRUCTION, CompiledLaunch, compile_launch
from support.equality import assert_equal, assert_no_worse_than, assert_summed_in_float32
from support.interpreter import interpreted_results
from support.nf4_cases import (
    IDENTITY_WEIGHT,
    TINY_PRODUCTS,
    ProductCase,
    WeightCase,
    random_rows,
    random_weight,
    to_device,
)
from torch import Tensor

from kernels import nf4_matmul_fused as fused_module
from kernels import nf4_matmul_warpgroup as warpgroup_module
from kernels.device import H200, Properties, meta_stands_for
from kernels.nf4_matmul import CROSSOVERS, PathName, matmul_path, nf4_matmul
from kernels.nf4_matmul_fused import CONFIGS, fused_obstacle
from kernels.nf4_matmul_warpgroup import warpgroup_obstacle
from nf4.double_quant import QuantizedAbsmax, dequantize_absmax
from nf4.levels import LEVELS
from nf4.weight import NF4Weight, dequantize, empty_weight, member, quantize

KERNELS = {"fused": fused_module, "warpgroup": warpgroup_module}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF_DTYPES = [torch.float16, torch.bfloat16]
CPU, META = torch.device("cpu"), torch.device("meta")

# every configuration, with and without double quantization, of one member and of two
COMPILED_PRODUCTS = [
    ProductCase(WeightCase(rows, in_features, 64, double_quant), num_rows, dtype)
    for rows, in_features, double_quant, num_rows, dtype in (
        ((8192, 1024), 1024, True, 8, torch.bfloat16),
        ((8192,), 1024, False, 8, torch.float16),
        ((1024,), 2048, True, 8, torch.bfloat16),
        ((8192,), 1024, True, 16, torch.bfloat16),
        ((1024, 64), 2048, True, 16, torch.float16),
        ((1024,), 2048, True, 17, torch.bfloat16),
        ((8192, 64), 2048, False, 17, torch.float16),
        ((64,), 256, True, 17, torch.bfloat16),
    )
]
COMPILED_WARPGROUP_PRODUCTS = [
    ProductCase(WeightCase(rows, in_features, 64, double_quant), num_rows, dtype)
    for rows, in_features, double_quant, num_rows, dtype in (
        ((1024,), 4096, True, 17, torch.bfloat16),
        ((1024, 64), 4096, True, 64, torch.bfloat16),
        ((16384,), 4096, True, 64, torch.bfloat16),
        ((16384,), 4096, False, 64, torch.float16),
    )
]
# what the fused kernels take
WHOLE_WEIGHTS = [
    WeightCase((512, 256, 256), 1024),
    WeightCase((64,), 768),
    WeightCase((192,), 2048, double_quant=False),
    WeightCase((8192 + 64,), 256),
]
# what only the expanding path takes
ODD_WEIGHTS = [
    WeightCase((33, 31, 7), 193, 32),
    WeightCase((257,), 1031, double_quant=False),
    WeightCase((1030,), 1376, 4096),
]
CANDIDATES: list[tuple[PathName, list[WeightCase], list[torch.dtype]]] = [
    ("fused", WHOLE_WEIGHTS, HALF_DTYPES),
    ("expand", WHOLE_WEIGHTS[:1] + ODD_WEIGHTS, DTYPES),
]
GPU_PRODUCTS = [
    (ProductCase(weight, num_rows, dtype), "warpgroup")
    for weight, dtype, num_rows in product(WHOLE_WEIGHTS, HALF_DTYPES, (1, 17, 33, 64, 300))
] + [
    (ProductCase(weight, num_rows, dtype), path)
    for path, weights, dtypes in CANDIDATES
    for weight, dtype, num_rows in product(weights, dtypes, (1, 3, 16, 17, 64, 300))
]


def assert_product_is_right(actual: Tensor, case: ProductCase, device: torch.device) -> None:
    """A float32 product is summed in float32, a 16-bit one errs at most twice as much as torch's.

    The truth is the product with the weight as it is stored, rounded nowhere; torch rounds it to
    16 bits. Of float32 products torch's is no measure: it may happen to sum in a luckier order.
    """
    x, matrix = random_rows(case), dequantize(random_weight(case.weight), torch.float32)
    truth = x.double() @ matrix.double().T
    assert actual.dtype == case.dtype
    if case.dtype == torch.float32:
        magnitudes = x.double().abs() @ matrix.double().abs().T
        assert_summed_in_float32(actual.cpu(), truth, magnitudes, x.shape[1], str(case))
    else:
        baseline = (x.to(device) @ matrix.to(device, case.dtype).T).cpu()
        assert_no_worse_than(actual.cpu(), baseline, truth, what=str(case))


def rounded_levels_times_scales(weight: NF4Weight, dtype: torch.dtype) -> Tensor:  # (N, K) float32
    """Expand a weight whose levels are rounded to `dtype`, as the fused kernels see it."""
    parts = []
    for index, rows in enumerate(weight.rows):
        part = member(weight, index)
        scales = part.absmax
        if isinstance(scales, QuantizedAbsmax):
            scales = dequantize_absmax(scales)
        codes = torch.stack((part.packed >> 4, part.packed & 15), dim=1).int()
        levels = LEVELS.to(part.device)[codes].to(dtype).float().view(-1, part.block_size)
        parts.append((levels * scales[:, None]).view(rows, -1))
    return torch.cat(parts)


def test_cases_are_with_an_odd_stride() -> None:
    for cases in (TINY_PRODUCTS, [case for case, _ in GPU_PRODUCTS]):
        assert any(random_rows(case).stride(0) % 2 for case in cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(64,), (33, 31, 7)], ids=str)
def test_reference_accumulates_in_float32_and_rounds_once(
    rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    case = ProductCase(WeightCase(rows, 193), 5, dtype)
    x, weight = random_rows(case), random_weight(case.weight)
    y = nf4_matmul(x, weight)
    matrix = dequantize(weight, dtype).double()
    truth = x.double() @ matrix.T
    magnitudes = x.double().abs() @ matrix.abs().T
    assert y.dtype == dtype
    assert_summed_in_float32(y, truth, magnitudes, num_terms=x.shape[1])


def test_cpu_tensor_multiplies_without_a_gpu_and_keeps_its_dtype() -> None:
    weight = random_weight(WeightCase((8, 4), 64))
    for dtype in DTYPES:
        y = nf4_matmul(torch.randn(3, 64).to(dtype), weight)
        assert (y.shape, y.dtype) == ((3, 12), dtype)


@pytest.fixture
def h200() -> Iterator[None]:
    with meta_stands_for(H200):
        yield


def path_of(num_rows: int, weight: WeightCase, dtype: torch.dtype) -> PathName:
    empty = empty_weight(
        weight.rows, weight.in_features, weight.block_size, weight.double_quant, META
    )
    return matmul_path(num_rows, empty, dtype).name


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("rows", [(1024,), (4096,), (14336,)], ids=str)
def test_few_rows_are_fused_tens_take_the_warpgroup_kernel_and_many_expand(
    rows: tuple[int, ...],
) -> None:
    weight = WeightCase(rows, 4096)
    table = CROSSOVERS[(9, 0), 132]
    crossover = next(row for row in table if rows[0] * 4096 >= row.min_weights)
    most = max(crossover.fused, crossover.warpgroup)
    paths = [path_of(n, weight, torch.bfloat16) for n in range(1, 300)]
    assert paths == (
        ["fused"] * crossover.fused
        + ["warpgroup"] * (most - crossover.fused)
        + ["expand"] * (len(paths) - most)
    )
    assert path_of(8192, weight, torch.bfloat16) == "expand"


@pytest.mark.usefixtures("h200")
def test_the_chosen_path_says_why() -> None:
    weight = empty_weight((4096,), 4096, 64, True, META)
    reason = matmul_path(1, weight, torch.bfloat16).reason
    assert "1 rows of a 4096x4096 weight; fused wins up to" in reason
    assert reason.endswith("measured on sm_90 with 132 multiprocessors")


def test_an_unknown_device_has_a_default() -> None:
    weight = empty_weight((4096,), 4096, 64, True, META)
    with meta_stands_for(Properties((8, 6), 28, 101_376)):
        assert matmul_path(1, weight, torch.bfloat16).name == "fused"
        path = matmul_path(512, weight, torch.bfloat16)
    assert path.name == "expand"
    assert "assumed for sm_86 with 28 multiprocessors" in path.reason


@pytest.mark.parametrize("num_rows", [1, 16, 8192])
def test_without_tensor_cores_every_product_expands(num_rows: int) -> None:
    # larger than the largest weights of the table
    weight = empty_weight((14336,), 4096, 64, True, META)
    with meta_stands_for(Properties((7, 5), 40, 65_536)):
        path = matmul_path(num_rows, weight, torch.float16)
    assert path.name == "expand"
    if num_rows <= 16:
        assert path.reason == "the fused kernel needs the tensor cores of 8.0 and later, not (7, 5)"


@pytest.mark.parametrize(
    ("weight", "dtype", "reason"),
    [
        (WeightCase((64,), 256), torch.float32, "not in torch.float32"),
        (WeightCase((64,), 256, 128), torch.bfloat16, "know block_size 64, not 128"),
        (WeightCase((64,), 320), torch.bfloat16, "320 is no multiple of 256"),
        (WeightCase((64, 8), 256), torch.bfloat16, "are no multiples of 16"),
    ],
    ids=["dtype", "block size", "columns", "rows"],
)
def test_a_weight_the_fused_kernel_does_not_take_is_told_why(
    weight: WeightCase, dtype: torch.dtype, reason: str
) -> None:
    empty = empty_weight(
        weight.rows, weight.in_features, weight.block_size, weight.double_quant, CPU
    )
    assert reason in fused_obstacle(empty, dtype, (9, 0))


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("num_rows", [1, 64])
def test_a_weight_that_no_kernel_takes_expands_and_says_so(num_rows: int) -> None:
    weight = empty_weight((64,), 320, 64, True, META)
    path = matmul_path(num_rows, weight, torch.bfloat16)
    assert path == ("expand", "in_features 320 is no multiple of 256")


@pytest.mark.parametrize(
    ("capability", "rows", "in_features", "reason"),
    [
        ((10, 0), (64,), 256, "runs on compute capability 9.0, not (10, 0)"),
        ((9, 0), (64, 16), 256, "rows (64, 16) are no multiples of 64"),
        ((9, 0), (64,), 320, "in_features 320 is no multiple of 256"),
    ],
    ids=["device", "rows", "columns"],
)
def test_a_weight_the_warpgroup_kernel_does_not_take_is_told_why(
    capability: tuple[int, int],
    rows: tuple[int, ...],
    in_features: int,
    reason: str,
) -> None:
    weight = empty_weight(rows, in_features, 64, True, CPU)
    assert reason in warpgroup_obstacle(weight, torch.bfloat16, capability)
    assert not warpgroup_obstacle(empty_weight((64,), 256, 64, True, CPU), torch.bfloat16, (9, 0))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 63), r"^x must be a matrix with 64 columns: got shape \(3, 63\)"),
        (torch.ones(2, 3, 64), r"^x must be a matrix with 64 columns: got shape \(2, 3, 64\)"),
        (torch.ones(64, 3).T, r"^x must have contiguous rows: got strides \(1, 3\)"),
        (torch.ones(3, 64, dtype=torch.float64), "bfloat16, float16 or float32: got torch.float64"),
        (torch.ones(3, 64, device="meta"), "must be on one device: got meta and cpu"),
    ],
    ids=["columns", "dimensions", "strides", "dtype", "device"],
)
def test_rows_that_do_not_fit_are_refused(x: Tensor, message: str) -> None:
    weight = random_weight(WeightCase((64,), 64))
    with pytest.raises(ValueError, match=message):
        nf4_matmul(x, weight)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", TINY_PRODUCTS, ids=str)
def test_interpreted_product_is_right(case: ProductCase, kernel: str) -> None:
    y = interpreted_results("nf4_matmul")[f"{kernel}-{case}"]
    assert_product_is_right(y, case, CPU)


@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted_product_by_the_identity_is_the_weight(kernel: str) -> None:
    weight = random_weight(IDENTITY_WEIGHT)
    expected = rounded_levels_times_scales(weight, torch.float16).half()
    assert_equal(interpreted_results("nf4_matmul")[f"identity-{kernel}"], expected.T)


def compiled_launch(
    case: ProductCase, capability: int, kernel: str = "fused", **options: int
) -> CompiledLaunch:
    weight = case.weight
    empty = empty_weight(
        weight.rows, weight.in_features, weight.block_size, weight.double_quant, CPU
    )
    x = torch.zeros(case.num_rows, empty.in_features, dtype=case.dtype)
    kernel_module = KERNELS[kernel]
    launch = getattr(kernel_module, f"_launch_nf4_matmul_{kernel}")
    return compile_launch(
        kernel_module,
        f"_nf4_matmul_{kernel}_kernel",
        lambda: launch(x, empty),
        capability,
        **options,
    )


# not sm_75
PRODUCTS_ON_GPUS = [
    (case, capability)
    for case in COMPILED_PRODUCTS
    for capability in GPUS[case.dtype]
    if capability >= 80
]


@pytest.mark.parametrize(
    ("case", "capability"),
    PRODUCTS_ON_GPUS,
    ids=[f"{case}-sm{capability}" for case, capability in PRODUCTS_ON_GPUS],
)
def test_kernel_compiles_without_spilling(
    case: ProductCase, capability: int, record_property: Callable[[str, object], None]
) -> None:
    compiled = compiled_launch(case, capability)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    # that of sm_80 on every GPU, since a tile of so few rows is none for a warpgroup
    compiled.assert_multiplies_as(TENSOR_CORE_INSTRUCTION[80])
    # decoded weights go to the tensor cores without a detour: nothing waits until they are summed
    found = compiled.find(r"mma\.sync|\bbar\b|barrier|st\.shared")
    assert found.count("mma.sync") > 1
    assert set(found[: found.count("mma.sync")]) == {"mma.sync"}


@pytest.mark.parametrize("case", COMPILED_WARPGROUP_PRODUCTS, ids=str)
def test_warpgroup_kernel_compiles_without_spilling(
    case: ProductCase, record_property: Callable[[str, object], None]
) -> None:
    compiled = compiled_launch(case, 90, "warpgroup")
    record_property("resources", str(compiled))
    compiled.assert_fits(90)
    compiled.assert_multiplies_as(TENSOR_CORE_INSTRUCTION[90])
    # decoded weights stay in registers and x is copied: nothing is stored until they are summed
    found = compiled.find(r"wgmma\.mma_async|st\.shared|cp\.async\.cg\.shared\.global")
    assert found.count("wgmma.mma_async") > 1
    assert found[0] == "cp.async.cg.shared.global"
    after_the_last_product = found[::-1].index("wgmma.mma_async")
    assert "st.shared" not in found[: len(found) - after_the_last_product]


def test_renumbering_kernel_compiles_without_spilling() -> None:
    x = torch.zeros(64, 4096, dtype=torch.bfloat16)
    compiled = compile_launch(
        warpgroup_module,
        "_renumber_columns_kernel",
        lambda: warpgroup_module._renumbered(x),
        90,
    )
    compiled.assert_fits(90)


def test_every_configuration_is_compiled() -> None:
    used = {warpgroup_module._block_m(case.num_rows) for case in COMPILED_WARPGROUP_PRODUCTS}
    assert used == set(warpgroup_module.BLOCKS_M)
    used = {
        fused_module._config_for(case.num_rows, sum(case.weight.rows)) for case in COMPILED_PRODUCTS
    }
    assert used == set(CONFIGS)


@pytest.mark.usefixtures("unrecorded")
def test_a_spill_is_seen() -> None:
    case = COMPILED_PRODUCTS[0]
    compiled = compiled_launch(case, 90, maxnreg=32)
    assert compiled.registers <= 32
    with pytest.raises(AssertionError, match="bytes of registers are spilled"):
        compiled.assert_fits(90)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "path"), GPU_PRODUCTS, ids=str)
def test_gpu_product_is_right(case: ProductCase, path: PathName) -> None:
    device = torch.device("cuda")
    rows = random_rows(case)
    # a copy would be contiguous: rows of x start anywhere, and what lies between them is NaN
    wide = torch.full((case.num_rows, rows.stride(0)), float("nan"), dtype=case.dtype)
    x = wide.to(device)[:, : rows.shape[1]].copy_(rows)
    y = nf4_matmul(x, to_device(random_weight(case.weight), device), path)
    assert y.device.type == "cuda"
    assert_product_is_right(y, case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("case", WHOLE_WEIGHTS, ids=str)
def test_gpu_product_by_the_identity_is_the_weight(case: WeightCase, dtype: torch.dtype) -> None:
    weight = to_device(random_weight(case), torch.device("cuda"))
    identity = torch.eye(weight.in_features, dtype=dtype, device="cuda")
    y = nf4_matmul(identity, weight, "fused")
    assert_equal(y, rounded_levels_times_scales(weight, dtype).to(dtype).T)


@pytest.mark.gpu
def test_gpu_rows_in_float32_are_not_rounded_to_tf32() -> None:
    weight = quantize(torch.rand(192, 256) + 1)
    # tf32 keeps 10 bits: it would make these ones, and every sum too small by one in 4,096
    x = torch.full((3, weight.in_features), 1 + 2.0**-12)
    truth = x.double() @ dequantize(weight, torch.float32).double().T
    y = nf4_matmul(x.cuda(), to_device(weight, torch.device("cuda"))).cpu()
    # all terms are positive
    assert_summed_in_float32(y, truth, truth, num_terms=x.shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "path"), GPU_PRODUCTS, ids=str)
def test_two_gpu_products_are_bit_equal(case: ProductCase, path: PathName) -> None:
    device = torch.device("cuda")
    # contiguous here
    x, weight = random_rows(case).to(device), to_device(random_weight(case.weight), device)
    first = nf4_matmul(x, weight, path)
    assert_equal(nf4_matmul(x, weight, path), first)


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_product_reaches_beyond_int32() -> None:
    device = torch.device("cuda")
    weight = empty_weight((64, 1 << 17), 1 << 14, 64, True, device)
    assert weight.shape[0] * weight.shape[1] > 2**31
    assert isinstance(weight.absmax, QuantizedAbsmax)
    weight.packed.random_(256)
    weight.absmax.codes.random_(256)
    weight.absmax.group_absmax.uniform_(0.1, 0.5)
    weight.absmax.mean.fill_(1)
    x = torch.randn(3, weight.in_features, dtype=torch.bfloat16, device=device)
    matrix = dequantize(weight, torch.float32)
    baseline = x @ matrix.to(x.dtype).T
    truth = x.double() @ matrix.double().T
    y = nf4_matmul(x, weight, "fused")
    assert_no_worse_than(y, baseline, truth)


@pytest.mark.gpu
def test_gpu_rows_and_a_cpu_weight_are_refused() -> None:
    weight = random_weight(WeightCase((64,), 64))
    with pytest.raises(ValueError, match="x and the weight must be on one device: got cuda:0 and"):
        nf4_matmul(torch.ones(3, 64, device="cuda"), weight)


@pytest.mark.gpu
def test_gpu_path_that_does_not_fit_is_refused() -> None:
    weight = to_device(random_weight(WeightCase((64,), 64)), torch.device("cuda"))
    x = torch.ones(3, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match="got fused, but in_features 64 is no multiple of 256; use"
    ):
        nf4_matmul(x, weight, "fused")
    with pytest.raises(
        ValueError, match="path must be one of fused, warpgroup, expand: got 'quick'"
    ):
        nf4_matmul(x, weight, "quick")  # pyright: ignore[reportArgumentType]
