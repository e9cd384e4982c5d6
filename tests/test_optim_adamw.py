"""optim/adamw.py against torch.optim.AdamW and bitsandbytes; its arenas; where its moments are."""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SUPPORT
from safetensors.torch import load_file, save_file
from support.equality import assert_equal
from support.nf4_parity import cpu_codes, cuda_codes
from support.peer_process import run_peer
from torch import Tensor, nn

from kernels.adamw_8bit import dequantize_moment
from kernels.adamw_arenas import MOMENT_BLOCK, TILE_BLOCKS
from nf4.double_quant import (
    DYNAMIC_MAP,
    DYNAMIC_MAP_MIDPOINTS,
    UNSIGNED_DYNAMIC_MAP,
    UNSIGNED_DYNAMIC_MAP_MIDPOINTS,
)
from optim import staged_memory
from optim.adamw import BETAS, AdamW, moment_bytes_per_element
from optim.arena import SMALLEST_8BIT, GradientArena, Layout
from optim.staged_memory import StagedMemory
from optim.state_memory import OrdinaryMemory, StateMemory
from optim.unified_memory import ManagedMemory, paged_memory

SHAPES = {
    "a.lora_A": (4, 33),
    "a.lora_B": (65, 4),
    "b.lora_A": (1, 1),
    "b.lora_B": (7,),
    # the smallest that is quantized to 8 bits, the largest that is not, and one with a short block
    "c.lora_A": (16, 256),
    "c.lora_B": (4095, 1),
    "d.lora_A": (67, 101),
}
LARGE = ("c.lora_A", "d.lora_A")
BITS = pytest.mark.parametrize("is_8bit", [False, True], ids=["32bit", "8bit"])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
PEER_STEPS, PEER_RATE, PEER_DECAY = 100, 1e-3, 0.01
EPS = torch.finfo(torch.float32).eps

Memory = Callable[[int, torch.device], StateMemory]


def make_parameters(device: str = "cpu") -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(device))
        for name, shape in SHAPES.items()
    }


def optimizer_of(parameters: dict[str, nn.Parameter], is_8bit: bool = False, **given: Any) -> AdamW:
    return AdamW(GradientArena(parameters, is_8bit), **given)


def gradients(step: int, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(s, generator=generator).to(device) for n, s in SHAPES.items()}


def set_gradients(parameters: dict[str, nn.Parameter], step: int, device: str = "cpu") -> None:
    for name, gradient in gradients(step, device).items():
        own = parameters[name].grad
        assert own is not None
        own.copy_(gradient)


def values_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name].detach(), tensor.detach(), f"{what} {name}")


@pytest.mark.parametrize(
    ("weight_decay", "betas"),
    [(0.0, BETAS), (0.1, BETAS), (0.1, (0.8, 0.95)), (0.0, (0.3, 0.0))],
    ids=["no-decay", "decay", "other-betas", "low-betas"],
)
def test_parameters_equal_torchs_bit_for_bit_on_the_cpu(
    weight_decay: float, betas: tuple[float, float]
) -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = optimizer_of(ours, weight_decay=weight_decay, betas=betas)
    reference = torch.optim.AdamW(
        theirs.values(), lr=1.0, betas=betas, weight_decay=weight_decay, foreach=False
    )
    for step in range(100):
        # a rate that changes, as a schedule's does
        rate = 1e-2 / (1 + step)
        set_gradients(ours, step)
        optimizer.step(rate)
        for name, gradient in gradients(step).items():
            theirs[name].grad = gradient
        reference.param_groups[0]["lr"] = rate
        reference.step()
        assert_same(values_of(ours), values_of(theirs), f"step {step}")
    assert optimizer.num_steps == 100


def test_a_step_whose_moments_have_no_room_changes_nothing() -> None:
    class Full(OrdinaryMemory):
        def prefetch(self) -> None:
            raise torch.OutOfMemoryError("the GPU must have 64 MiB free")

    ours = make_parameters()
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    optimizer = optimizer_of(ours, weight_decay=0.0, memory=Full)
    set_gradients(ours, 0)
    with pytest.raises(torch.OutOfMemoryError, match="64 MiB"):
        optimizer.step(0.1)
    assert_same(values_of(ours), before)
    assert optimizer.num_steps == 0
    assert not any(moment.any() for moment in optimizer.state_tensors().values())


