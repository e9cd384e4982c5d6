"""kernels/nf4_quantize.py: equal to the reference, interpreted and on a GPU; compiles for each."""

from collections.abc import Callable

import pytest
import torch
from support.ahead_of_time import GPUS, CompiledLaunch, compile_launch, on_each_gpu
from support.equality import assert_equal
from support.interpreter import interpreted_results
from support.nf4_cases import INTERPRETED_DTYPES, TINY_WEIGHTS, WeightCase
from support.nf4_parity import cuda_codes, exact_scales
from support.nf4_quantize_cases import (
    EVERY_BLOCK_SIZE,
    INTERPRETED_CASES,
    QuantizeCase,
    held_tensors,
    matrices_of,
    non_finite_matrix,
    scales_on_midpoints,
    special_cases,
)
from torch import Tensor

from kernels import nf4_quantize as module
from kernels.nf4_quantize import (
    nf4_quantize_member,
    nf4_quantize_member_reference,
    nf4_quantize_member_unchecked,
)
from nf4.blockwise import BLOCK_SIZES, quantize_blockwise
from nf4.double_quant import GROUP_SIZE, QuantizedAbsmax, quantize_absmax
from nf4.levels import MIDPOINTS
from nf4.weight import NF4Weight, check_finite, empty_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# sm_75 quantizes a checkpoint in bfloat16 too, which it does not compute in
READING = {dtype: sorted({75, *capabilities}) for dtype, capabilities in GPUS.items()}
NON_FINITE = [float("nan"), float("inf"), float("-inf")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# all block sizes for one GPU; for the others the ends and the size that everybody uses
COMPILED = [
    (dtype, block_size, capability)
    for dtype in DTYPES
    for capability in READING[dtype]
    for block_size in (BLOCK_SIZES if capability == 90 else (32, 64, 4096))
]
GPU_CASES = [
    case
    for dtype in DTYPES
    for case in (
        *(
            QuantizeCase("normal", weight, dtype)
            for weight in (
                *TINY_WEIGHTS,
                *EVERY_BLOCK_SIZE,
                *(
                    WeightCase(rows, in_features, block_size, double_quant)
                    for rows, in_features, block_size in [
                        ((1031,), 257, 64),
                        ((512, 128, 128), 1024, 64),
                        ((7, 1, 130), 4097, 64),
                        ((300, 301), 1376, 4096),
                        ((257, 2), 2048, 1024),
                        ((1024,), 14336, 64),
                    ]
                    for double_quant in (True, False)
                ),
            )
        ),
        *special_cases(dtype),
    )
]


def empty(case: WeightCase, device: torch.device = CPU) -> NF4Weight:
    return empty_weight(case.rows, case.in_features, case.block_size, case.double_quant, device)


def reference_of(case: QuantizeCase, device: torch.device = CPU) -> NF4Weight:
    weight = empty(case.weight, device)
    for index, matrix in enumerate(matrices_of(case)):
        nf4_quantize_member_reference(weight, index, matrix.to(device), f"member {index}")
    return weight


def assert_holds_the_same(actual: NF4Weight, expected: NF4Weight) -> None:
    for name, tensor in held_tensors(expected).items():
        assert_equal(held_tensors(actual)[name], tensor, name)


def test_a_cubic_finds_the_cell_of_every_scaled_weight() -> None:
    midpoint_and_neighbours = torch.stack(
        [MIDPOINTS, *(torch.nextafter(MIDPOINTS, torch.tensor(end)) for end in (-2.0, 2.0))]
    )
    # a scale times its rounded reciprocal may exceed one
    ends = torch.tensor([-1 - 2**-20, -1, -0.0, 0, 1, 1 + 2**-20])
    grid = torch.linspace(-1, 1, 1 << 20)
    scaled = torch.cat((midpoint_and_neighbours.flatten(), ends, grid)).double()
    cubic = module.CUBIC_0.value + scaled * (
        module.CUBIC_1.value + module.CUBIC_3.value * scaled * scaled
    )
    code = torch.bucketize(scaled.float(), MIDPOINTS).double()
    # a code is its cell or, beyond the cell's midpoint, the next
    distance = code - cubic
    assert distance.min() > -0.5 + 0.03
    assert distance.max() < 1.5 - 0.03
    # the kernel evaluates the cubic in float32
    assert torch.finfo(torch.float32).eps * cubic.abs().max() < 0.03 / 1000


@pytest.mark.parametrize("case", INTERPRETED_CASES, ids=str)
def test_interpreted_kernels_equal_the_reference(case: QuantizeCase) -> None:
    for name, tensor in held_tensors(reference_of(case)).items():
        assert_equal(interpreted_results("nf4_quantize")[f"{case}/{name}"], tensor, name)


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("value", NON_FINITE, ids=str)
def test_interpreted_kernel_gives_a_non_finite_weight_a_non_finite_scale(
    value: float, dtype: torch.dtype
) -> None:
    absmax = interpreted_results("nf4_quantize")[f"{value}-{dtype}/absmax"]
    matrix = non_finite_matrix(value, dtype)
    _, expected = quantize_blockwise(matrix, 64)
    assert absmax.isfinite().tolist() == expected.isfinite().tolist()
    with pytest.raises(ValueError, match=r"^w must hold finite weights only: 2 of 350 are"):
        check_finite(absmax, matrix, "w")


def test_interpreted_tie_of_a_scale_goes_to_the_even_code() -> None:
    scales = scales_on_midpoints()
    assert_equal(interpreted_results("nf4_quantize")["on midpoints/codes"], cuda_codes(scales))
    assert_equal(interpreted_results("nf4_quantize")["on midpoints/group_absmax"], torch.ones(4))


def test_interpreted_scales_whose_mean_overflows_equal_the_reference() -> None:
    expected = quantize_absmax(torch.full((300,), 3e38))
    assert expected.mean.tolist() == [float("inf")]
    assert_equal(interpreted_results("nf4_quantize")["overflow/codes"], expected.codes)
    actual = interpreted_results("nf4_quantize")["overflow/group_absmax"]
    assert actual.tolist() == expected.group_absmax.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_weight_is_quantized_by_the_reference(dtype: torch.dtype) -> None:
    case = QuantizeCase("normal", WeightCase((3, 5), 65), dtype)
    weight = empty(case.weight)
    for index, matrix in enumerate(matrices_of(case)):
        nf4_quantize_member(weight, index, matrix, "weight")
    assert_holds_the_same(weight, reference_of(case))


@pytest.mark.parametrize("value", NON_FINITE, ids=str)
def test_non_finite_weight_is_refused_by_name(value: float) -> None:
    weight = empty(WeightCase((5,), 70))
    with pytest.raises(ValueError, match=r"^layers\.3 must hold finite weights only: 2 of 350"):
        nf4_quantize_member(weight, 0, non_finite_matrix(value, torch.bfloat16), "layers.3")


def assert_tells_by_its_scales(
    device: torch.device, value: float, dtype: torch.dtype, double_quant: bool
) -> None:
    """The unchecked function refuses nothing; its scales tell a good matrix from a bad one."""
    case = QuantizeCase("normal", WeightCase((5,), 70, 64, double_quant), dtype)
    weight = empty(case.weight, device)
    bad = non_finite_matrix(value, dtype)
    scales = nf4_quantize_member_unchecked(weight, 0, bad.to(device), "w")
    _, expected = quantize_blockwise(bad, 64)
    assert scales.isfinite().tolist() == expected.isfinite().tolist()
    assert not scales.isfinite().all()
    (good,) = matrices_of(case)
    scales = nf4_quantize_member_unchecked(weight, 0, good.to(device), "w")
    assert_equal(scales.cpu(), quantize_blockwise(good, 64)[1])
    assert_holds_the_same(weight, reference_of(case, device))


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("value", NON_FINITE, ids=str)
def test_unchecked_scales_tell_of_a_non_finite_weight(value: float, double_quant: bool) -> None:
    assert_tells_by_its_scales(CPU, value, torch.bfloat16, double_quant)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("value", NON_FINITE, ids=str)
def test_gpu_unchecked_scales_tell_of_a_non_finite_weight(
    value: float, double_quant: bool, dtype: torch.dtype
) -> None:
    assert_tells_by_its_scales(CUDA, value, dtype, double_quant)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(64, 5), r"^w must have shape \(5, 64\): got \(64, 5\)$"),
        (torch.ones(5, 64, dtype=torch.int8), r"^w must be a non-empty .* got torch.int8 with"),
        (torch.ones(5, 64, device="meta"), r"^w must lie on the device .*, cpu: got meta$"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_matrix_that_does_not_fit_is_refused_by_name(matrix: Tensor, message: str) -> None:
    for quantize in (nf4_quantize_member, nf4_quantize_member_unchecked):
        with pytest.raises(ValueError, match=message):
            quantize(empty(WeightCase((5,), 64)), 0, matrix, "w")


def compile_kernel(
    kernel_name: str, case: WeightCase, dtype: torch.dtype, capability: int
) -> CompiledLaunch:
    weight = empty(case)
    matrix = torch.empty(weight.shape, dtype=dtype)
    return compile_launch(
        module,
        kernel_name,
        lambda: module._launch_nf4_quantize(weight, matrix),
        capability,
    )


def compile_quantize(
    dtype: torch.dtype, block_size: int, capability: int, in_features: int = 4096
) -> CompiledLaunch:
    case = WeightCase((2,), in_features, block_size)
    return compile_kernel("_nf4_quantize_kernel", case, dtype, capability)


@pytest.mark.parametrize(
    ("dtype", "block_size", "capability"),
    COMPILED,
    ids=[f"{str(dtype)[6:]}-block{size}-sm{capability}" for dtype, size, capability in COMPILED],
)
def test_kernel_compiles_without_spilling(
    dtype: torch.dtype,
    block_size: int,
    capability: int,
    record_property: Callable[[str, object], None],
) -> None:
    compiled = compile_quantize(dtype, block_size, capability)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    # correctly rounded, and subnormal numbers are not taken for zero
    assert compiled.find(r"div\.rn\.f32")
    assert not compiled.find(r"\.ftz|\.approx|\.full")


@on_each_gpu(DTYPES, READING)
def test_kernel_of_an_odd_matrix_compiles_without_spilling(
    dtype: torch.dtype,
    capability: int,
    record_property: Callable[[str, object], None],
) -> None:
    compiled = compile_quantize(dtype, 64, capability, in_features=33)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)


