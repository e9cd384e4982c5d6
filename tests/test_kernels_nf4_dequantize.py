"""kernels/nf4_dequantize.py: equal to the reference, interpreted and on a GPU; compiles for 4."""

import re
from collections.abc import Callable

import pytest
import torch
from ahead_of_time import compile_launch
from equality import assert_equal
from interpreter import interpreted_results
from nf4_cases import INTERPRETED_DTYPES, TINY_WEIGHTS, WeightCase, random_weight, to_device
from nf4_parity import parity_cases

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


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("case", TINY_WEIGHTS, ids=str)
def test_interpreted_kernel_equals_the_reference(case: WeightCase, dtype: torch.dtype) -> None:
    expected = nf4_dequantize_reference(random_weight(case), dtype)
    assert_equal(interpreted_results()[f"{case}-{dtype}"], expected)


@pytest.mark.parametrize("capability", [80, 89, 90, 100], ids="sm{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@pytest.mark.parametrize("capability", [80, 89, 90, 100], ids="sm{}".format)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_aligned_16_bit_weight_is_moved_in_vectors_past_shared_memory(
    dtype: torch.dtype, capability: int
) -> None:
    weight = empty_weight((64, 32), 192, 64, True, CPU)
    compiled = compile_launch(
        module,
        "_nf4_dequantize_kernel",
        lambda: module._launch_nf4_dequantize(weight, dtype),
        capability,
    )
    assert compiled.shared_bytes == 0
    stores = set(re.findall(r"st\.global\.\S+", compiled.ptx))
    assert stores == {"st.global.v4.b32"}
    # a thread loads four codes of scales a chunk, byte by byte, but its packed bytes at once
    assert len(re.findall(r"ld\.global\.b8", compiled.ptx)) == 4 * module.CHUNKS


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
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_kernel_runs_where_the_weight_is() -> None:
    weight = random_weight(WeightCase((64, 32), 192))
    with torch.cuda.device(0):
        expanded = nf4_dequantize(to_device(weight, torch.device("cuda:1")), torch.bfloat16)
    assert_equal(expanded.cpu(), nf4_dequantize_reference(weight, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "in_features"), [((65_537,), 32_771), ((65_537, 3), 32_771)], ids=str
)
def test_gpu_kernel_reaches_beyond_int32(rows: tuple[int, ...], in_features: int) -> None:
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
    assert_equal(nf4_dequantize(weight, torch.bfloat16), expected)
