"""kernels/nf4_dequantize.py: equals the reference, interpreted and on a GPU; compiles for each."""

from collections.abc import Callable

import pytest
import torch
from support.ahead_of_time import compile_launch, on_each_gpu
from support.equality import assert_equal
from support.interpreter import interpreted_results
from support.nf4_cases import (
    INTERPRETED_DTYPES,
    LONG_ROWS,
    TINY_WEIGHTS,
    WeightCase,
    random_weight,
    scratch_around,
    to_device,
)
from support.nf4_parity import parity_cases
from torch import Tensor

from kernels import nf4_dequantize as module
from kernels.nf4_dequantize import nf4_dequantize, nf4_dequantize_reference
from nf4.double_quant import QuantizedAbsmax
from nf4.weight import NF4Weight, dequantize, empty_weight, member

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")

# a whole number of vectors in every member; members that end inside one; a matrix of one column
COMPILED_WEIGHTS = [
    WeightCase((64, 32), 192),
    WeightCase((64, 32), 192, double_quant=False),
    WeightCase((3, 2, 4), 33, 32),
    WeightCase((3, 2, 4), 33, 32, double_quant=False),
    WeightCase((5,), 1, 4096),
]
# with a gap behind each row: a division finds a vector's row, or comparisons do; shorter vectors
STRIDED = [
    (WeightCase((64, 32), 192), 16),
    (WeightCase((6, 3), 4096), 16),
    (WeightCase((6, 3), 1376), 16),
    (WeightCase((6, 3), 4096), 4),
    (WeightCase((3, 2, 4), 33, 32), 5),
]
# a compilation for nearly each with each stride: the interpreter sees many more
STRIDED_ON_GPU = [
    LONG_ROWS[0],
    WeightCase((512, 128, 128), 1024),
    WeightCase((300, 301), 1376, 4096),
    WeightCase((7, 1, 130), 4097, double_quant=False),
]
GPU_WEIGHTS = [
    *TINY_WEIGHTS,
    *[
        WeightCase(rows, in_features, block_size, double_quant)
        for rows, in_features, block_size in [
            ((1031,), 257, 64),
            ((512, 128, 128), 1024, 64),
            ((7, 1, 130), 4097, 64),
            ((300, 301), 1376, 4096),
            ((4096,), 14336, 64),
        ]
        for double_quant in (True, False)
    ],
]