@pytest.mark.parametrize("capability", READING[torch.bfloat16], ids="sm{}".format)
@pytest.mark.parametrize(
    "case",
    [WeightCase((64,), 4096), WeightCase((3,), 33), WeightCase((1,), 1)],
    ids=str,
)
def test_kernel_of_the_scales_compiles_without_spilling(
    case: WeightCase, capability: int, record_property: Callable[[str, object], None]
) -> None:
    compiled = compile_kernel("_nf4_quantize_absmax_kernel", case, torch.bfloat16, capability)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    assert compiled.find(r"div\.rn\.f32")
    assert not compiled.find(r"\.ftz|\.approx|\.full")


@on_each_gpu([torch.float16, torch.bfloat16], READING)
def test_aligned_16_bit_matrix_is_moved_in_vectors_past_shared_memory(
    dtype: torch.dtype, capability: int
) -> None:
    compiled = compile_quantize(dtype, 64, capability)
    assert compiled.shared_bytes == 0
    assert not compiled.find(r"bar\.sync")
    # 16 bytes a thread and chunk, and the table of midpoints
    loads = compiled.find(r"ld\.global\.\S+")
    assert loads.count("ld.global.v4.b32") == module.CHUNKS
    assert len(loads) == module.CHUNKS + 1
    # 8 codes a thread and chunk, and a scale
    stores = compiled.find(r"st\.global\.\S+")
    assert stores == ["st.global.b32"] * 2 * module.CHUNKS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_weight_costs_at_most_20_instructions(dtype: torch.dtype) -> None:
    # beyond 25 an H100 would compute for longer than the memory takes
    compiled = compile_quantize(dtype, 64, 90)
    weights = module.CHUNKS * module.VECTOR_BYTES // dtype.itemsize
    assert compiled.count_instructions() <= 20 * weights


