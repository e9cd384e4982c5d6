"""optim/arena.py: gradients are parts of one buffer."""

import pytest
import torch
from torch import nn

from optim.arena import GradientArena


def parameters() -> dict[str, nn.Parameter]:
    shapes = {"a.lora_A": (4, 33), "a.lora_B": (65, 4), "b.lora_A": (67, 101)}
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("is_8bit", [False, True], ids=["32bit", "8bit"])
def test_what_is_added_to_a_gradient_is_in_the_arena(is_8bit: bool) -> None:
    gradients = GradientArena(parameters(), is_8bit)
    assert not gradients.values.any()
    expected = torch.zeros_like(gradients.values)
    for index, (name, parameter) in enumerate(gradients.parameters.items()):
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        parameter.grad += index + 1
        gradients.layout.view(expected, name).fill_(index + 1)
    assert torch.equal(gradients.values, expected)
    gradients.zero_()
    assert all(not p.grad.any() for p in gradients.parameters.values() if p.grad is not None)
    assert not gradients.values.any()


def test_a_model_without_an_adapter_has_an_empty_arena() -> None:
    assert GradientArena({}).values.shape == (0,)


def test_parameters_must_be_float32_on_one_device() -> None:
    half = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2).half())}
    with pytest.raises(ValueError, match=r"got b as torch\.float16"):
        GradientArena(half)
