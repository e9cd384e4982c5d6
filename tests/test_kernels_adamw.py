"""kernels/adamw.py: equal to the reference, interpreted and on a GPU; compiles for each."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from support.adamw_cases import (
    CASES,
    LEARNING_RATE,
    NUM_STEPS,
    AdamWCase,
    critical_magnitudes,
    exact_arithmetic,
    held_tensors,
    moved_to,
    nearest_magnitudes,
    random_arenas,
    set_gradients,
)
from support.ahead_of_time import GPUS, CompiledLaunch, compile_launch
from support.equality import assert_equal
from support.interpreter import interpreted_results
from support.nf4_parity import cuda_codes
from torch import Tensor

from kernels import adamw as module
from kernels import adamw_plan as plan_module
from kernels.adamw import adamw, adamw_reference
from kernels.adamw_8bit import ZERO_CODES, dequantize_moment, quantize_moment
from kernels.adamw_arenas import MOMENT_BLOCK, TILE_BLOCKS, Arenas
from nf4.double_quant import (
    DYNAMIC_MAP,
    DYNAMIC_MAP_MIDPOINTS,
    UNSIGNED_DYNAMIC_MAP,
    UNSIGNED_DYNAMIC_MAP_MIDPOINTS,
    nearest_codes,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCRIPT = "interpreted_adamw.py"
# what is compiled: with and without moments in 8 bit
COMPILED = {"32bit": AdamWCase(0, 2), "8bit": AdamWCase(2, 1, num_groups=2)}
GPU_CASES = [
    *CASES,
    AdamWCase(300, 1500, num_groups=3),
    AdamWCase(1100, 0, num_groups=2),
]
ELEMENTS_OF_A_THREAD = MOMENT_BLOCK // 32


def reference_steps(case: AdamWCase) -> Iterator[dict[str, Tensor]]:
    """What each step leaves by the reference, and the norm that it returns."""
    arenas = random_arenas(case)
    for step in range(NUM_STEPS):
        set_gradients(arenas, case, step)
        with exact_arithmetic():
            norm = adamw_reference(
                arenas,
                LEARNING_RATE / (1 + step),
                case.max_norm,
                torch.tensor(case.loss_scale),
            )
        yield held_tensors(arenas) | {"norm": norm.view(1)}


def assert_same_step(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if name == "norm" and not tensor.isfinite():
            assert actual[name].cpu().isnan().equal(tensor.isnan()), what
        else:
            assert_equal(actual[name].cpu(), tensor, f"{what}: {name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_equal_the_reference(case: AdamWCase) -> None:
    results = interpreted_results("adamw", SCRIPT)
    for step, expected in enumerate(reference_steps(case)):
        actual = {name: results[f"{case}/{step}/{name}"] for name in expected}
        assert_same_step(actual, expected, f"step {step}")


@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
def test_interpreted_search_finds_the_nearest_level_everywhere(is_signed: bool) -> None:
    actual = interpreted_results("adamw", SCRIPT)[f"magnitudes-{is_signed}"]
    assert_equal(actual, magnitudes_reference(critical_magnitudes(is_signed), is_signed))


def magnitudes_reference(scaled: Tensor, is_signed: bool) -> Tensor:
    if is_signed:
        return nearest_codes(scaled, DYNAMIC_MAP_MIDPOINTS) - ZERO_CODES[0]
    return nearest_codes(scaled, UNSIGNED_DYNAMIC_MAP_MIDPOINTS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_padding_stays_zero_and_no_gradient_moves_nothing_but_decay(case: AdamWCase) -> None:
    arenas = random_arenas(case)
    first = arenas.parameters[:MOMENT_BLOCK].clone()
    for expected in reference_steps(case):
        assert not expected["parameters"][-MOMENT_BLOCK // 2 :].any()
    decay = 1.0
    num_updates = 0
    for step in range(NUM_STEPS):
        if case.non_finite is None or step != 1:
            num_updates += 1
            decay *= 1 - LEARNING_RATE / (1 + step) * 0.1
    assert int(expected["num_updates"]) == num_updates
    # one rounding a step
    torch.testing.assert_close(
        expected["parameters"][:MOMENT_BLOCK], first * decay, rtol=NUM_STEPS * 2**-23, atol=0
    )


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_non_finite_gradient_skips_the_whole_step(value: str) -> None:
    before, skipped, after = (
        {name: tensor.clone() for name, tensor in held.items()}
        for held in reference_steps(AdamWCase(1, 1, non_finite=float(value)))
    )
    assert not skipped.pop("norm").isfinite()
    for name, tensor in skipped.items():
        assert_equal(tensor, before[name], name)
    assert not after["parameters"].equal(before["parameters"])
    assert [int(held["num_updates"]) for held in (before, after)] == [1, 2]


def test_a_group_has_its_rate_and_its_decay() -> None:
    case = AdamWCase(0, 3, num_groups=3)
    arenas = random_arenas(case)
    expected = arenas.parameters.clone().view(-1, MOMENT_BLOCK)
    arenas.gradients.fill_(1.0)
    adamw(arenas, 1e-2, 0.0, torch.tensor(1.0), [arenas])
    for block, group in enumerate(arenas.group_of_block.tolist()):
        factor, weight_decay = arenas.groups[group].tolist()
        # the first step of a constant gradient is the learning rate
        expected[block] -= 1e-2 * factor * (1 + weight_decay * expected[block])
    torch.testing.assert_close(arenas.parameters, expected.view(-1), rtol=0, atol=1e-6)
    assert len(set(arenas.group_of_block.tolist())) == 3


@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
def test_codes_are_those_of_bitsandbytes_search(is_signed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    moment = torch.randn(64 * MOMENT_BLOCK, generator=generator)
    moment *= torch.exp2(torch.randint(-30, 1, moment.shape, generator=generator))
    if not is_signed:
        moment = moment.square()
    codes, absmax = quantize_moment(moment, is_signed)
    blocks = moment.view(-1, MOMENT_BLOCK)
    assert_equal(absmax, blocks.abs().amax(1))
    scaled = (blocks * absmax.reciprocal()[:, None]).flatten()
    levels = DYNAMIC_MAP if is_signed else UNSIGNED_DYNAMIC_MAP
    expected = cuda_codes(scaled, levels).int()
    if is_signed:
        # the kernel's last step: a moment keeps its sign
        differs = levels[expected].signbit() != moment.signbit()
        assert differs.any()
        expected += torch.where(differs, torch.where(moment > 0, 1, -1), 0)
    assert_equal(codes.int(), expected.int())
    # the widest gap of either map, at its upper end
    error = (dequantize_moment(codes, absmax, levels).view_as(blocks) - blocks).abs()
    assert (error / absmax[:, None]).max() <= (levels.diff().max() / 2 if not is_signed else 0.0071)


def test_a_zero_block_has_the_codes_of_zero() -> None:
    for is_signed, levels in ((True, DYNAMIC_MAP), (False, UNSIGNED_DYNAMIC_MAP)):
        codes, absmax = quantize_moment(torch.zeros(MOMENT_BLOCK), is_signed)
        assert not levels[codes.int()].any()
        assert not dequantize_moment(codes, absmax, levels).any()


in_each_width_on_each_gpu = pytest.mark.parametrize(
    ("name", "capability"),
    [(name, capability) for name in COMPILED for capability in GPUS[torch.float32]],
)


def compile_update(case: AdamWCase, capability: int) -> CompiledLaunch:
    arenas = random_arenas(case)
    return compile_launch(module, "_adamw_kernel", lambda: module._launch_adamw(arenas), capability)


@in_each_width_on_each_gpu
def test_kernel_compiles_without_spilling(
    name: str, capability: int, record_property: Callable[[str, object], None]
) -> None:
    compiled = compile_update(COMPILED[name], capability)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    # correctly rounded, and subnormal numbers are not taken for zero
    assert compiled.find(r"div\.rn\.f32")
    assert compiled.find(r"sqrt\.rn\.f32")
    assert not compiled.find(r"\.ftz|\.approx|\.full")


@pytest.mark.parametrize("capability", GPUS[torch.float32], ids="sm{}".format)
@pytest.mark.parametrize("kernel", ["_adamw_sum_squares_kernel", "_adamw_plan_kernel"])
def test_kernels_of_the_plan_compile_without_spilling(
    kernel: str, capability: int, record_property: Callable[[str, object], None]
) -> None:
    arenas = random_arenas(AdamWCase(0, 2, num_groups=2))

    def launch() -> None:
        plan_module._launch_adamw_plan(arenas, 1e-3, 1.0, torch.tensor(1.0))

    compiled = compile_launch(plan_module, kernel, launch, capability)
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    assert not compiled.find(r"\.ftz|\.approx|\.full|\batom\.|\bred\.")


@in_each_width_on_each_gpu
def test_every_element_is_moved_in_vectors_past_shared_memory(name: str, capability: int) -> None:
    case = COMPILED[name]
    compiled = compile_update(case, capability)
    loads = compiled.find(r"ld\.global\.\S+")
    stores = compiled.find(r"st\.global\.\S+")
    # p, g, m, v and p, m, v: two vectors of 4 each
    assert loads.count("ld.global.v4.b32") == 8
    assert stores.count("st.global.v4.b32") == 6
    # where there are codes, the scales of the blocks change layout
    assert compiled.shared_bytes <= (32 if case.num_8bit_tiles else 0)


def test_an_element_costs_at_most_so_many_instructions() -> None:
    # an H100 has time for 260 with float32 moments and for 150 with codes while memory is busy; the
    # second count includes the other region's path
    for name, limit in (("32bit", 70), ("8bit", 180 + 65)):
        compiled = compile_update(COMPILED[name], 90)
        assert compiled.count_instructions() <= limit * ELEMENTS_OF_A_THREAD, name


def gpu_steps(arenas: Arenas, case: AdamWCase) -> Iterator[dict[str, Tensor]]:
    scale = torch.tensor(case.loss_scale, device=CUDA)
    for step in range(NUM_STEPS):
        set_gradients(arenas, case, step)
        norm = adamw(arenas, LEARNING_RATE / (1 + step), case.max_norm, scale, [arenas])
        yield held_tensors(arenas) | {"norm": norm.view(1)}


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernels_equal_the_reference(case: AdamWCase) -> None:
    steps = gpu_steps(moved_to(random_arenas(case), CUDA), case)
    for step, (actual, expected) in enumerate(zip(steps, reference_steps(case), strict=True)):
        assert_same_step(actual, expected, f"step {step}")


@pytest.mark.gpu
@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
def test_gpu_search_finds_the_nearest_level_everywhere(is_signed: bool) -> None:
    first, last = (torch.tensor(value).view(torch.int32).item() for value in (2.0**-24, 1.0))
    # every 16th number, and all where it matters
    bits = torch.arange(int(first), int(last), 16, dtype=torch.int32, device=CUDA)
    many = bits.view(torch.float32)[: len(bits) // 128 * 128]
    for scaled in (many, critical_magnitudes(is_signed)):
        actual = nearest_magnitudes(scaled.to(CUDA), is_signed)
        assert_equal(actual, magnitudes_reference(scaled.to(CUDA), is_signed))


@pytest.mark.gpu
def test_gpu_norm_is_the_same_in_every_run() -> None:
    case = AdamWCase(0, 5000)
    arenas = moved_to(random_arenas(case), CUDA)
    set_gradients(arenas, case, 0)
    scale = torch.tensor(1.0, device=CUDA)
    norms = [adamw(arenas, 0.0, 1.0, scale, [arenas]) for _ in range(5)]
    expected = torch.linalg.vector_norm(arenas.gradients, dtype=torch.float64).float()
    for norm in norms:
        assert_equal(norm, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_kernels_run_where_the_arenas_are() -> None:
    case = AdamWCase(2, 1)
    second = torch.device("cuda:1")
    arenas = moved_to(random_arenas(case), second)
    set_gradients(arenas, case, 0)
    with torch.cuda.device(0):
        adamw(arenas, LEARNING_RATE, case.max_norm, torch.tensor(1.0, device=second), [arenas])
    expected = next(reference_steps(case))
    assert_equal(arenas.parameters.cpu(), expected["parameters"])


def test_regions_are_whole_tiles() -> None:
    arenas = random_arenas(AdamWCase(0, 1))
    odd = replace(arenas, group_of_block=arenas.group_of_block[: TILE_BLOCKS - 1])
    with pytest.raises(AssertionError):
        module._launch_adamw(odd)
