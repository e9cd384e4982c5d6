"""kernels/cross_entropy.py: no worse than torch, interpreted and on a GPU; in place, row by row."""

import math
from collections.abc import Callable
from itertools import groupby

import pytest
import torch
import torch.nn.functional as F
from support.ahead_of_time import GPUS, REGISTERS_LIMIT, CompiledLaunch, compile_launch, on_each_gpu
from support.cross_entropy_cases import (
    OUTSIDE,
    TINY_LOGITS,
    LogitsCase,
    draw_logits,
    logits_cases,
    logits_with_targets_outside,
    loss_results,
)
from support.equality import assert_equal, assert_no_worse_than
from support.interpreter import interpreted_results
from torch import Tensor

from kernels import cross_entropy as module
from kernels.cross_entropy import cross_entropy, cross_entropy_
from kernels.softcap import ERROR

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA = torch.device("cuda")
# vocabularies of real models, and one that is odd
VOCABULARIES = [32_000, 49_152, 128_256, 151_936, 50_257]
CPU_CASES = logits_cases([(0, 64, 64), (1, 1, 1), (6, 97, 97), (5, 97, 112)], DTYPES)
GPU_CASES = logits_cases(
    [
        (0, 64, 64),
        (1, 1, 1),
        (6, 97, 97),
        (67, 4096, 4096),
        (5, 8229, 8240),
        (33, 32_000, 32_000),
        (5, 50_257, 50_257),
        (5, 50_257, 50_272),
        (261, 128_256, 128_256),
        (5, 151_936, 151_952),
    ],
    DTYPES,
)