def assert_holds_weight(
    scratch: Tensor,  # on the CPU, 777 before the weight was expanded into it
    weight: NF4Weight,
    first_column: int = 0,
) -> None:
    """The weight lies at the given column, and nothing else was written."""
    expected = torch.full_like(scratch, 777)
    columns = slice(first_column, first_column + weight.in_features)
    expected[:, columns] = nf4_dequantize_reference(weight, scratch.dtype)
    assert_equal(scratch, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_weight_is_expanded_as_bitsandbytes_expands_it(dtype: torch.dtype) -> None:
    compared = 0
    for case in parity_cases():
        if case.weight.dtype == dtype and case.block_size == 64:
            codes, group_absmax, mean = (
                case.theirs[f"nested_{part}"] for part in ("codes", "group_absmax", "mean")
            )
            num_rows, in_features = case.weight.shape
            absmax = QuantizedAbsmax(codes, group_absmax, mean)
            weight = NF4Weight(case.theirs["packed"], absmax, (num_rows,), in_features, 64)
            expanded = nf4_dequantize(weight, dtype).flatten()
            assert_equal(expanded, case.theirs["nested_expanded"], str(case))
            compared += 1
    assert compared > 50


def test_another_dtype_is_refused() -> None:
    weight = random_weight(TINY_WEIGHTS[0])
    with pytest.raises(ValueError, match=r"bfloat16, float16 or float32: got torch\.float64"):
        nf4_dequantize(weight, torch.float64)


@pytest.mark.parametrize("num_extra", [0, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_weight_is_expanded_into_a_part_of_a_wider_matrix(
    dtype: torch.dtype, num_extra: int
) -> None:
    case = WeightCase((3, 2, 4), 33, 32)
    weight = random_weight(case)
    scratch = scratch_around(case, dtype, num_extra)
    out = scratch[:, : case.in_features]
    assert nf4_dequantize(weight, dtype, out) is out
    assert_holds_weight(scratch, weight)


def test_rows_of_one_column_may_lie_anywhere() -> None:
    weight = random_weight(WeightCase((5,), 1))
    scratch = torch.full((2, 10), 777.0)
    # strides (2, 10): a row is a single element, whatever lies between columns
    nf4_dequantize(weight, torch.float32, scratch[:1, ::2].T)
    assert_equal(scratch[0, ::2], nf4_dequantize_reference(weight, torch.float32).flatten())
    assert (scratch[0, 1::2] == 777).all()
    assert (scratch[1] == 777).all()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(9, 49), r"shape \(9, 33\): got \(9, 49\); pass scratch\[:, :33\]"),
        (torch.zeros(9 * 33), r"shape \(9, 33\): got \(297,\); pass"),
        (torch.zeros(9, 33).half(), r"torch\.float32: got torch\.float16; pass"),
        (
            torch.zeros(9, 33, device="meta"),
            r"^the weight and out must be on one device: got cpu and meta",
        ),
        (torch.zeros(33, 9).T, r"contiguous rows: got strides \(1, 9\)"),
        (torch.zeros(9, 66)[:, ::2], r"contiguous rows: got strides \(66, 2\)"),
        (torch.zeros(1, 33).expand(9, 33), r"do not overlap: got strides \(0, 1\)"),
        (torch.zeros(297).as_strided((9, 33), (32, 1)), r"do not overlap: got strides \(32, 1\)"),
    ],
    ids=["wider", "flat", "dtype", "device", "transposed", "every-second", "expanded", "overlap"],
)
def test_an_out_that_cannot_take_the_weight_is_refused(out: Tensor, message: str) -> None:
    weight = random_weight(WeightCase((3, 2, 4), 33, 32))
    with pytest.raises(ValueError, match=message):
        nf4_dequantize(weight, torch.float32, out)
    assert out.device.type == "meta" or not out.any()


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("case", [*TINY_WEIGHTS, *LONG_ROWS], ids=str)
def test_interpreted_kernel_fills_a_part_of_a_wider_matrix(
    case: WeightCase, dtype: torch.dtype
) -> None:
    assert_holds_weight(
        interpreted_results("nf4_dequantize")[f"{case}-{dtype}-strided"], random_weight(case)
    )


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("case", TINY_WEIGHTS, ids=str)
def test_interpreted_kernel_equals_the_reference(case: WeightCase, dtype: torch.dtype) -> None:
    expected = nf4_dequantize_reference(random_weight(case), dtype)
    assert_equal(interpreted_results("nf4_dequantize")[f"{case}-{dtype}"], expected)


@on_each_gpu(DTYPES)
@pytest.mark.parametrize("case", COMPILED_WEIGHTS, ids=str)
def test_kernel_compiles_without_spilling(
    case: WeightCase,
    dtype: torch.dtype,
    capability: int,
    record_property: Callable[[str, object], None],
) -> None:
    weight = empty_weight(case.rows, case.in_features, case.block_size, case.double_quant, CPU)
    compiled = compile_launch(
        module,
        "_nf4_dequantize_kernel",
        lambda: module._launch_nf4_dequantize(weight, dtype),
        capability,
    )
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)


# the conversions to float16 are those of the contiguous kernel
@on_each_gpu([torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("case", "num_extra"), STRIDED, ids=str)
def test_strided_kernel_compiles_without_spilling(
    case: WeightCase, num_extra: int, dtype: torch.dtype, capability: int
) -> None:
    weight = empty_weight(case.rows, case.in_features, case.block_size, case.double_quant, CPU)
    out = scratch_around(case, dtype, num_extra)[:, : case.in_features]
    compile_launch(
        module,
        "_nf4_dequantize_kernel",
        lambda: module._launch_nf4_dequantize(weight, dtype, out),
        capability,
    ).assert_fits(capability)


# 8: a row stride of whole vectors, yet no multiple of the 16 that triton looks for
@pytest.mark.parametrize("num_extra", [None, 16, 8], ids="extra-{}".format)
@on_each_gpu([torch.float16, torch.bfloat16])
def test_aligned_16_bit_weight_is_moved_in_vectors_past_shared_memory(
    dtype: torch.dtype, capability: int, num_extra: int | None
) -> None:
    case = WeightCase((64, 32), 192)
    weight = empty_weight(case.rows, case.in_features, 64, True, CPU)
    out = None if num_extra is None else scratch_around(case, dtype, num_extra)[:, :192]
    compiled = compile_launch(
        module,
        "_nf4_dequantize_kernel",
        lambda: module._launch_nf4_dequantize(weight, dtype, out),
        capability,
    )
    assert compiled.shared_bytes == 0
    stores = set(compiled.find(r"st\.global\.\S+"))
    assert stores == {"st.global.v4.b32"}
    # a thread loads one scale's code a chunk, a byte, and its packed bytes at once
    assert len(compiled.find(r"ld\.global\.b8")) == module.CHUNKS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GPU_WEIGHTS, ids=str)
def test_gpu_kernel_equals_the_reference(case: WeightCase, dtype: torch.dtype) -> None:
    weight = random_weight(case)
    expanded = nf4_dequantize(to_device(weight, torch.device("cuda")), dtype)
    assert expanded.device.type == "cuda"
    assert_equal(expanded.cpu(), nf4_dequantize_reference(weight, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_kernel_expands_members_at_any_address(dtype: torch.dtype) -> None:
    weight = random_weight(WeightCase((3, 5, 70), 33, 32))
    on_gpu = to_device(weight, torch.device("cuda"))
    for index in range(3):
        expanded = nf4_dequantize(member(on_gpu, index), dtype)
        assert_equal(expanded.cpu(), nf4_dequantize_reference(member(weight, index), dtype))


@pytest.mark.gpu
# vectors of 16 bytes; shorter ones; rows that begin at any address; no gap
@pytest.mark.parametrize(("first_column", "num_extra"), [(0, 16), (0, 4), (3, 5), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", STRIDED_ON_GPU, ids=str)
def test_gpu_kernel_fills_a_part_of_a_wider_matrix(
    case: WeightCase, dtype: torch.dtype, first_column: int, num_extra: int
) -> None:
    weight = random_weight(case)
    scratch = scratch_around(case, dtype, num_extra).cuda()
    out = scratch[:, first_column : first_column + case.in_features]
    assert nf4_dequantize(to_device(weight, out.device), dtype, out) is out
    assert_holds_weight(scratch.cpu(), weight, first_column)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_kernel_fills_rows_of_a_wider_matrix_with_a_member(dtype: torch.dtype) -> None:
    case = WeightCase((3, 5, 70), 33, 32)
    weight = random_weight(case)
    on_gpu = to_device(weight, torch.device("cuda"))
    for index, num_rows in enumerate(case.rows):
        scratch = scratch_around(case, dtype).cuda()
        nf4_dequantize(member(on_gpu, index), dtype, scratch[:num_rows, :33])
        assert_holds_weight(scratch[:num_rows].cpu(), member(weight, index))
        assert (scratch[num_rows:] == 777).all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_kernel_runs_where_the_weight_is() -> None:
    weight = random_weight(WeightCase((64, 32), 192))
    with torch.cuda.device(0):
        expanded = nf4_dequantize(to_device(weight, torch.device("cuda:1")), torch.bfloat16)
    assert_equal(expanded.cpu(), nf4_dequantize_reference(weight, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("num_extra", [0, 16], ids="extra-{}".format)
@pytest.mark.parametrize(
    ("rows", "in_features"),
    [((65_537,), 32_771), ((65_537, 3), 32_771), ((65_537, 3), 32_768)],
    ids=str,
)
def test_gpu_kernel_reaches_beyond_int32(
    rows: tuple[int, ...], in_features: int, num_extra: int
) -> None:
    assert sum(rows) * in_features > 2**31
    device = torch.device("cuda")
    weight = empty_weight(rows, in_features, 64, True, device)
    assert isinstance(weight.absmax, QuantizedAbsmax)
    weight.packed.random_(256)
    weight.absmax.codes.random_(256)
    weight.absmax.group_absmax.uniform_(0.1, 0.5)
    weight.absmax.mean.fill_(1)
    # the reference in torch, on the GPU too: on a CPU it takes minutes
    expected = dequantize(weight, torch.bfloat16)
    size = sum(rows), in_features + num_extra
    scratch = torch.full(size, 777, dtype=torch.bfloat16, device=device)
    out = scratch[:, :in_features] if num_extra else None
    assert_equal(nf4_dequantize(weight, torch.bfloat16, out), expected)
    assert (scratch[:, in_features:] == 777).all()