def test_norm_and_clipping_equal_torchs() -> None:
    for max_norm in (0.5, 1e6):
        ours, theirs = make_parameters(), make_parameters()
        optimizer = optimizer_of(ours, weight_decay=0.0)
        set_gradients(ours, 3)
        for name, gradient in gradients(3).items():
            theirs[name].grad = gradient / 8
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
        actual = optimizer.step(0.1, max_norm, loss_scale=torch.tensor(8.0))
        # torch adds up in float32: a few roundings
        torch.testing.assert_close(actual, expected, rtol=4 * EPS, atol=0.0)
        # after one step the first moment is the gradient, less rounding
        for name, parameter in theirs.items():
            moment = optimizer.state_tensors()[f"exp_avg.{name}"]
            assert parameter.grad is not None
            torch.testing.assert_close(moment / 0.1, parameter.grad, rtol=12 * EPS, atol=0)
        # what clipping leaves of a gradient is nobody's business but the step's
        assert_same({n: p.grad for n, p in ours.items() if p.grad is not None}, gradients(3))


def test_gradients_of_next_to_nothing_are_clipped_as_torch_does() -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = optimizer_of(ours, weight_decay=0.0)
    for name, gradient in gradients(0).items():
        # a norm of the size of what torch adds to it
        theirs[name].grad = gradient * 2.0**-27
        own = ours[name].grad
        assert own is not None
        own.copy_(gradient * 2.0**-27)
    norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0**-22)
    assert 2.0**-22 < norm < 1e-6
    optimizer.step(0.1, 2.0**-22)
    for name, parameter in theirs.items():
        assert parameter.grad is not None
        moment = optimizer.state_tensors()[f"exp_avg.{name}"]
        torch.testing.assert_close(moment / 0.1, parameter.grad, rtol=12 * EPS, atol=0)


def test_a_max_norm_of_zero_does_not_clip() -> None:
    parameters = make_parameters()
    optimizer = optimizer_of(parameters, weight_decay=0.0)
    set_gradients(parameters, 0)
    assert optimizer.step(0.0, 0.0) > 1
    for name, gradient in gradients(0).items():
        moment = optimizer.state_tensors()[f"exp_avg.{name}"]
        torch.testing.assert_close(moment, 0.1 * gradient, rtol=4 * EPS, atol=0)


@BITS
def test_a_step_that_is_not_finite_changes_nothing(is_8bit: bool) -> None:
    parameters = make_parameters()
    optimizer = optimizer_of(parameters, weight_decay=0.1, is_8bit=is_8bit)
    set_gradients(parameters, 0)
    optimizer.step(1e-2)
    values = values_of(parameters)
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    for bad in ("nan", "inf", "-inf"):
        set_gradients(parameters, 1)
        own = parameters["d.lora_A"].grad
        assert own is not None
        own[66, 100] = float(bad)
        assert not optimizer.step(1e-2, 1.0).isfinite()
        assert_same(values_of(parameters), values, bad)
        assert_same(optimizer.state_tensors(), state, bad)
    assert optimizer.num_steps == 1


def test_backward_accumulates_into_the_arena() -> None:
    parameters = make_parameters()
    optimizer = optimizer_of(parameters, weight_decay=0.0)
    for _ in range(2):
        torch.stack([(p * 3).sum() for p in parameters.values()]).sum().backward()
    num_elements = sum(parameter.numel() for parameter in parameters.values())
    assert float(optimizer.gradients.values.sum()) == 6 * num_elements
    assert int((optimizer.gradients.values == 6).sum()) == num_elements
    optimizer.gradients.zero_()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) == 0, name


def test_moving_into_the_arena_keeps_the_values() -> None:
    parameters = make_parameters()
    optimizer_of(parameters, weight_decay=0.0)
    assert_same(values_of(parameters), values_of(make_parameters()))


@BITS
def test_every_parameter_starts_with_a_block_and_every_region_with_a_tile(is_8bit: bool) -> None:
    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    layout = Layout(shapes, is_8bit)
    taken = torch.zeros(layout.num_elements, dtype=torch.int32)
    for name, start in layout.starts.items():
        assert start % MOMENT_BLOCK == 0
        assert layout.is_8bit(name) == (is_8bit and shapes[name].numel() >= SMALLEST_8BIT)
        layout.view(taken, name).add_(1)
    assert int(taken.max()) == 1
    assert int(taken.sum()) == sum(shape.numel() for shape in shapes.values())
    for count in (layout.num_8bit_blocks, layout.num_blocks):
        assert count % TILE_BLOCKS == 0


