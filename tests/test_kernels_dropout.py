"""kernels/dropout.py: Philox's published words, one mask everywhere, kept as often as asked."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ahead_of_time import GPUS, CompiledLaunch, compile_launch, on_each_gpu
from support.dropout_cases import (
    SEED,
    SITE,
    TINY_DROPOUTS,
    DropoutCase,
    dropout_cases,
    dropout_inputs,
    dropout_results,
)
from support.equality import assert_equal
from support.interpreter import interpreted_results
from torch import Tensor

from kernels import dropout as module
from kernels.dropout import dropout, dropout_add_, keep_reference, philox_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA = torch.device("cuda")
CPU_CASES = dropout_cases([(0, 64), (1, 1), (5, 97), (3, 512)], DTYPES)
GPU_CASES = dropout_cases([(0, 64), (1, 1), (67, 997), (131, 4096), (33, 14336)], DTYPES)


# of Random123's kat_vectors: counter, key, result
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def as_words(values: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "digits of pi"]
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox_reference(as_words(counter), as_words(key))
    assert tuple(int(word) for word in words) == expected


def test_four_neighbours_take_the_words_of_their_counter() -> None:
    seed, site, p = 0x299F31D0A4093822, 5, 0.5
    keep = keep_reference((3, 7), torch.tensor([seed]), site, p).flatten()
    key = as_words((seed & 0xFFFFFFFF, seed >> 32))
    for place, kept in enumerate(keep.tolist()):
        words = philox_reference(as_words((place // 4, 0, site, 0)), key)
        assert kept == (int(words[place % 4]) >= 2**31)


def expected_results(case: DropoutCase) -> dict[str, Tensor]:
    """Round once what the reference's mask leaves."""
    inputs = dropout_inputs(case)
    shape = (case.num_rows, case.width)
    keep = keep_reference(shape, torch.tensor([SEED]), SITE, case.p)
    scale = torch.tensor(1 / (1 - case.p), dtype=torch.float32)
    zero = torch.zeros(())
    kept = torch.where(keep, inputs["x"].float() * scale, zero)
    total = inputs["total"].float() + kept
    mask = torch.where(keep, scale, zero)
    z = kept.to(case.dtype)
    return {
        "z": z,
        "in place": z,
        "total": total.to(case.dtype),
        "mask": mask.to(case.dtype),
    }


def assert_as_expected(case: DropoutCase, actual: dict[str, Tensor]) -> None:
    expected = expected_results(case)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, name)


def write(z: Tensor, x: Tensor, seed: Tensor, site: int, p: float) -> None:
    assert dropout(x, seed, site, p, out=z) is z


def add(total: Tensor, x: Tensor, seed: Tensor, site: int, p: float) -> None:
    assert dropout_add_(total, x, seed, site, p) is total


@pytest.mark.parametrize("case", TINY_DROPOUTS, ids=str)
def test_interpreted_kernel_drops_what_the_reference_does(case: DropoutCase) -> None:
    prefix = f"{case}/"
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in interpreted_results("dropout").items()
        if name.startswith(prefix)
    }
    assert_as_expected(case, found)


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_on_a_cpu_the_reference_drops(case: DropoutCase) -> None:
    assert_as_expected(case, dropout_results(case, write, add))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_as_many_values_are_kept_as_asked(p: float) -> None:
    M, K = 613, 997
    kept = int(keep_reference((M, K), torch.tensor([SEED]), SITE, p).sum())
    # six standard deviations of a binomial distribution
    assert abs(kept - M * K * (1 - p)) <= 6 * math.sqrt(M * K * p * (1 - p))


def test_each_seed_and_site_has_a_mask_of_its_own_and_has_it_again() -> None:
    M, K, p = 64, 97, 0.5
    keys = [(seed, site) for seed in (0, 1, 2**32, -1) for site in (0, 1, 2**31 - 1)]
    masks = [keep_reference((M, K), torch.tensor([seed]), site, p) for seed, site in keys]
    for (seed, site), mask in zip(keys, masks, strict=True):
        assert torch.equal(keep_reference((M, K), torch.tensor([seed]), site, p), mask)
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            # two fair coins agree half of the time, within six standard deviations
            assert abs(int((mask == other).sum()) - M * K / 2) <= 6 * math.sqrt(M * K / 4)


def test_a_dropped_value_is_zero_whatever_it_was() -> None:
    x = torch.full((4, 64), float("inf"))
    z = dropout(x, torch.tensor([SEED]), SITE, 0.5)
    assert set(z.flatten().tolist()) == {0.0, float("inf")}


def test_the_gradient_of_dropout_is_dropout() -> None:
    x, grad = torch.randn(2, 5, 97).double().unbind()
    seed = torch.tensor([SEED])
    # linear in x, so its transpose gives the same product
    z = dropout(x.float(), seed, SITE, 0.25).double()
    grad_x = dropout_add_(torch.zeros(5, 97), grad.float(), seed, SITE, 0.25).double()
    magnitudes = float((z * grad.float()).abs().sum())
    difference = float((z * grad.float()).sum() - (x.float() * grad_x).sum())
    # z and grad_x round a product each
    assert abs(difference) <= torch.finfo(torch.float32).eps * magnitudes


