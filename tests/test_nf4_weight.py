"""nf4/weight.py: bit for bit what bitsandbytes stores, member by member, and what is refused."""

from dataclasses import replace

import pytest
import torch
from support.equality import assert_equal
from support.nf4_parity import (
    ParityCase,
    centred_scales,
    cpu_blockwise,
    cpu_codes,
    cuda_codes,
    parity_cases,
    peer_result,
    unpack,
)
from torch import Tensor

from nf4.blockwise import BLOCK_SIZES
from nf4.double_quant import DYNAMIC_MAP, GROUP_SIZE, QuantizedAbsmax
from nf4.levels import LEVELS
from nf4.weight import (
    NF4Weight,
    dequantize,
    empty_weight,
    member,
    member_spans,
    members,
    pick_parts,
    quantize,
    quantize_member,
)


def nested_scales(weight: NF4Weight) -> QuantizedAbsmax:
    assert isinstance(weight.absmax, QuantizedAbsmax)
    return weight.absmax


def plain_scales(weight: NF4Weight) -> Tensor:
    assert isinstance(weight.absmax, Tensor)
    return weight.absmax


def has_divided_block(case: ParityCase) -> bool:
    """Whether dividing the short last block, as the CPU backend does, changes a code of it."""
    return "that divide" in case.name


def has_short_block_of_zeros(case: ParityCase) -> bool:
    num_short = case.weight.numel() % case.block_size
    return num_short > 0 and not case.weight.flatten()[-num_short:].any()


def test_there_are_at_least_500_cases_of_every_kind() -> None:
    cases = parity_cases()
    assert len(cases) == 1266
    assert {case.block_size for case in cases} == set(BLOCK_SIZES)
    assert {case.weight.dtype for case in cases} == {torch.float32, torch.float16, torch.bfloat16}
    assert sum(case.has_short_block for case in cases) > 500
    assert sum(has_short_block_of_zeros(case) for case in cases) == 48
    assert sum(has_divided_block(case) for case in cases) == 1


def test_maps_equal_bitsandbytes() -> None:
    assert_equal(LEVELS, peer_result("levels"))
    assert_equal(DYNAMIC_MAP, peer_result("dynamic_map"))


def test_packed_bytes_equal_bitsandbytes_but_for_one_divided_block() -> None:
    for case in parity_cases():
        packed = quantize(case.weight, case.block_size).packed
        if not has_divided_block(case):
            assert_equal(packed, case.theirs["packed"], str(case))
            continue
        # its CPU backend divides a short block by the scale, its CUDA kernel multiplies
        num_elements = case.weight.numel()
        ours, theirs = (unpack(p, num_elements) for p in (packed, case.theirs["packed"]))
        modelled, _ = cpu_blockwise(case.weight, case.block_size)
        assert_equal(theirs, modelled, str(case))
        assert int((ours != theirs).sum()) == 6


def test_scales_equal_bitsandbytes_but_for_short_blocks_of_zeros() -> None:
    for case in parity_cases():
        scales = plain_scales(quantize(case.weight, case.block_size, double_quant=False))
        if has_short_block_of_zeros(case):
            # its CPU backend stores the floor under the reciprocal
            assert scales[-1] == 0
            scales[-1] = 1e-38
        assert_equal(scales, case.theirs["absmax"], str(case))


def test_group_scales_and_mean_equal_bitsandbytes_but_for_one_short_block_of_zeros() -> None:
    num_different = 0
    for case in parity_cases():
        scales = nested_scales(quantize(case.weight, case.block_size))
        mean = scales.mean
        if has_short_block_of_zeros(case) and case.weight.numel() < case.block_size:
            # the mean of the one scale that it stores as 1e-38
            assert mean.item() == 0
            mean = torch.tensor([1e-38])
            num_different += 1
        assert_equal(mean, case.theirs["nested_mean"], str(case))
        assert_equal(scales.group_absmax, case.theirs["nested_group_absmax"], str(case))
    assert num_different == 24