@BITS
def test_a_learning_rate_has_its_factor(is_8bit: bool) -> None:
    plain, split = make_parameters(), make_parameters()
    factors = {name: 16.0 for name in SHAPES if name.endswith("lora_B")}
    whole = optimizer_of(plain, weight_decay=0.01, is_8bit=is_8bit)
    loraplus = optimizer_of(split, weight_decay=0.01, is_8bit=is_8bit, rate_factors=factors)
    for step in range(3):
        set_gradients(plain, step)
        set_gradients(split, step)
        # 2^-7, so that sixteen times the rate is rounded alike
        whole.step(2**-7 if step else 2**-3)
        loraplus.step(2**-7)
        if step == 0:
            for name in factors:
                assert_equal(split[name].detach(), plain[name].detach(), name)
    reference = make_parameters()
    torch_adamw = torch.optim.AdamW(
        [{"params": [p], "lr": 2**-7 * factors.get(n, 1)} for n, p in reference.items()],
        weight_decay=0.01,
        foreach=False,
    )
    for step in range(3):
        for name, gradient in gradients(step).items():
            reference[name].grad = gradient
        torch_adamw.step()
    for name in SHAPES:
        if not (is_8bit and name in LARGE):
            assert_equal(split[name].detach(), reference[name].detach(), name)


def test_factors_must_be_for_parameters_that_are_there() -> None:
    with pytest.raises(ValueError, match=r"parameters to train: got a\.lora_C"):
        optimizer_of(make_parameters(), weight_decay=0.0, rate_factors={"a.lora_C": 2.0})


@BITS
def test_a_restored_optimizer_goes_on_bit_for_bit(is_8bit: bool, tmp_path: Path) -> None:
    whole, broken = make_parameters(), make_parameters()
    first = optimizer_of(whole, weight_decay=0.01, is_8bit=is_8bit)
    for step in range(4):
        set_gradients(whole, step)
        first.step(1e-2)
        if step == 1:
            # as a checkpoint keeps it
            save_file(first.state_tensors(), tmp_path / "state.safetensors")
            values, num_steps = values_of(whole), first.num_steps
    state = load_file(tmp_path / "state.safetensors")
    kinds = {tensor.dtype for tensor in state.values()}
    assert kinds == ({torch.float32, torch.uint8} if is_8bit else {torch.float32})
    second = optimizer_of(broken, weight_decay=0.01, is_8bit=is_8bit)
    with torch.no_grad():
        for name, value in values.items():
            broken[name].copy_(value)
    second.load_state(state, num_steps)
    for step in (2, 3):
        set_gradients(broken, step)
        second.step(1e-2)
    assert_same(values_of(broken), values_of(whole))
    assert_same(second.state_tensors(), first.state_tensors())


def test_a_state_of_another_model_is_refused_and_nothing_copied() -> None:
    optimizer = optimizer_of(make_parameters(), weight_decay=0.0)
    state = {name: tensor + 1 for name, tensor in optimizer.state_tensors().items()}
    missing = {name: t for name, t in state.items() if name != "exp_avg.a.lora_A"}
    with pytest.raises(ValueError, match=r"1 differ, the first is exp_avg\.a\.lora_A"):
        optimizer.load_state(missing, 5)
    reshaped = state | {"exp_avg_sq.b.lora_B": torch.ones(8)}
    with pytest.raises(ValueError, match=r"the first is exp_avg_sq\.b\.lora_B"):
        optimizer.load_state(reshaped, 5)
    rounded = state | {"exp_avg_sq.b.lora_B": torch.ones(7).half()}
    with pytest.raises(ValueError, match=r"the first is exp_avg_sq\.b\.lora_B"):
        optimizer.load_state(rounded, 5)
    in_8bit = optimizer_of(make_parameters(), weight_decay=0.0, is_8bit=True).state_tensors()
    with pytest.raises(ValueError, match=r"of this --optim: 12 differ"):
        optimizer.load_state(in_8bit, 5)
    assert optimizer.num_steps == 0
    assert all(float(t.abs().sum()) == 0 for t in optimizer.state_tensors().values())


def test_parameters_must_be_float32_on_one_device() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        optimizer_of({}, weight_decay=0.0)
    half = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2).half())}
    with pytest.raises(ValueError, match=r"got b as torch\.float16"):
        optimizer_of(half, weight_decay=0.0)


