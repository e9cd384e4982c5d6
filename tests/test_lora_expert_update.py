"""lora/expert_update.py: the products of each expert's own matrices, and their gradients."""

from itertools import pairwise

import pytest
import torch
from support.equality import assert_equal
from torch import Tensor

from lora.config import UpdateSize
from lora.expert_group import ExpertGroup
from lora.expert_update import ExpertUpdate

E, N, K, RANK, SCALING = 4, 6, 5, 3, 1.5
OFFSETS = torch.tensor([0, 3, 3, 8, 12], dtype=torch.int32)
NUM_ROWS = 12
# float32 sums of at most a few dozen terms of order one
ROUNDING = 2.0**-18


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEVICES = pytest.mark.parametrize(
    "device", [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)


def drawn(*shape: int, seed: int = 0, device: torch.device = CPU) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


# of rows of the update: those of one matrix, or of two or three in turn
TURNS = pytest.mark.parametrize("turns", [1, 2, 3])


def make_update(device: torch.device = CPU, turns: int = 1) -> ExpertUpdate:
    generator = torch.Generator().manual_seed(7)
    update = ExpertUpdate((E, N, K), UpdateSize(RANK, SCALING), device, generator, turns)
    with torch.no_grad():
        update.lora_B.copy_(drawn(N, RANK * E, seed=1))
    for parameter in update.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return update


def by_hand(x: Tensor, lora_A: Tensor, lora_B: Tensor, turns: int) -> Tensor:
    """Add s B_e A_e x row by row, the matrices cut out as PEFT says; then those that come in turn
    one behind the other."""
    rows = []
    for e, (start, stop) in enumerate(pairwise(OFFSETS.tolist())):
        A, B = lora_A[e * RANK : (e + 1) * RANK], lora_B[:, e::E]
        rows.append(SCALING * x[start:stop] @ A.T @ B.T)
    y = torch.cat(rows)
    return torch.cat([y[:, turn::turns] for turn in range(turns)], dim=1)


@DEVICES
@TURNS
@torch.no_grad()
def test_each_row_has_the_update_of_its_expert(device: torch.device, turns: int) -> None:
    update = make_update(device, turns)
    x, y = drawn(NUM_ROWS, K, device=device), drawn(NUM_ROWS, N, seed=2, device=device)
    expected = y + by_hand(x, update.lora_A, update.lora_B, turns)
    h = update(x, OFFSETS.to(device), y)
    assert h.shape == (NUM_ROWS, RANK)
    assert (y - expected).abs().max() <= ROUNDING
    # as rows of single tokens have it
    experts = torch.repeat_interleave(torch.arange(E), OFFSETS.diff().long())
    picked = update.pick(x, experts.to(device))
    assert (picked - by_hand(x, update.lora_A, update.lora_B, turns)).abs().max() <= ROUNDING


@DEVICES
@TURNS
def test_gradients_are_autograds_and_added(device: torch.device, turns: int) -> None:
    update, offsets = make_update(device, turns), OFFSETS.to(device)
    x, grad_y = drawn(NUM_ROWS, K, device=device), drawn(NUM_ROWS, N, seed=2, device=device)
    leaves = [t.detach().double().requires_grad_() for t in (x, update.lora_A, update.lora_B)]
    y = by_hand(leaves[0], leaves[1], leaves[2], turns)
    expected = torch.autograd.grad(y, leaves, grad_y.double())
    with torch.no_grad():
        for turn in range(1, 3):
            h = update(x, offsets, torch.zeros_like(grad_y))
            grad_x = torch.ones_like(x)
            grad_h = update.backward(grad_y, offsets, grad_x)
            update.accumulate_grad_B(grad_y, h, offsets)
            update.accumulate_grad_A(grad_h, x, offsets)
            assert (grad_x - 1 - expected[0]).abs().max() <= ROUNDING
            for parameter, truth in zip(update.parameters(), expected[1:], strict=True):
                assert parameter.grad is not None
                assert (parameter.grad - turn * truth).abs().max() <= 2 * ROUNDING


def test_an_update_begins_at_zero_and_a_seed_decides_it() -> None:
    size = UpdateSize(RANK, SCALING)
    first, again = (
        ExpertUpdate((E, N, K), size, CPU, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert not first.lora_B.any()
    assert 0.5 * K**-0.5 < first.lora_A.abs().max() <= K**-0.5
    assert_equal(again.lora_A.detach(), first.lora_A.detach())


@pytest.mark.parametrize("is_stacked", [False, True], ids=["", "stacked"])
def test_an_update_is_split_by_the_tensors_of_checkpoints(is_stacked: bool) -> None:
    # gate and up, of 2 and 4 rows
    names = ("gate_up_proj",) if is_stacked else tuple(f"{e}.{n}" for e in range(E) for n in "gu")
    rows = (N,) if is_stacked else (2, 4) * E
    group = ExpertGroup(names, rows, K, E, num_stacked=E if is_stacked else None)
    group.update = make_update()
    lora_A, lora_B = group.update.lora_A.detach(), group.update.lora_B.detach()
    parts = {name: (A, B) for name, A, B in group.split(lora_A, lora_B)}
    assert tuple(parts) == names
    for e in range(E):
        A, B = lora_A[e * RANK : (e + 1) * RANK], lora_B[:, e::E]
        if is_stacked:
            assert_equal(parts["gate_up_proj"][0][e], A)
            assert_equal(parts["gate_up_proj"][1][e], B)
            continue
        for name, own in ((f"{e}.g", B[:2]), (f"{e}.u", B[2:])):
            assert_equal(parts[name][0], A)
            assert_equal(parts[name][1], own)
