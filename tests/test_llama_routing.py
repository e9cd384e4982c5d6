"""llama/routing.py: which experts a token has, in which order rows lie, and the way back."""

import pytest
import torch
from support.equality import assert_equal
from torch import Tensor

from llama.routing import Routing, route, route_backward

NUM_EXPERTS, NUM_CHOSEN, WIDTH = 5, 3, 8


def drawn(num_tokens: int, is_normalized: bool = True) -> tuple[Tensor, Tensor, Routing]:
    generator = torch.Generator().manual_seed(num_tokens)
    y = torch.randn(num_tokens, WIDTH, generator=generator)
    router = torch.randn(NUM_EXPERTS, WIDTH, generator=generator)
    return y, router, route(y, router, NUM_CHOSEN, is_normalized)


def pairs_of_rows(routing: Routing) -> list[int]:
    """The pair of each sorted row: m NUM_CHOSEN + j for the j-th expert of token m."""
    return routing.places.flatten().argsort().tolist()


def experts_of_rows(routing: Routing) -> list[int]:
    """The expert of each sorted row, by the offsets."""
    counts = routing.offsets.diff().tolist()
    return [expert for expert, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 64])
def test_rows_lie_by_expert_and_then_by_token(num_tokens: int) -> None:
    _, _, routing = drawn(num_tokens)
    pairs = pairs_of_rows(routing)
    assert sorted(routing.places.flatten().tolist()) == list(range(NUM_CHOSEN * num_tokens))
    experts = routing.chosen.flatten()[pairs].tolist()
    assert experts == experts_of_rows(routing)
    assert (routing.offsets.dtype, len(routing.offsets)) == (torch.int32, NUM_EXPERTS + 1)
    # stable: of one expert's rows, an earlier token's comes first
    keys = list(zip(experts, pairs, strict=True))
    assert keys == sorted(keys)


def test_weights_are_shares_of_all_experts_or_sum_to_one() -> None:
    y, router, routing = drawn(9, is_normalized=False)
    shares = (y @ router.T).softmax(dim=1)
    largest, _ = shares.topk(NUM_CHOSEN)
    assert_equal(routing.weights, largest)
    _, _, normalized = drawn(9)
    expected = largest / largest.sum(dim=1, keepdim=True)
    # a few roundings of numbers below one
    assert (normalized.weights - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps
    assert (normalized.weights.sum(dim=1) - 1).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_experts_that_are_alike_are_chosen_once_each_and_every_time() -> None:
    y = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
    # all logits of a token are equal
    first, again = (route(y, torch.ones(NUM_EXPERTS, WIDTH), NUM_CHOSEN, True) for _ in range(2))
    assert all(len(set(chosen)) == NUM_CHOSEN for chosen in first.chosen.tolist())
    assert_equal(first.weights, torch.full((6, NUM_CHOSEN), 1 / NUM_CHOSEN))
    assert_equal(first.places, again.places)
    assert int(first.offsets[-1]) == 6 * NUM_CHOSEN


def test_logits_of_16_bits_are_not_rounded() -> None:
    # apart by less than bfloat16 sees beside 256
    router = torch.tensor([[256.0], [256.5], [0.0]])
    routing = route(torch.ones(1, 1, dtype=torch.bfloat16), router, 1, True)
    assert routing.chosen.tolist() == [[1]]


def test_all_tokens_may_have_one_expert_and_an_expert_none() -> None:
    router = torch.zeros(NUM_EXPERTS, WIDTH)
    router[3] = 1
    routing = route(torch.ones(4, WIDTH), router, 1, True)
    assert routing.offsets.tolist() == [0, 0, 0, 0, 4, 4]
    assert routing.places.tolist() == [[0], [1], [2], [3]]


@pytest.mark.parametrize("is_normalized", [False, True])
def test_gradients_through_the_router_are_autograds(is_normalized: bool) -> None:
    y, router, routing = drawn(7, is_normalized)
    grad_weights = torch.randn(7, NUM_CHOSEN, generator=torch.Generator().manual_seed(1))
    leaf = y.double().requires_grad_()
    weights = (leaf @ router.double().T).softmax(dim=1).gather(1, routing.chosen)
    if is_normalized:
        weights = weights / weights.sum(dim=1, keepdim=True)
    (expected,) = torch.autograd.grad(weights, leaf, grad_weights.double())
    actual = route_backward(grad_weights, routing, router)
    assert actual.dtype == torch.float32
    # a few roundings of numbers of order one, and a sum of five of them
    assert (actual - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps
