"""optim/adamw.py against torch.optim.AdamW, and its arenas."""

import pytest
import torch
from equality import assert_equal
from torch import Tensor, nn

from optim.adamw import AdamW

SHAPES = {"a.lora_A": (4, 33), "a.lora_B": (65, 4), "b.lora_A": (1, 1), "b.lora_B": (7,)}


def make_parameters(device: str = "cpu") -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(device))
        for name, shape in SHAPES.items()
    }


def gradients(step: int, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(s, generator=generator).to(device) for n, s in SHAPES.items()}


def set_gradients(parameters: dict[str, nn.Parameter], step: int, device: str = "cpu") -> None:
    for name, gradient in gradients(step, device).items():
        own = parameters[name].grad
        assert own is not None
        own.copy_(gradient)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["no-decay", "decay"])
def test_parameters_equal_torchs_bit_for_bit_on_the_cpu(weight_decay: float) -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = AdamW(ours, weight_decay=weight_decay, is_paged=True)
    reference = torch.optim.AdamW(theirs.values(), lr=1.0, weight_decay=weight_decay, foreach=False)
    for step in range(100):
        # a rate that changes, as a schedule's does
        rate = 1e-2 / (1 + step)
        set_gradients(ours, step)
        optimizer.step(rate)
        for name, gradient in gradients(step).items():
            theirs[name].grad = gradient
        reference.param_groups[0]["lr"] = rate
        reference.step()
        for name in SHAPES:
            assert_equal(ours[name].detach(), theirs[name].detach(), f"step {step}: {name}")


def test_norm_and_clipping_equal_torchs() -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = AdamW(ours, weight_decay=0.0, is_paged=False)
    for max_norm in (0.5, 1e6):
        set_gradients(ours, 3)
        for name, gradient in gradients(3).items():
            theirs[name].grad = gradient / 8
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
        actual = optimizer.scale_gradients(1 / 8, max_norm)
        # one sum in another order: a few roundings of float32
        torch.testing.assert_close(actual, expected, rtol=4 * 2**-23, atol=0.0)
        for name in SHAPES:
            torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=8 * 2**-23, atol=0)


def test_a_max_norm_of_zero_does_not_clip() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, weight_decay=0.0, is_paged=False)
    set_gradients(parameters, 0)
    assert optimizer.scale_gradients(1.0, 0.0) > 1
    assert_equal(optimizer.gradients, torch.cat([g.flatten() for g in gradients(0).values()]))


def test_backward_accumulates_into_the_arena() -> None:
    parameters = make_parameters()
    optimizer = AdamW(parameters, weight_decay=0.0, is_paged=False)
    for _ in range(2):
        torch.stack([(p * 3).sum() for p in parameters.values()]).sum().backward()
    assert_equal(optimizer.gradients, torch.full_like(optimizer.gradients, 6.0))
    optimizer.zero_grad()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) == 0, name


def test_moving_into_the_arena_keeps_the_values() -> None:
    parameters = make_parameters()
    AdamW(parameters, weight_decay=0.0, is_paged=False)
    for name, expected in make_parameters().items():
        assert_equal(parameters[name].detach(), expected.detach(), name)


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    whole, broken = make_parameters(), make_parameters()
    first = AdamW(whole, weight_decay=0.01, is_paged=True)
    for step in range(4):
        set_gradients(whole, step)
        first.step(1e-2)
        if step == 1:
            state = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
            values = {name: p.detach().clone() for name, p in whole.items()}
            num_steps = first.num_steps
    second = AdamW(broken, weight_decay=0.01, is_paged=True)
    with torch.no_grad():
        for name, value in values.items():
            broken[name].copy_(value)
    second.load_state(state, num_steps)
    for step in (2, 3):
        set_gradients(broken, step)
        second.step(1e-2)
    for name in SHAPES:
        assert_equal(broken[name].detach(), whole[name].detach(), name)


def test_a_state_of_another_model_is_refused_and_nothing_copied() -> None:
    optimizer = AdamW(make_parameters(), weight_decay=0.0, is_paged=False)
    state = {name: tensor + 1 for name, tensor in optimizer.state_tensors().items()}
    missing = {name: t for name, t in state.items() if name != "exp_avg.a.lora_A"}
    with pytest.raises(ValueError, match=r"1 differ, the first is exp_avg\.a\.lora_A"):
        optimizer.load_state(missing, 5)
    reshaped = state | {"exp_avg_sq.b.lora_B": torch.ones(8)}
    with pytest.raises(ValueError, match=r"the first is exp_avg_sq\.b\.lora_B"):
        optimizer.load_state(reshaped, 5)
    assert optimizer.num_steps == 0
    assert all(float(t.abs().sum()) == 0 for t in optimizer.state_tensors().values())


def test_parameters_must_be_float32_on_one_device() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        AdamW({}, weight_decay=0.0, is_paged=False)
    half = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2).half())}
    with pytest.raises(ValueError, match=r"got b as torch\.float16"):
        AdamW(half, weight_decay=0.0, is_paged=False)


@pytest.mark.gpu
@pytest.mark.parametrize("is_paged", [True, False], ids=["unified-memory", "device-memory"])
def test_gpu_steps_equal_torchs(is_paged: bool) -> None:
    ours, theirs = make_parameters("cuda"), make_parameters("cuda")
    optimizer = AdamW(ours, weight_decay=0.1, is_paged=is_paged)
    assert ("CUDA unified memory" in optimizer.describe()) == is_paged
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