def test_a_matrix_beyond_int32_compiles_with_64_bit_counts() -> None:
    weight = empty(WeightCase((2,), 4096))
    matrix = torch.empty(weight.shape, dtype=torch.bfloat16)

    class Huge(Tensor):
        """A matrix that says to have more elements than 32 bits count."""

        def numel(self) -> int:
            return 2**31 + 32

        def contiguous(self, *args: object, **kwargs: object) -> Tensor:
            return self

    compiled = compile_launch(
        module,
        "_nf4_quantize_kernel",
        lambda: module._launch_nf4_quantize(weight, matrix.as_subclass(Huge)),
        90,
    )
    assert compiled.find(r"\.param \.u64 _nf4_quantize_kernel_param_4")
    compiled.assert_fits(90)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernels_equal_the_reference(case: QuantizeCase) -> None:
    weight = empty(case.weight, CUDA)
    for index, matrix in enumerate(matrices_of(case)):
        nf4_quantize_member(weight, index, matrix.to(CUDA), f"member {index}")
    # on the same device, so that both take the mean of the scales in one order
    assert_holds_the_same(weight, reference_of(case, CUDA))
    on_cpu = held_tensors(reference_of(case))
    for name in ("packed",) if case.weight.double_quant else ("packed", "absmax"):
        assert_equal(held_tensors(weight)[name].cpu(), on_cpu[name], name)


