"""kernels/expert_gradient.py: adds whole numbers exactly, interpreted and on a GPU; compiles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ahead_of_time import (
    SHARED_BYTES_LIMIT,
    TENSOR_CORE_INSTRUCTION,
    compile_launch,
    on_each_gpu,
)
from support.equality import assert_equal
from support.expert_gradient_cases import (
    TINY_EXPERT_GRADIENTS,
    ExpertGradientCase,
    expert_gradient_by_hand,
    expert_gradient_inputs,
    expert_gradient_of,
)
from support.interpreter import interpreted_results

from kernels import expert_gradient as module
from kernels.device import Properties
from kernels.expert_gradient import expert_gradient

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA, META = torch.device("cuda"), torch.device("meta")
BFLOAT16 = [ExpertGradientCase((4, 0, 7), 5, 6, torch.bfloat16)]
GPU_CASES = [ExpertGradientCase((300, 0, 1, 511), 16, 400, dtype) for dtype in DTYPES]


@pytest.mark.parametrize("case", TINY_EXPERT_GRADIENTS, ids=str)
def test_interpreted_kernels_add_whole_numbers_exactly(case: ExpertGradientCase) -> None:
    found = interpreted_results("expert_gradient")[str(case)]
    assert_equal(found, expert_gradient_by_hand(case))


@pytest.mark.parametrize("case", TINY_EXPERT_GRADIENTS + BFLOAT16, ids=str)
def test_on_a_cpu_every_expert_has_the_sums_of_its_rows(case: ExpertGradientCase) -> None:
    assert_equal(expert_gradient_of(case, expert_gradient), expert_gradient_by_hand(case))


GIVEN: dict[str, Any] = expert_gradient_inputs(TINY_EXPERT_GRADIENTS[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": GIVEN["a"].int()}, "int32"),
        ({"a": GIVEN["a"][1:]}, "matrices of as many rows"),
        ({"b": GIVEN["b"].bfloat16()}, "bfloat16"),
        ({"b": GIVEN["b"].T.contiguous().T}, "contiguous"),
        ({"offsets": GIVEN["offsets"].long()}, "offsets"),
        ({"offsets": GIVEN["offsets"][1:]}, "grad"),
        ({"grad": GIVEN["grad"].half()}, "grad"),
        ({"grad": GIVEN["grad"].mT}, "grad"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_gradient(**(GIVEN | changes))


@on_each_gpu(DTYPES)
def test_kernels_compile_without_spilling(
    dtype: torch.dtype, capability: int, record_property: Callable[[str, object], None]
) -> None:
    gpu = Properties(divmod(capability, 10), 100, SHARED_BYTES_LIMIT[capability])
    # of Qwen3-30B-A3B's gate and up, rank 16: lora_A, and lora_B, whose gradient lies otherwise
    a, b = (torch.empty(512, width, dtype=dtype, device=META) for width in (16, 2048))
    offsets = torch.empty(129, dtype=torch.int32, device=META)
    of_A = torch.empty(128, 16, 2048, device=META)
    of_B = torch.empty(2048, 16, 128, device=META).permute(2, 1, 0)
    for name, grad in {"A": of_A, "B": of_B}.items():
        compiled = compile_launch(
            module,
            "_expert_gradient_kernel",
            lambda grad=grad: module._launch_expert_gradient(a, b, offsets, grad, gpu),
            capability,
        )
        record_property(name, str(compiled))
        compiled.assert_fits(capability)
        is_float32 = dtype == torch.float32
        compiled.assert_multiplies_as(None if is_float32 else TENSOR_CORE_INSTRUCTION[capability])


@pytest.mark.gpu
@pytest.mark.parametrize("case", TINY_EXPERT_GRADIENTS + BFLOAT16 + GPU_CASES, ids=str)
def test_gpu_kernels_add_whole_numbers_exactly(case: ExpertGradientCase) -> None:
    assert_equal(expert_gradient_of(case, expert_gradient, CUDA), expert_gradient_by_hand(case))