def with_torch(case: LogitsCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """Losses and gradient by autograd, computed in a dtype; the gradient in the logits' if that is
    not float64."""
    _, logits, targets = draw_logits(case)
    leaf = logits.to(dtype).requires_grad_()
    z = leaf if case.cap is None else case.cap * torch.tanh(leaf / case.cap)
    losses = F.cross_entropy(z, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    if dtype != torch.float64:
        gradient = gradient.to(case.dtype)
    largest = z.detach().softmax(dim=1).amax(dim=1)
    return {"losses": losses.detach(), "gradient": gradient, "largest probability": largest}


def assert_as_good_as_torch(case: LogitsCase, actual: dict[str, Tensor]) -> None:
    """A row's gradient may be far smaller than another's, so each is compared."""
    _, logits, targets = draw_logits(case)
    truth, baseline = with_torch(case, torch.float64), with_torch(case, torch.float32)
    assert_equal_with_infinities(actual["logits"], logits)
    assert actual["behind"].shape == (case.num_rows, case.row_width - case.vocab_size)
    assert actual["behind"].isnan().all()
    for name in ("losses alone", "losses", "gradient"):
        expected = truth[name.removesuffix(" alone")]
        floor = baseline[name.removesuffix(" alone")]
        assert actual[name].shape == expected.shape, name
        for row in range(case.num_rows):
            allowance = 0.0
            if case.cap is not None:
                # of the two logits that a loss or a probability compares, and of the slope
                largest = float(truth["largest probability"][row])
                share = (2 * case.cap + 2) * largest if name == "gradient" else 2 * case.cap
                allowance = ERROR * share
            if name == "gradient" and case.dtype == torch.float32:
                assert_gradient_in_float32(
                    actual[name][row], expected[row], int(targets[row]), allowance
                )
            else:
                assert_no_worse_than(
                    actual[name][row], floor[row], expected[row], what=name, allowance=allowance
                )


def assert_gradient_in_float32(
    actual: Tensor, expected: Tensor, target: int, allowance: float
) -> None:
    """A probability of almost 1 leaves a gradient of almost 0, which errs as the probability does.

    That has two exponentials of two units each and a quotient, and shares the error of the row's
    sum: a thread adds V / 4096 terms, the threads' sums meet in 12 more, and each time that a
    thread's maximum rises its sum is scaled, which happens about ln(V / 4096) times.
    """
    V = expected.numel()
    num_roundings = V / 4096 + 12 + 3 * math.log(max(V / 4096, 1)) + 6
    bound = num_roundings * torch.finfo(torch.float32).eps
    assert actual.isfinite().all()
    probabilities = expected.clone()
    # of the target it is a probability less one, which float64 may round to zero
    probabilities[target] += 1
    # smaller ones err more for their size, because the exponent is a larger number, but not more;
    # the target's rounds once more, next to 1
    error = (actual.double() - expected).abs().max()
    eps = torch.finfo(torch.float32).eps
    assert error <= bound * probabilities.max() + eps * expected.abs().max() + allowance


def assert_equal_with_infinities(actual: Tensor, expected: Tensor) -> None:
    assert not expected.isnan().any()
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def interpreted(prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in interpreted_results("cross_entropy").items()
        if name.startswith(prefix)
    }


def assert_only_targets_outside_are_nan(actual: dict[str, Tensor]) -> None:
    logits, targets = logits_with_targets_outside()
    valid = torch.tensor([0, -1])
    expected = logits[valid].double().requires_grad_()
    losses = F.cross_entropy(expected, targets[valid], reduction="none")
    losses.sum().backward()
    assert expected.grad is not None
    # a few operations in float32, each of which may round or approximate by two units
    tolerance = 20 * torch.finfo(torch.float32).eps * float(logits.abs().max())
    for name, truth in (("losses", losses), ("losses alone", losses), ("gradient", expected.grad)):
        assert (actual[name][valid].double() - truth).abs().max() <= tolerance, name
        assert actual[name][1:-1].isnan().all(), name
        assert actual[name].shape[0] == len(OUTSIDE) + 2


@pytest.mark.parametrize("case", TINY_LOGITS, ids=str)
def test_interpreted_kernel_is_as_good_as_torch(case: LogitsCase) -> None:
    assert_as_good_as_torch(case, interpreted(f"{case}/"))


@pytest.mark.parametrize("case", TINY_LOGITS, ids=str)
def test_interpreted_losses_alone_are_those_with_a_gradient(case: LogitsCase) -> None:
    actual = interpreted(f"{case}/")
    assert_equal(actual["losses alone"], actual["losses"])


def test_interpreted_loss_of_a_target_outside_is_nan() -> None:
    assert_only_targets_outside_are_nan(interpreted("outside/"))


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_on_a_cpu_losses_and_gradient_are_as_good_as_autograds(case: LogitsCase) -> None:
    assert_as_good_as_torch(case, loss_results(case, cross_entropy, cross_entropy_))


def test_on_a_cpu_the_loss_of_a_target_outside_is_nan() -> None:
    logits, targets = logits_with_targets_outside()
    actual = {"losses alone": cross_entropy(logits, targets)}
    actual |= {"losses": cross_entropy_(logits, targets), "gradient": logits}
    assert_only_targets_outside_are_nan(actual)


TARGETS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_])
@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.ones(3, 4).int(), TARGETS, "^logits must be bfloat16, float16 or float32"),
        (torch.ones(3, 4, 1), TARGETS, r"^logits must be rows of values: got shape \(3, 4, 1\)"),
        (torch.ones(3, 0), TARGETS, r"^logits must be rows of values: got shape \(3, 0\)"),
        (torch.ones(4, 3).T, TARGETS, r"^logits must have contiguous rows: got strides \(1, 3\)"),
        (torch.ones(3, 4), TARGETS.int(), "^targets must be one int64 for each row"),
        (torch.ones(2, 4), TARGETS, "^targets must be one int64 for each row"),
        (torch.ones(3, 4), TARGETS.to("meta"), "must be on one device: got cpu and meta"),
    ],
    ids=["dtype", "dimensions", "empty", "scattered", "int32", "rows", "device"],
)
def test_arguments_that_do_not_fit_are_refused(
    function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(logits, targets)


@pytest.mark.parametrize("cap", [0.0, -30.0, math.inf, math.nan])
def test_a_cap_that_is_none_is_refused(cap: float) -> None:
    with pytest.raises(ValueError, match=r"^the cap must be a positive number: got"):
        cross_entropy(torch.ones(3, 4), TARGETS, cap)


def test_rows_that_overlap_are_not_overwritten() -> None:
    logits = torch.ones(1, 4).expand(3, 4)
    assert cross_entropy(logits, TARGETS).shape == (3,)
    with pytest.raises(ValueError, match=r"^logits must have rows that do not overlap"):
        cross_entropy_(logits, TARGETS)


def compile_kernel(
    dtype: torch.dtype,
    vocab_size: int,
    capability: int,
    writes: bool,
    row_width: int = 0,
    cap: float | None = None,
) -> CompiledLaunch:
    logits = torch.empty(2, max(row_width, vocab_size), dtype=dtype)[:, :vocab_size]
    targets = torch.zeros(2, dtype=torch.int64)
    return compile_launch(
        module,
        "_cross_entropy_kernel",
        lambda: module._launch_cross_entropy(logits, targets, writes, cap),
        capability,
    )


COMPILED = [
    (dtype, vocab_size, capability)
    for dtype in DTYPES
    for capability in GPUS[dtype]
    for vocab_size in (VOCABULARIES if capability == 90 else (128_256, 50_257))
]


@pytest.mark.parametrize("writes", [True, False], ids=["gradient", "loss"])
@pytest.mark.parametrize("cap", [None, 30.0], ids="cap-{}".format)
@pytest.mark.parametrize(
    ("dtype", "vocab_size", "capability"),
    COMPILED,
    ids=[f"{str(dtype)[6:]}-V{size}-sm{capability}" for dtype, size, capability in COMPILED],
)
def test_kernel_compiles_without_spilling(
    writes: bool,
    dtype: torch.dtype,
    vocab_size: int,
    capability: int,
    cap: float | None,
    record_property: Callable[[str, object], None],
) -> None:
    compiled = compile_kernel(dtype, vocab_size, capability, writes, cap=cap)
    record_property("resources", str(compiled))
    # under Triton 3.6 only
    is_known = (dtype, vocab_size, capability) == (torch.float16, 50_257, 120)
    compiled.assert_fits(capability, spilled_bytes=8 if is_known else 0)
    # one float a warp, for the reductions
    assert compiled.shared_bytes <= 4 * compiled.num_threads // 32


@on_each_gpu(DTYPES)
@pytest.mark.parametrize("vocab_size", [32_000, 49_152, 128_256, 151_936])
def test_a_row_is_moved_in_vectors_of_16_bytes(
    dtype: torch.dtype, vocab_size: int, capability: int
) -> None:
    compiled = compile_kernel(dtype, vocab_size, capability, writes=True)
    # of the loop and of the rest; the other accesses are the target, its logit and the loss
    for way, number in (("ld", 2), ("st", 1)):
        accesses = compiled.find(rf"{way}\.global\S+")
        vectors = [access for access in accesses if access.endswith(".v4.b32")]
        assert len(vectors) == 2 * number * module.CHUNKS
        assert len(accesses) - len(vectors) == {"ld": 2, "st": 1}[way]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_target_is_read_before_any_thread_writes(dtype: torch.dtype) -> None:
    compiled = compile_kernel(dtype, 128_256, 90, writes=True)
    logit_bits = 8 * dtype.itemsize
    found = compiled.find(rf"ld\.global\.b{logit_bits}\b|bar\.sync|st\.global\S*\.v4\.b32")
    ways = [name.partition(".")[0] for name in found]
    assert ways.count("ld") == 1
    assert ways.count("bar") > 1
    assert [way for way, _ in groupby(ways)] == ["ld", "bar", "st"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_odd_row_that_starts_on_16_values_is_moved_in_vectors_but_for_its_rest(
    dtype: torch.dtype,
) -> None:
    compiled = compile_kernel(dtype, 50_257, 90, writes=True, row_width=50_272)
    for way, number in (("ld", 2), ("st", 1)):
        vectors = compiled.find(rf"{way}\.global\S*\.v4\.b32")
        assert len(vectors) == number * module.CHUNKS


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_the_rows_under_way_fit_the_l2_cache_of_an_h100(vocab_size: int) -> None:
    compiled = compile_kernel(torch.bfloat16, vocab_size, 90, writes=True)
    by_registers = REGISTERS_LIMIT // (-(-compiled.registers // 8) * 8 * compiled.num_threads)
    programs = 132 * min(by_registers, 2048 // compiled.num_threads)
    assert programs * vocab_size * 2 <= 50 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernel_is_as_good_as_torch_and_repeats_its_bits(case: LogitsCase) -> None:
    actual = loss_results(case, cross_entropy, cross_entropy_, CUDA)
    assert_as_good_as_torch(case, {name: tensor.cpu() for name, tensor in actual.items()})
    again = loss_results(case, cross_entropy, cross_entropy_, CUDA)
    for name in ("losses alone", "losses", "gradient"):
        assert_equal(again[name], actual[name], name)


@pytest.mark.gpu
def test_gpu_loss_of_a_target_outside_is_nan() -> None:
    logits, targets = logits_with_targets_outside(CUDA)
    actual = {"losses alone": cross_entropy(logits, targets)}
    actual |= {"losses": cross_entropy_(logits, targets), "gradient": logits}
    assert_only_targets_outside_are_nan({name: tensor.cpu() for name, tensor in actual.items()})


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_kernel_reaches_beyond_int32() -> None:
    num_rows, vocab_size = 17_000, 128_256
    assert num_rows * vocab_size > 2**31
    logits = torch.empty(num_rows, vocab_size, dtype=torch.bfloat16, device=CUDA).normal_()
    targets = torch.randint(vocab_size, (num_rows,), device=CUDA)
    last = logits[-3:].clone()
    assert_equal(cross_entropy(logits, targets)[-3:], cross_entropy(last, targets[-3:]))
    assert_equal(cross_entropy_(logits, targets)[-3:], cross_entropy_(last, targets[-3:]))
    assert_equal(logits[-3:], last)