def test_second_level_codes_follow_the_cuda_rule_and_the_cpu_backends_its_table() -> None:
    num_codes = num_different = 0
    for case in parity_cases():
        scales = nested_scales(quantize(case.weight, case.block_size))
        absmax, group_absmax = case.theirs["absmax"], case.theirs["nested_group_absmax"]
        values = centred_scales(absmax, case.theirs["nested_mean"], group_absmax)
        # every backend gives a group without spread code 0
        has_spread = (group_absmax > 0).repeat_interleave(GROUP_SIZE)[: absmax.numel()]
        exact, tabled = cuda_codes(values) * has_spread, cpu_codes(values) * has_spread
        assert_equal(scales.codes, exact, f"ours, {case}")
        assert_equal(case.theirs["nested_codes"], tabled, f"bitsandbytes' CPU backend, {case}")
        num_codes += absmax.numel()
        num_different += int((exact != tabled).sum())
    assert num_codes == 469_600
    # 756 of them; the last bit of a mean depends on how a processor adds, which may move one or two
    assert round(100 * num_different / num_codes, 2) == 0.16


def test_expanded_weights_equal_bitsandbytes() -> None:
    for case in parity_cases():
        if has_divided_block(case):
            continue
        weight = quantize(case.weight, case.block_size, double_quant=False)
        expanded = dequantize(weight, case.weight.dtype).flatten()
        assert_equal(expanded, case.theirs["expanded"], str(case))


def test_bytes_of_bitsandbytes_expand_to_the_weights_it_expands_them_to() -> None:
    for case in parity_cases():
        num_rows, in_features = case.weight.shape
        codes, group_absmax, mean = (
            case.theirs[f"nested_{part}"] for part in ("codes", "group_absmax", "mean")
        )
        weight = NF4Weight(
            case.theirs["packed"],
            QuantizedAbsmax(codes, group_absmax, mean),
            (num_rows,),
            in_features,
            case.block_size,
        )
        expanded = dequantize(weight, case.weight.dtype).flatten()
        assert_equal(expanded, case.theirs["nested_expanded"], str(case))


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize(
    ("rows", "in_features", "block_size"),
    [((3, 2, 5), 33, 32), ((64, 16, 16), 128, 64), ((1, 1), 1, 4096), ((300, 7), 65, 64)],
    ids=str,
)
def test_members_equal_the_matrices_quantized_alone(
    rows: tuple[int, ...], in_features: int, block_size: int, double_quant: bool
) -> None:
    matrices = [torch.randn(n, in_features) * 10.0**i for i, n in enumerate(rows)]
    stacked = empty_weight(rows, in_features, block_size, double_quant, torch.device("cpu"))
    # the order in which members arrive does not matter
    for index in reversed(range(len(rows))):
        quantize_member(stacked, index, matrices[index], "weight")
    for index, matrix in enumerate(matrices):
        alone, part = quantize(matrix, block_size, double_quant), member(stacked, index)
        assert part.shape == tuple(matrix.shape)
        assert_equal(part.packed, alone.packed)
        if double_quant:
            for name in ("codes", "group_absmax", "mean"):
                ours, expected = (getattr(nested_scales(w), name) for w in (part, alone))
                assert_equal(ours, expected, name)
        else:
            assert_equal(plain_scales(part), plain_scales(alone))
    alone = [dequantize(quantize(m, block_size, double_quant), torch.float32) for m in matrices]
    assert_equal(dequantize(stacked, torch.float32), torch.cat(alone))


def test_members_are_views_and_count_from_the_end_too() -> None:
    weight = empty_weight((2, 3), 64, 64, True, torch.device("cpu"))
    last = member(weight, -1)
    quantize_member(weight, 1, torch.randn(3, 64), "weight")
    assert_equal(nested_scales(last).mean, nested_scales(member(weight, 1)).mean)
    assert last.packed.data_ptr() == weight.packed[64:].data_ptr()


