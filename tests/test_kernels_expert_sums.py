"""kernels/expert_sums.py: each token's rows times their weights, in one order everywhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ahead_of_time import compile_launch, on_each_gpu
from support.equality import assert_equal
from support.expert_sums_cases import TINY_SUMS, SumCase, sum_cases, sum_inputs, summed
from support.interpreter import interpreted_results

from kernels import expert_sums as module
from kernels.expert_sums import expert_sums, expert_sums_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA = torch.device("cuda")
GPU_CASES = sum_cases([(0, 2, 64), (1, 1, 1), (67, 3, 997), (131, 8, 2048)], DTYPES)


@pytest.mark.parametrize("case", TINY_SUMS, ids=str)
def test_interpreted_kernel_adds_what_the_reference_does(case: SumCase) -> None:
    expected = summed(case, expert_sums_reference)
    assert_equal(interpreted_results("expert_sums")[str(case)], expected)


@pytest.mark.parametrize("case", sum_cases([(0, 2, 64), (1, 1, 1), (5, 3, 97)], DTYPES), ids=str)
def test_each_token_has_its_own_rows(case: SumCase) -> None:
    inputs = sum_inputs(case)
    truth = torch.zeros(case.num_tokens, case.width, dtype=torch.float64)
    if case.has_start:
        truth += inputs["start"]
    for token in range(case.num_tokens):
        for j, place in enumerate(inputs["places"][token].tolist()):
            weight = inputs["weights"][token, j].double() if case.has_weights else 1.0
            truth[token] += weight * inputs["rows"][place].double()
    actual = summed(case, expert_sums)
    assert actual.dtype == case.dtype
    # each of the terms and of their sums, of order 4, is rounded, and the result again
    eps = torch.finfo(torch.float32).eps
    allowed = 4 * 2 * (case.num_terms + 1) * eps + torch.finfo(case.dtype).eps / 2 * truth.abs()
    assert ((actual.double() - truth).abs() <= allowed).all()


ROWS, PLACES = torch.ones(6, 4), torch.arange(6).view(3, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ROWS.int()}, "^rows must be bfloat16, float16 or float32"),
        ({"rows": ROWS[0]}, r"^rows and places must be matrices: got shapes \(4,\)"),
        ({"rows": torch.ones(4, 6).T}, "^rows must have contiguous rows"),
        ({"places": PLACES.int()}, r"^places must be torch.int64 of shape \(3, 2\)"),
        ({"places": torch.arange(6).view(2, 3).T}, "^places must be contiguous: got strides"),
        ({"weights": torch.ones(3, 3)}, r"^weights must be torch.float32 of shape \(3, 2\)"),
        ({"weights": torch.ones(3, 2).half()}, "^weights must be torch.float32 .* got torch.float"),
        ({"start": torch.ones(3, 5)}, r"^start must be torch.float32 of shape \(3, 4\)"),
        ({"places": PLACES.to("meta")}, "^rows and places must be on one device"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_sums(**{"rows": ROWS, "places": PLACES} | changes)


@on_each_gpu(DTYPES)
@pytest.mark.parametrize("width", [2048, 997], ids="D{}".format)
def test_kernel_compiles_without_spilling(
    dtype: torch.dtype,
    width: int,
    capability: int,
    record_property: Callable[[str, object], None],
) -> None:
    rows, places = torch.empty(16, width, dtype=dtype), torch.zeros(2, 8, dtype=torch.int64)
    compiled = compile_launch(
        module,
        "_expert_sums_kernel",
        lambda: module._launch_expert_sums(rows, places, torch.empty(2, 8), torch.empty(2, width)),
        capability,
    )
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    assert compiled.shared_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernel_adds_what_the_reference_does(case: SumCase) -> None:
    assert_equal(summed(case, expert_sums, CUDA).cpu(), summed(case, expert_sums_reference))