def test_moments_in_8_bits_take_a_quarter_of_the_memory() -> None:
    shapes = {f"{i}": torch.Size((16, 4096)) for i in range(10)}
    num_elements = 10 * 16 * 4096
    assert Layout(shapes, is_8bit=False).moment_bytes() == 8 * num_elements
    assert Layout(shapes, is_8bit=True).moment_bytes() == num_elements * (2 + 8 / MOMENT_BLOCK)
    # which a plan reckons with
    for is_8bit in (False, True):
        planned = num_elements * moment_bytes_per_element(is_8bit)
        assert Layout(shapes, is_8bit).moment_bytes() == planned


@cache
def peer(device: str) -> dict[str, Tensor]:
    """What bitsandbytes' AdamW and AdamW8bit do on a device; the first call runs them."""
    if find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    tensors = {f"parameter/{name}": p for name, p in values_of(make_parameters()).items()}
    for step in range(PEER_STEPS):
        tensors |= {f"gradient/{step}/{name}": g for name, g in gradients(step).items()}
    facts = {
        "device": device,
        "learning_rate": PEER_RATE,
        "weight_decay": PEER_DECAY,
        "num_steps": PEER_STEPS,
    }
    with tempfile.TemporaryDirectory() as folder:
        script = SUPPORT / "adamw_peer.py"
        return run_peer(script, Path(folder), tensors, {k: str(v) for k, v in facts.items()})


def our_steps(is_8bit: bool, device: str) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The parameters after each step of the peer's run, and the state after the first."""
    parameters = make_parameters(device)
    optimizer = optimizer_of(parameters, weight_decay=PEER_DECAY, is_8bit=is_8bit)
    values, state = [], {}
    for step in range(PEER_STEPS):
        set_gradients(parameters, step, device)
        optimizer.step(PEER_RATE)
        values.append({name: value.cpu() for name, value in values_of(parameters).items()})
        if step == 0:
            state = {
                name: tensor.cpu().clone() for name, tensor in optimizer.state_tensors().items()
            }
    return values, state


@DEVICES
def test_every_step_equals_bitsandbytes_in_32_bits(device: str) -> None:
    for step, values in enumerate(our_steps(is_8bit=False, device=device)[0]):
        for name, actual in values.items():
            expected = peer(device)[f"32/{step}/{name}"]
            # it multiplies the step by both corrections where we divide by each: an update, which
            # is a few learning rates at most, differs by a few roundings, and each sum rounds once
            per_step = EPS * (expected.abs() + 8 * PEER_RATE)
            if device == "cuda":
                # its kernel decays after the update, so the update too, and each of the two rounds
                # another sum; its divisions and roots are approximate, of two units each
                per_step += EPS * expected.abs()
                per_step += 8 * PEER_RATE * (PEER_RATE * PEER_DECAY + 8 * EPS)
            assert actual.shape == expected.shape
            assert torch.isfinite(expected).all()
            assert ((actual - expected).abs() <= (step + 1) * per_step).all(), f"{step}: {name}"


@DEVICES
@pytest.mark.parametrize("name", LARGE)
def test_codes_after_one_step_are_those_of_bitsandbytes_rule(name: str, device: str) -> None:
    state = our_steps(is_8bit=True, device=device)[1]
    for moment, part, beta, levels, midpoints in (
        ("exp_avg", "state1", 0.9, DYNAMIC_MAP, DYNAMIC_MAP_MIDPOINTS),
        ("exp_avg_sq", "state2", 0.999, UNSIGNED_DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP_MIDPOINTS),
    ):
        theirs = peer(device)[f"32/state/{name}/{part}"].flatten()
        blocks = nn.functional.pad(theirs, (0, -theirs.numel() % MOMENT_BLOCK))
        blocks = blocks.view(-1, MOMENT_BLOCK)
        absmax = blocks.abs().amax(1, keepdim=True)
        # its CUDA kernel divides each element
        scaled = (blocks / absmax).flatten()[: theirs.numel()]
        by_rule = cuda_codes(scaled, levels).int()
        differs = levels[by_rule].signbit() != theirs.signbit()
        by_rule += torch.where(differs, torch.where(theirs > 0, 1, -1), 0)
        ours = state[f"{moment}_codes.{name}"].flatten().int()
        assert int((ours != by_rule).sum()) <= theirs.numel() // 1000
        # its CUDA kernel takes 1 - beta of beta in float32: 1.3e-5 less for the second moment
        share = float(1 - torch.tensor(beta)) / (1 - beta) if device == "cuda" else 1.0
        # a moment is (1 - beta) g g: at most three factors, each rounded by half a unit, twice
        torch.testing.assert_close(
            state[f"{moment}_absmax.{name}"], absmax.flatten() / share, rtol=3 * EPS, atol=0
        )
        stored = peer(device)[f"8/state/{name}/{part}"].flatten().int()
        # its CPU backend stores what a table of 65,536 bins says instead
        by_device = by_rule if device == "cuda" else cpu_codes(scaled, midpoints).int()
        assert int((stored != by_device).sum()) <= theirs.numel() // 1000
        assert_equal(peer(device)[f"8/state/{name}/qmap{part[-1]}"], levels, "map")


