"""kernels/expert_rows.py: equals the reference, interpreted and on a GPU; compiles for each."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from support.ahead_of_time import compile_launch, on_each_gpu
from support.equality import assert_equal, assert_summed_in_float32
from support.expert_rows_cases import (
    TINY_EXPERT_ROWS,
    ExpertRowsCase,
    expert_rows_cases,
    expert_rows_inputs,
    expert_rows_results,
)
from support.interpreter import interpreted_results
from support.layer_cases import assert_nan_behind
from torch import Tensor

from kernels import expert_rows as module
from kernels.expert_rows import (
    combine_expert_rows,
    combine_expert_rows_reference,
    gather_expert_rows,
    gather_expert_rows_reference,
    weigh_expert_rows_backward,
    weigh_expert_rows_backward_reference,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA, META = torch.device("cuda"), torch.device("meta")
REFERENCES = (
    gather_expert_rows_reference,
    combine_expert_rows_reference,
    weigh_expert_rows_backward_reference,
)
FUNCTIONS = (gather_expert_rows, combine_expert_rows, weigh_expert_rows_backward)
CPU_CASES = TINY_EXPERT_ROWS + expert_rows_cases([(5, 2, 97)], (torch.bfloat16,))
NAMES = (
    "gathered",
    "sum",
    "weighted",
    "from start",
    "weighted from start",
    "grad_weights",
    "grad_rows",
)


def assert_found(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(found[name].cpu(), tensor, name)


@pytest.mark.parametrize("case", TINY_EXPERT_ROWS, ids=str)
def test_interpreted_kernels_equal_the_references(case: ExpertRowsCase) -> None:
    results = interpreted_results("expert_rows")
    found = {name: results[f"{case}/{name}"] for name in NAMES}
    assert_found(found, expert_rows_results(case, *REFERENCES))


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_on_a_cpu_every_token_has_its_rows(case: ExpertRowsCase) -> None:
    given = expert_rows_inputs(case)
    found = expert_rows_results(case, *FUNCTIONS)
    rows, weights, k = given.rows.double(), given.weights.double(), case.num_chosen
    for token, places in enumerate(given.places.tolist()):
        for place in places:
            assert_equal(found["gathered"][place], given.x[token])
        for name, start, factors in (
            ("sum", None, torch.ones(k).double()),
            ("weighted", None, weights[token]),
            ("from start", given.start, torch.ones(k).double()),
            ("weighted from start", given.start, weights[token]),
        ):
            parts = [factor * rows[place] for factor, place in zip(factors, places, strict=True)]
            parts += [] if start is None else [start[token].double()]
            terms = torch.stack(parts)
            # a product and a sum each
            assert_summed_in_float32(
                found[name][token], terms.sum(0), terms.abs().sum(0), len(terms) + 1, name
            )


def test_the_gradients_are_autograds() -> None:
    case = ExpertRowsCase(5, 3, 16, torch.float32)
    given = expert_rows_inputs(case)
    x, rows, weights = (t.double().requires_grad_() for t in (given.x, given.rows, given.weights))
    y = (rows[given.places] * weights[:, :, None]).sum(1)
    grad_y = torch.randint(-2, 3, y.shape).double()
    grad_rows, grad_weights = torch.autograd.grad(y, (rows, weights), grad_y)
    grad = gather_expert_rows(grad_y.float(), given.places)
    found = weigh_expert_rows_backward(grad, given.rows, given.places, given.weights)
    terms = (given.rows.double()[given.places] * grad_y[:, None]).abs().sum(2)
    assert_summed_in_float32(found, grad_weights, terms, case.width)
    # a product, rounded once
    assert_equal(grad, grad_rows.float())
    tokens = torch.empty(15, dtype=torch.int64)
    tokens[given.places.flatten()] = torch.arange(15) // 3
    of_rows = torch.randint(-2, 3, (15, 16)).double()
    (grad_x,) = torch.autograd.grad(x[tokens], x, of_rows)
    assert_equal(combine_expert_rows(of_rows.float(), given.places), grad_x.float())


@pytest.mark.parametrize("case", TINY_EXPERT_ROWS, ids=str)
def test_the_start_stays_as_it_is_and_nothing_is_written_behind_rows(case: ExpertRowsCase) -> None:
    given = expert_rows_inputs(case)
    start = given.start.clone()
    combine_expert_rows(given.rows, given.places, given.weights, given.start)
    assert_equal(given.start, start)
    weigh_expert_rows_backward(given.grad, given.rows, given.places, given.weights)
    if case.is_strided:
        assert_nan_behind(given.grad)


GIVEN = asdict(expert_rows_inputs(ExpertRowsCase(4, 2, 6, torch.float32)))


def refused(
    function: Callable[..., Tensor], names: str, changes: dict[str, Any], match: str
) -> Any:
    return pytest.param(function, names.split(), changes, match, id=f"{function.__name__}-{match}")


@pytest.mark.parametrize(
    ("function", "names", "changes", "message"),
    [
        refused(gather_expert_rows, "x places", {"x": torch.zeros(4, 6).int()}, "^x must be bf"),
        refused(gather_expert_rows, "x places", {"x": torch.zeros(5, 6)}, "^x must be .* of 4 ro"),
        refused(gather_expert_rows, "x places", {"x": torch.zeros(6, 4).T}, "^x must have contig"),
        refused(gather_expert_rows, "x places", {"places": GIVEN["places"].short()}, "^places mu"),
        refused(gather_expert_rows, "x places", {"places": torch.zeros(2, 4).long().T}, "^places"),
        refused(gather_expert_rows, "x places", {"x": torch.zeros(4, 6, device=META)}, "one devi"),
        refused(
            gather_expert_rows,
            "x places",
            {"x": torch.zeros(4, 6, requires_grad=True)},
            "^nothing is recorded .* combine_expert_rows for",
        ),
        refused(combine_expert_rows, "rows places", {"rows": torch.zeros(4, 6)}, "of 8 rows"),
        refused(
            combine_expert_rows,
            "rows places weights",
            {"weights": torch.zeros(4, 2).half()},
            "^weights must be torch.float32",
        ),
        refused(
            combine_expert_rows,
            "rows places weights start",
            {"start": torch.zeros(4, 6).half()},
            "^start must be torch.float32",
        ),
        refused(
            combine_expert_rows,
            "rows places weights",
            {"weights": torch.zeros(4, 2, requires_grad=True)},
            "^nothing is recorded .* got weights",
        ),
        refused(
            weigh_expert_rows_backward,
            "grad rows places weights",
            {"grad": torch.zeros(8, 5)},
            "^grad must have rows's shape",
        ),
        refused(
            weigh_expert_rows_backward,
            "grad rows places weights",
            {"grad": torch.zeros(1, 6).expand(8, 6)},
            "^grad must have rows that do not overlap",
        ),
        refused(
            weigh_expert_rows_backward,
            "grad rows places weights",
            {"weights": torch.zeros(4, 3)},
            "^weights must be",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    function: Callable[..., Tensor], names: list[str], changes: dict[str, Any], message: str
) -> None:
    given = GIVEN | changes
    with pytest.raises(ValueError, match=message):
        function(*(given[name] for name in names))


@on_each_gpu(DTYPES)
def test_kernels_compile_to_reads_and_writes_of_16_bytes(
    dtype: torch.dtype, capability: int, record_property: Callable[[str, object], None]
) -> None:
    # of Qwen3-30B-A3B
    x, rows = (torch.empty(count, 2048, dtype=dtype, device=META) for count in (64, 512))
    places = torch.empty(64, 8, dtype=torch.int64, device=META)
    weights, start = (torch.empty(64, width, device=META) for width in (8, 2048))
    launches: dict[str, Callable[[], object]] = {
        "_gather_expert_rows_kernel": lambda: module._launch_gather_expert_rows(x, places),
        "_combine_expert_rows_kernel": lambda: module._launch_combine_expert_rows(
            rows, places, weights, start
        ),
        "_weigh_expert_rows_backward_kernel": lambda: module._launch_weigh_expert_rows_backward(
            rows, rows, places, weights
        ),
    }
    for name, launch in launches.items():
        compiled = compile_launch(module, name, launch, capability)
        record_property(name, str(compiled))
        # ptxas spills one sum there, with registers to spare
        compiled.assert_fits(capability, spilled_bytes=8 * (capability == 100))
        moved = set(compiled.find(r"(?:ld|st)\.global(?:\.\w+)*?((?:\.v\d)?\.b\d+)"))
        # rows; places, weights and their gradients
        assert moved <= {".v4.b32", ".b64", ".b32"}
        assert ".v4.b32" in moved


GPU_CASES = [
    *CPU_CASES,
    *expert_rows_cases([(300, 8, 2048), (64, 8, 768)], DTYPES),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernels_equal_the_references(case: ExpertRowsCase) -> None:
    found = expert_rows_results(case, *FUNCTIONS, device=CUDA)
    assert_found(found, expert_rows_results(case, *REFERENCES))


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_kernels_reach_beyond_int32() -> None:
    M, k, D = 140_000, 8, 2048
    assert M * k * D > 2**31
    x = torch.randn(M, D, device=CUDA).bfloat16()
    places = torch.arange(M * k, device=CUDA).flip(0).view(M, k)
    rows = gather_expert_rows(x, places)
    assert_equal(rows[:k], x[-1:].expand(k, D))
    assert_equal(rows[-k:], x[:1].expand(k, D))
    # whole multiples of a sixteenth, so that nothing is rounded
    weights = torch.full((M, k), 1 / 16, device=CUDA)
    assert_equal(combine_expert_rows(rows, places, weights), (x.float() / 2).bfloat16())
    grad = rows.clone()
    found = weigh_expert_rows_backward(grad, rows, places, weights)
    assert_equal(grad[:k], rows[:k] / 16)
    assert_equal(grad[-k:], rows[-k:] / 16)
    assert bool((found > 0).all())