@pytest.mark.parametrize("double_quant", [False, True])
def test_some_parts_of_a_weight_are_picked_with_their_scales(double_quant: bool) -> None:
    # three parts of two matrices each
    weight = empty_weight((5, 3) * 3, 33, 32, double_quant, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for index, rows in enumerate(weight.rows):
        scale = 10.0**index
        quantize_member(weight, index, scale * torch.randn(rows, 33, generator=generator), "w")
    parts = dequantize(weight, torch.float32).view(3, 8, 33)
    picked = pick_parts(weight, 3, torch.tensor([2, 0, 2, 1]))
    assert picked.rows == (5, 3) * 4
    expected = parts[torch.tensor([2, 0, 2, 1])].flatten(0, 1)
    assert_equal(dequantize(picked, torch.float32), expected)
    # and those that lie side by side, without a copy
    some = members(weight, slice(2, 6))
    assert some.packed.data_ptr() == member(weight, 2).packed.data_ptr()
    assert_equal(dequantize(some, torch.float32), parts[1:].flatten(0, 1))


def test_spans_leave_no_gap_and_end_where_the_buffers_do() -> None:
    spans = member_spans((3, 300, 1), 33, 32)
    starts = [(s.row, s.packed.start, s.blocks.start, s.groups.start) for s in spans]
    # 99 elements are 50 bytes, 4 blocks, 1 group; 9,900 are 4,950 bytes, 310 blocks, 2 groups
    assert starts == [(0, 0, 0, 0), (3, 50, 4, 1), (303, 5000, 314, 3)]
    assert (spans[-1].packed.stop, spans[-1].blocks.stop, spans[-1].groups.stop) == (5017, 316, 4)


@pytest.mark.parametrize(
    ("double_quant", "bits"), [(True, 4 + 8 / 64 + 32 / 64 / 256), (False, 4.5)], ids=str
)
def test_a_weight_holds_the_bits_that_the_format_promises(double_quant: bool, bits: float) -> None:
    weight = empty_weight((256, 64, 64), 1024, 64, double_quant, torch.device("cpu"))
    means = 3 * 4 if double_quant else 0
    assert weight.num_bytes == 384 * 1024 * bits / 8 + means
    assert weight.shape == (384, 1024)
    assert weight.is_double_quantized == double_quant


def test_quantizing_again_keeps_codes_and_plain_scales() -> None:
    matrix = torch.randn(33, 257)
    plain = quantize(matrix, double_quant=False)
    again = quantize(dequantize(plain, torch.float32), double_quant=False)
    assert_equal(again.packed, plain.packed)
    assert_equal(plain_scales(again), plain_scales(plain))
    nested = quantize(matrix)
    again = quantize(dequantize(nested, torch.float32))
    assert_equal(again.packed, nested.packed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_non_finite_weight_is_refused_by_name(value: float, dtype: torch.dtype) -> None:
    matrix = torch.randn(5, 70).to(dtype)
    matrix[2, 3] = matrix[4, 69] = value
    message = "^layers.3.up_proj.weight must hold finite weights only: 2 of 350 are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        quantize(matrix, name="layers.3.up_proj.weight")


def test_refused_member_leaves_the_weight_as_it_was() -> None:
    weight = quantize(torch.randn(4, 64))
    before = dequantize(weight, torch.float32)
    with pytest.raises(ValueError, match="finite"):
        quantize_member(weight, 0, torch.full((4, 64), float("nan")), "weight")
    assert_equal(dequantize(weight, torch.float32), before)


def test_matrix_of_another_shape_or_type_is_refused_by_name() -> None:
    weight = empty_weight((4, 2), 64, 64, True, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^v must have shape \(2, 64\): got \(64, 2\)$"):
        quantize_member(weight, 1, torch.ones(64, 2), "v")
    with pytest.raises(ValueError, match=r"^v must be a non-empty .* got torch.int32 with shape"):
        quantize_member(weight, 1, torch.ones(2, 64, dtype=torch.int32), "v")
    for shape in ((64,), (2, 2, 64), (0, 64)):
        with pytest.raises(ValueError, match=r"^w must be a non-empty matrix: got shape"):
            quantize(torch.ones(shape), name="w")


@pytest.mark.parametrize(
    ("rows", "in_features", "block_size", "message"),
    [
        ((4,), 64, 100, r"block_size must be one of \(32, .*\): got 100"),
        ((), 64, 64, r"at least one member, .* got rows \(\) and in_features 64"),
        ((4, 0), 64, 64, r"at least one member, .* got rows \(4, 0\)"),
        ((4,), 0, 64, r"at least one member, .* in_features 0"),
    ],
    ids=["block size", "no member", "empty member", "no columns"],
)
def test_weight_that_cannot_be_is_refused(
    rows: tuple[int, ...], in_features: int, block_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        empty_weight(rows, in_features, block_size, True, torch.device("cpu"))


def test_memory_that_no_member_has_filled_is_poisoned_in_tests() -> None:
    weight = empty_weight((2, 2), 64, 64, True, torch.device("cpu"))
    quantize_member(weight, 0, torch.randn(2, 64), "weight")
    scales = nested_scales(weight)
    assert set(weight.packed[64:].tolist()) == {0xA5}
    assert scales.group_absmax.isnan().tolist() == [False, True]
    assert scales.mean.isnan().tolist() == [False, True]


def test_truncated_buffers_are_refused() -> None:
    weight = quantize(torch.randn(4, 64))
    with pytest.raises(ValueError, match="256 weights in blocks of 64 need 128 bytes and 4 scales"):
        dequantize(replace(weight, packed=weight.packed[:-1]), torch.float32)