ONES, ONE_SEED = torch.ones(3, 4), torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("function", [dropout, dropout_add_])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": ONES.int(), "z": ONES.int()}, "^x must be bfloat16, float16 or float32"),
        ({"x": ONES[0], "z": ONES[0]}, "^x must be a matrix"),
        ({"z": torch.ones(3, 5)}, "^the result must have x's shape and dtype"),
        ({"z": ONES.half()}, "^the result must have x's shape and dtype"),
        ({"x": torch.ones(4, 3).T}, "must have contiguous rows"),
        ({"z": torch.ones(4, 3).T}, "must have contiguous rows"),
        ({"seed": ONE_SEED.int()}, "^the seed must be one int64"),
        ({"seed": ONE_SEED[0]}, "^the seed must be one int64"),
        ({"seed": ONE_SEED.to("meta")}, "must be on one device"),
        ({"site": -1}, r"^the site must be from 0 to 2\^31 - 1: got -1"),
        ({"site": 2**31}, r"^the site must be from 0 to 2\^31 - 1"),
        ({"p": -0.1}, "^p must be at least 0 and less than 1: got -0.1"),
        ({"p": 1.0}, "^p must be at least 0 and less than 1: got 1.0"),
        ({"p": 1 - 2**-40}, "^p must be at least 0 and less than 1"),
        ({"p": float("nan")}, "^p must be at least 0 and less than 1: got nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(
    function: Callable[..., Tensor], changes: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"x": ONES, "z": ONES.clone(), "seed": ONE_SEED, "site": 0, "p": 0.5}
    given |= changes
    given["out" if function is dropout else "total"] = given.pop("z")
    with pytest.raises(ValueError, match=message):
        function(**given)


def compile_kernel(
    dtype: torch.dtype, width: int, capability: int, adds: bool, p: float = 0.1
) -> CompiledLaunch:
    x, seed = torch.empty(2, width, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    return compile_launch(
        module,
        "_dropout_kernel",
        lambda: module._launch_dropout(x, x, seed, 3, p, adds),
        capability,
    )


COMPILED = [
    (dtype, width, capability)
    for dtype in DTYPES
    for capability in GPUS[dtype]
    for width in (4096, 997)
]


@pytest.mark.parametrize("adds", [False, True], ids=["dropout", "dropout_add_"])
@pytest.mark.parametrize(
    ("dtype", "width", "capability"),
    COMPILED,
    ids=[f"{str(dtype)[6:]}-K{width}-sm{capability}" for dtype, width, capability in COMPILED],
)
def test_kernel_compiles_without_spilling(
    adds: bool,
    dtype: torch.dtype,
    width: int,
    capability: int,
    record_property: Callable[[str, object], None],
) -> None:
    compiled = compile_kernel(dtype, width, capability, adds)
    record_property("resources", str(compiled))
    # a value of a row that begins anywhere takes a register of its own, and sm_75 has too few
    is_scattered = (adds, dtype, width, capability) == (True, torch.float16, 997, 75)
    compiled.assert_fits(capability, spilled_bytes=32 if is_scattered else 0)


@pytest.mark.parametrize("p", [0.0, 0.75], ids="p{}".format)
def test_kernel_compiles_for_every_threshold(p: float) -> None:
    compile_kernel(torch.bfloat16, 4096, 90, adds=False, p=p).assert_fits(90)


@on_each_gpu(DTYPES)
def test_values_are_moved_once_in_vectors_of_16_bytes_past_shared_memory(
    dtype: torch.dtype, capability: int
) -> None:
    for adds in (False, True):
        compiled = compile_kernel(dtype, 4096, capability, adds)
        assert compiled.shared_bytes == 0
        assert not compiled.find(r"bar\.sync")
        for way, number in (("ld", 1 + adds), ("st", 1)):
            accesses = compiled.find(rf"{way}\.global\S*\.v\d\S+")
            assert accesses == [f"{way}.global.v4.b32"] * (number * module.VECTORS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_value_costs_fewer_instructions_than_memory_leaves_time_for(
    dtype: torch.dtype,
) -> None:
    # an H100 has time for 9 instructions a byte at 3 TB/s, 4 bytes to drop and 6 to add
    values = module.VECTORS * module.VECTOR_BYTES // dtype.itemsize
    assert compile_kernel(dtype, 4096, 90, False).count_instructions() <= 4 * 9 * values
    assert compile_kernel(dtype, 4096, 90, True).count_instructions() <= 6 * 9 * values


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernel_drops_what_the_reference_does(case: DropoutCase) -> None:
    actual = dropout_results(case, write, add, CUDA)
    assert_as_expected(case, {name: tensor.cpu() for name, tensor in actual.items()})


@pytest.mark.gpu
def test_gpu_graph_takes_its_seed_from_the_device() -> None:
    x, seed = torch.randn(67, 997, device=CUDA), torch.tensor([SEED], device=CUDA)
    dropout(x, seed, SITE, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = dropout(x, seed, SITE, 0.5)
    for value in (SEED, 1, SEED):
        seed.fill_(value)
        graph.replay()
        assert_equal(z.cpu(), dropout(x.cpu(), torch.tensor([value]), SITE, 0.5))


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_counter_goes_on_in_its_high_word() -> None:
    num_rows, width = 2**22 + 3, 4096
    assert num_rows * width > 4 * 2**32
    row = torch.ones(1, width, dtype=torch.bfloat16, device=CUDA)
    seed = torch.tensor([SEED], device=CUDA)
    last = dropout(row.expand(num_rows, width), seed, SITE, 0.5)[-3:].cpu()
    groups = torch.arange((num_rows - 3) * width // 4, num_rows * width // 4)
    assert int(groups[0]) >= 2**32
    zeros = torch.zeros_like(groups)
    counter = (groups & 0xFFFFFFFF, groups >> 32, zeros + SITE, zeros)
    words = philox_reference(counter, as_words((SEED & 0xFFFFFFFF, SEED >> 32 & 0xFFFFFFFF)))
    keep = torch.stack(words, dim=1).view(3, width) >= 2**31
    assert_equal(last, 2 * keep.bfloat16())