@pytest.mark.gpu
def test_gpu_tie_of_a_scale_goes_to_the_even_code() -> None:
    absmax = scales_on_midpoints()
    num_groups = -(-absmax.numel() // GROUP_SIZE)
    scales = QuantizedAbsmax(
        torch.empty(absmax.numel(), dtype=torch.uint8, device=CUDA),
        torch.empty(num_groups, device=CUDA),
        torch.zeros(1, device=CUDA),
    )
    module._launch_nf4_quantize_absmax(scales, absmax.to(CUDA))
    assert_equal(scales.codes.cpu(), cuda_codes(absmax))
    assert_equal(scales.group_absmax.cpu(), torch.ones(num_groups))


@pytest.mark.gpu
def test_gpu_codes_of_scales_equal_the_cpu_reference_where_the_means_do() -> None:
    for absmax in exact_scales()[:8]:
        matrix = torch.zeros(absmax.numel(), 32)
        matrix[:, 5] = absmax
        weight = empty(WeightCase((absmax.numel(),), 32, 32), CUDA)
        nf4_quantize_member(weight, 0, matrix.to(CUDA), "weight")
        for name, tensor in vars(quantize_absmax(absmax)).items():
            assert_equal(held_tensors(weight)[name].cpu(), tensor, name)


@pytest.mark.gpu
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_gpu_kernel_encodes_every_float32_from_a_64th_to_one(sign: int) -> None:
    first, last = (torch.tensor(value).view(torch.int32).item() for value in (2.0**-6, 1.0))
    # 62 to a block, beside its scale
    bits = torch.arange(int(first), int(last) + 62, dtype=torch.int32, device=CUDA)
    num_rows = bits.numel() // 62
    matrix = torch.ones(num_rows, 64, device=CUDA)
    matrix[:, 2:] = sign * bits[: num_rows * 62].view(torch.float32).view(num_rows, 62).clamp(max=1)
    weight = empty(WeightCase((num_rows,), 64, 64, False), CUDA)
    nf4_quantize_member(weight, 0, matrix, "weight")
    packed, absmax = quantize_blockwise(matrix, 64)
    assert_equal(weight.packed, packed)
    assert_equal(held_tensors(weight)["absmax"], absmax)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 4096], ids="block{}".format)
@pytest.mark.parametrize("value", NON_FINITE, ids=str)
def test_gpu_kernel_refuses_a_non_finite_weight(
    value: float, block_size: int, dtype: torch.dtype
) -> None:
    weight = empty(WeightCase((5,), 70, block_size), CUDA)
    with pytest.raises(ValueError, match=r"^w must hold finite weights only: 2 of 350 are"):
        nf4_quantize_member(weight, 0, non_finite_matrix(value, dtype).to(CUDA), "w")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lay_out",
    [
        lambda matrix: matrix.T.contiguous().T,
        lambda matrix: torch.cat((matrix, matrix), dim=1)[:, : matrix.shape[1]],
        # one element past a multiple of 16 bytes
        lambda matrix: torch.cat((matrix.new_zeros(1), matrix.flatten()))[1:].view(matrix.shape),
    ],
    ids=["transposed", "columns of a wider one", "not aligned"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_kernel_takes_a_matrix_of_any_layout(
    dtype: torch.dtype, lay_out: Callable[[Tensor], Tensor]
) -> None:
    case = QuantizeCase("normal", WeightCase((65,), 192), dtype)
    (matrix,) = matrices_of(case)
    weight = empty(case.weight, CUDA)
    nf4_quantize_member(weight, 0, lay_out(matrix.to(CUDA)), "weight")
    assert_holds_the_same(weight, reference_of(case, CUDA))


@pytest.mark.gpu
def test_gpu_matrix_must_lie_on_the_device() -> None:
    with pytest.raises(ValueError, match=r"^w must lie on the device .*, cuda:0: got cpu$"):
        nf4_quantize_member(empty(WeightCase((5,), 64), CUDA), 0, torch.ones(5, 64), "w")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_kernel_runs_where_the_weight_is() -> None:
    case = QuantizeCase("normal", WeightCase((64,), 192), torch.bfloat16)
    (matrix,) = matrices_of(case)
    second = torch.device("cuda:1")
    weight = empty(case.weight, second)
    with torch.cuda.device(0):
        nf4_quantize_member(weight, 0, matrix.to(second), "weight")
    assert_holds_the_same(weight, reference_of(case, second))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
def test_gpu_kernels_reach_beyond_int32(double_quant: bool) -> None:
    case = WeightCase((65_537, 3), 32_771, 64, double_quant)
    assert case.rows[0] * case.in_features > 2**31
    weight, expected = empty(case, CUDA), empty(case, CUDA)
    for index, num_rows in enumerate(case.rows):
        matrix = torch.empty(num_rows, case.in_features, dtype=torch.bfloat16, device=CUDA)
        matrix.normal_()
        nf4_quantize_member(weight, index, matrix, "weight")
        # slice by slice, on the GPU too: on a CPU it takes minutes
        nf4_quantize_member_reference(expected, index, matrix, "weight")
    assert_holds_the_same(weight, expected)