@DEVICES
@pytest.mark.parametrize("name", LARGE)
def test_8_bit_moments_stray_no_further_from_32_bit_ones_than_bitsandbytes(
    name: str, device: str
) -> None:
    ours = our_steps(is_8bit=True, device=device)[0]
    exact = our_steps(is_8bit=False, device=device)[0]
    for step in (9, 49, 99):
        expected = exact[step][name]
        moved = (expected - make_parameters()[name].detach()).abs().mean()
        own = (ours[step][name] - expected).abs().mean()
        theirs = (peer(device)[f"8/{step}/{name}"] - expected).abs().mean()
        # both round to the same levels, on the way there differently: noise of the same size
        assert own <= 1.02 * theirs
        assert own < 0.1 * moved


def test_small_tensors_take_the_same_steps_with_8_bit_moments() -> None:
    ours, exact = our_steps(True, "cpu")[0], our_steps(False, "cpu")[0]
    for name in SHAPES:
        is_same = ours[-1][name].equal(exact[-1][name])
        assert is_same == (name not in LARGE), name


def test_8_bit_state_expands_to_the_moments() -> None:
    exact, state = our_steps(False, "cpu")[1], our_steps(True, "cpu")[1]
    for moment, levels in (("exp_avg", DYNAMIC_MAP), ("exp_avg_sq", UNSIGNED_DYNAMIC_MAP)):
        codes = state[f"{moment}_codes.c.lora_A"].flatten()
        absmax = state[f"{moment}_absmax.c.lora_A"]
        values = dequantize_moment(codes, absmax, levels).view(-1, MOMENT_BLOCK)
        expected = exact[f"{moment}.c.lora_A"].view(-1, MOMENT_BLOCK)
        # half of the widest gap, which for the signed map is that below -1, where no level is
        widest = max(levels.diff().max() / 2, 1 + levels[0] if levels[0] < 0 else 0)
        assert ((values - expected).abs() <= (widest + 4 * EPS) * absmax[:, None]).all()


def managed(is_host_resident: bool) -> Memory:
    return partial(ManagedMemory, is_host_resident=is_host_resident)


PLACES: dict[str, Memory] = {
    "device-memory": OrdinaryMemory,
    "unified-on-device": managed(False),
    "unified-on-host": managed(True),
    "pinned": StagedMemory,
}
EVERYWHERE = pytest.mark.parametrize("place", PLACES)


def gpu_run(place: str, is_8bit: bool, steps: range, between: Callable = lambda _: None) -> AdamW:
    optimizer = optimizer_of(
        parameters := make_parameters("cuda"),
        weight_decay=0.1,
        is_8bit=is_8bit,
        memory=PLACES[place],
    )
    for step in steps:
        set_gradients(parameters, step, "cuda")
        optimizer.prefetch()
        optimizer.step(1e-3, 1.0)
        between(optimizer)
    return optimizer


def state_of(optimizer: AdamW) -> dict[str, Tensor]:
    state = {name: tensor.cpu() for name, tensor in optimizer.state_tensors().items()}
    return state | {"parameters": optimizer._arenas.parameters.cpu()}


