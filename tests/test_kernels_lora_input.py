"""kernels/lora_input.py: whole numbers exactly, others as torch does; compiles where it runs."""

from typing import Any

import pytest
import torch
from support.ahead_of_time import GPUS, TENSOR_CORE_INSTRUCTION, compile_launch
from support.equality import assert_equal, assert_no_worse_than
from support.interpreter import interpreted_results
from support.lora_input_cases import (
    TINY_INPUTS,
    InputCase,
    extended_by_hand,
    extended_input,
    input_cases,
)
from torch import Tensor

from kernels import lora_input as module
from kernels.device import H200, meta_stands_for
from kernels.lora_input import extend_input, extend_input_reference

CUDA, META = torch.device("cuda"), torch.device("meta")
HALVES = (torch.bfloat16, torch.float16)
CPU_CASES = input_cases([(7, 48, 5, 64)], (torch.float32, *HALVES))


@pytest.mark.parametrize("case", CPU_CASES + TINY_INPUTS, ids=str)
def test_on_a_cpu_whole_numbers_are_exact(case: InputCase) -> None:
    assert_equal(extended_input(case, extend_input), extended_by_hand(case))


@pytest.mark.parametrize("case", TINY_INPUTS, ids=str)
def test_interpreted_kernel_adds_whole_numbers_exactly(case: InputCase) -> None:
    assert_equal(interpreted_results("lora_input")[str(case)], extended_by_hand(case))


GIVEN = {"x": torch.zeros(4, 7), "A": torch.zeros(3, 7), "out": torch.zeros(4, 11)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": torch.zeros(3, 8)}, r"^for an input of .* \(4, 7\), .*: got \(3, 8\) and \(4, 11\)"),
        ({"A": torch.zeros(5, 7)}, r"R in 1 .. T: got \(5, 7\) and \(4, 11\)$"),
        ({"A": torch.zeros(0, 7)}, r"R in 1 .. T: got \(0, 7\)"),
        ({"out": torch.zeros(5, 11)}, r"and \(5, 11\)$"),
        ({"out": torch.zeros(4, 11).half()}, "must share a dtype: got torch.float32, .*float16$"),
        ({"x": torch.zeros(7, 4).T}, "^the input must have contiguous rows"),
        ({"out": torch.zeros(1, 11).expand(4, 11)}, "^out must have rows that do not overlap"),
        ({"A": torch.zeros(3, 7, device=META)}, "must be on one device"),
    ],
    ids=["columns", "ranks", "no rank", "rows", "dtypes", "scattered", "overlapping", "elsewhere"],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extend_input(**(GIVEN | changes))


# the ranks of q, k and v, and of one projection; what else there may be for one GPU
COMPILED = [
    (num_ranks, dtype, capability)
    for dtype in HALVES
    for capability in GPUS[dtype]
    for num_ranks in (16, 48, 64)
    if capability == 90 or (capability >= 80 and num_ranks == 16)
]


@pytest.mark.parametrize(("num_ranks", "dtype", "capability"), COMPILED, ids=str)
def test_kernel_compiles_without_spilling(
    num_ranks: int, dtype: torch.dtype, capability: int
) -> None:
    x = torch.empty(8192, 4096, dtype=dtype, device=META)
    A = torch.empty(num_ranks, 4160, dtype=dtype, device=META)[:, :4096]
    out = torch.empty(8192, 4160, dtype=dtype, device=META)
    compiled = compile_launch(
        module,
        "_extend_input_kernel",
        lambda: module._launch_extend_input(x, A, out),
        capability,
    )
    compiled.assert_fits(capability)
    # 16 rows are too few for the products of a warpgroup
    is_short = num_ranks == 16 and capability in (90, 100)
    compiled.assert_multiplies_as(TENSOR_CORE_INSTRUCTION[80 if is_short else capability])


@pytest.mark.parametrize(
    ("capability", "num_ranks", "dtype", "chosen"),
    [
        ((7, 5), 16, torch.float16, "extend_input_reference"),
        ((8, 0), 64, torch.bfloat16, "_launch_extend_input"),
        ((9, 0), 65, torch.bfloat16, "extend_input_reference"),
        ((9, 0), 16, torch.float32, "extend_input_reference"),
    ],
    ids=str,
)
def test_one_pass_is_taken_where_there_are_tensor_cores(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    num_ranks: int,
    dtype: torch.dtype,
    chosen: str,
) -> None:
    taken = []
    for name in ("_launch_extend_input", "extend_input_reference"):
        monkeypatch.setattr(module, name, lambda *_, name=name: taken.append(name))
    x, A = (torch.empty(rows, 8, dtype=dtype, device=META) for rows in (4, num_ranks))
    with meta_stands_for(H200._replace(capability=capability)):
        extend_input(x, A, torch.empty(4, 136, dtype=dtype, device=META))
    assert taken == [chosen]


GPU_CASES = input_cases(
    [(8192, 4096, 16, 64), (2049, 4096, 48, 64), (100, 1000, 64, 64), (0, 64, 16, 64)], HALVES
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES + CPU_CASES + TINY_INPUTS, ids=str)
def test_gpu_kernel_adds_whole_numbers_exactly(case: InputCase) -> None:
    found = extended_input(case, extend_input, CUDA)
    assert_equal(found.cpu(), extended_by_hand(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_ranks", [16, 48])
def test_gpu_kernel_errs_no_more_than_torch_and_repeats_its_bits(
    num_ranks: int, dtype: torch.dtype
) -> None:
    x = torch.randn(3000, 4096, device=CUDA).to(dtype)
    A = (torch.randn(num_ranks, 4096, device=CUDA) / 64).to(dtype)

    def found(compute: Any) -> Tensor:
        out = torch.empty(3000, 4160, dtype=dtype, device=CUDA)
        compute(x, A, out)
        return out

    actual = found(extend_input)
    assert_equal(found(extend_input), actual)
    assert_equal(actual[:, :4096], x)
    h = slice(4096, 4096 + num_ranks)
    truth = x.double() @ A.double().T
    assert_no_worse_than(actual[:, h], found(extend_input_reference)[:, h], truth)