@pytest.mark.gpu
@EVERYWHERE
def test_gpu_steps_equal_torchs(place: str) -> None:
    ours, theirs = make_parameters("cuda"), make_parameters("cuda")
    optimizer = optimizer_of(ours, weight_decay=0.1, memory=PLACES[place])
    reference = torch.optim.AdamW(theirs.values(), lr=1e-3, weight_decay=0.1, foreach=False)
    for step in range(100):
        set_gradients(ours, step, "cuda")
        optimizer.step(1e-3)
        for name, gradient in gradients(step, "cuda").items():
            theirs[name].grad = gradient
        reference.step()
        for name in SHAPES:
            # torch's scalar factors are rounded at other places on the device
            torch.testing.assert_close(
                ours[name].detach(), theirs[name].detach(), rtol=1e-6, atol=1e-7
            )


@pytest.mark.gpu
@BITS
@EVERYWHERE
def test_gpu_steps_are_the_same_wherever_the_moments_are(
    place: str, is_8bit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # several parts, the last of a region shorter
    monkeypatch.setattr(staged_memory, "PART_BLOCKS", 3 * TILE_BLOCKS)
    expected = state_of(gpu_run("device-memory", is_8bit, range(10)))
    assert_same(state_of(gpu_run(place, is_8bit, range(10))), expected)


@pytest.mark.gpu
@BITS
def test_gpu_evicted_moments_come_back_bit_for_bit(is_8bit: bool) -> None:
    def evict(optimizer: AdamW) -> None:
        # behind the optimizer's back; a few KB, so nothing is crowded out
        memory = optimizer._memory
        assert isinstance(memory, ManagedMemory)
        memory.evict()
        torch.cuda.synchronize()

    evicted = gpu_run("unified-on-device", is_8bit, range(10), evict)
    expected = state_of(gpu_run("device-memory", is_8bit, range(10)))
    assert_same(state_of(evicted), expected)
    memory = evicted._memory
    assert isinstance(memory, ManagedMemory)
    assert memory.bytes_to_device == 10 * memory.buffer.nbytes


@pytest.mark.gpu
@BITS
@EVERYWHERE
def test_gpu_steps_do_not_wait_for_the_device(place: str, is_8bit: bool) -> None:
    optimizer = optimizer_of(
        parameters := make_parameters("cuda"),
        weight_decay=0.1,
        is_8bit=is_8bit,
        memory=PLACES[place],
        rate_factors={"a.lora_B": 16.0},
    )
    scale = torch.tensor(8.0, device="cuda")
    # compiles, and copies the tables
    optimizer.step(1e-3, 1.0, scale)
    set_gradients(parameters, 0, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.prefetch()
            norm = optimizer.step(1e-3, 1.0, scale)
            optimizer.gradients.zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(norm) == 0
    assert optimizer.num_steps == 4


@pytest.mark.gpu
@BITS
@EVERYWHERE
def test_gpu_restored_state_goes_on_bit_for_bit_where_it_was(place: str, is_8bit: bool) -> None:
    whole = gpu_run(place, is_8bit, range(6))
    first = gpu_run(place, is_8bit, range(3))
    saved = {name: tensor.cpu().clone() for name, tensor in first.state_tensors().items()}
    second = optimizer_of(
        parameters := make_parameters("cuda"),
        weight_decay=0.1,
        is_8bit=is_8bit,
        memory=PLACES[place],
    )
    second._arenas.parameters.copy_(first._arenas.parameters)
    second.load_state(saved, first.num_steps)
    for step in range(3, 6):
        set_gradients(parameters, step, "cuda")
        second.step(1e-3, 1.0)
    assert_same(state_of(second), state_of(whole))
    assert type(second._memory) is type(whole._memory)


@pytest.mark.gpu
@EVERYWHERE
def test_gpu_step_that_is_not_finite_changes_nothing(place: str) -> None:
    def spoil(optimizer: AdamW) -> None:
        before = state_of(optimizer)
        optimizer.gradients.values[300] = float("nan")
        assert not optimizer.step(1e-3, 1.0).isfinite()
        assert_same(state_of(optimizer), before)

    optimizer = gpu_run(place, True, range(3), spoil)
    assert optimizer.num_steps == 3


@pytest.mark.gpu
def test_gpu_paged_memory_says_where_it_is() -> None:
    for residency, home in (("device", "resident on the device"), ("host", "between steps")):
        memory = partial(paged_memory, residency=residency)
        optimizer = optimizer_of(make_parameters("cuda"), weight_decay=0.0, memory=memory)
        assert home in optimizer.describe()
        optimizer.step(1e-3)
        assert "MiB prefetched to the device" in optimizer.describe()
        assert ("prefetched to the host" in optimizer.describe()) == (residency == "host")
