"""llama/attention.py: which product attends where, and what it takes of a GPU's memory."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.device import H200, meta_stands_for
from llama.attention import Scores, attention, attention_backward, torch_attends
from step.allocations import Allocations

B, H, H_KV, T, HEAD_DIM = 2, 8, 2, 192, 64
PLAIN = Scores(0.125, None, None)


def heads(count: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.zeros(B, T, count, HEAD_DIM, dtype=dtype, device=device).transpose(1, 2)


def taken(dtype: torch.dtype, capability: tuple[int, int]) -> tuple[bool, list[int]]:
    """Whether our own kernel attends, and the bytes of what the backward pass takes."""
    query, key, value = (heads(count, dtype, "meta") for count in (H, H_KV, H_KV))
    with meta_stands_for(H200._replace(capability=capability)), torch.no_grad():
        mixed = attention(query, key, value, PLAIN, has_backward=True)
        with Allocations() as recorded:
            attention_backward(mixed, torch.empty_like(mixed.output))
    # the first is the gradient that is given
    return mixed.is_masked, [event.num_bytes for event in recorded.events if event.num_bytes][1:]


@pytest.mark.parametrize(
    ("dtype", "capability", "is_masked"),
    [
        (torch.bfloat16, (8, 0), False),
        (torch.float16, (9, 0), False),
        (torch.float16, (7, 5), True),
        (torch.float32, (9, 0), True),
    ],
    ids=str,
)
def test_where_torch_would_hold_scores_our_own_kernel_attends(
    dtype: torch.dtype, capability: tuple[int, int], is_masked: bool
) -> None:
    is_ours, sizes = taken(dtype, capability)
    assert is_ours == is_masked
    e, rows = dtype.itemsize, B * T
    grads = [rows * H * HEAD_DIM * e, *[rows * H_KV * HEAD_DIM * e] * 2]
    if is_masked:
        assert sizes == [*grads, 4 * rows * H]
    else:
        # FlashAttention's rows in tiles of 128; keys' and values' gradients for every query head
        tiled = B * (T if capability == (9, 0) else 256) * H
        assert sizes == [*grads, 4 * tiled, 4 * tiled * HEAD_DIM, *[rows * H * HEAD_DIM * e] * 2]


def test_heads_with_sinks_are_our_own_kernels() -> None:
    # torch's kernels know none
    query, key, value = (heads(count, torch.bfloat16, "meta") for count in (H, H_KV, H_KV))
    sinks = torch.zeros(H, dtype=torch.bfloat16, device="meta")
    with meta_stands_for(H200), torch.no_grad():
        for given, is_masked in ((None, False), (sinks, True)):
            mixed = attention(query, key, value, PLAIN, has_backward=True, sinks=given)
            assert mixed.is_masked == is_masked


@pytest.fixture
def equal_bits() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("equal_bits")
def test_equal_bits_take_a_sum_for_every_part() -> None:
    _, sizes = taken(torch.bfloat16, (8, 0))
    # 132 multiprocessors, 16 heads
    assert sizes[4] == 9 * 4 * B * 256 * H * HEAD_DIM


def test_heads_wider_than_flash_attentions_are_our_own_kernels() -> None:
    assert torch_attends(H200, torch.bfloat16, 256)
    assert not torch_attends(H200, torch.bfloat16, 258)


@pytest.mark.usefixtures("equal_bits")
@pytest.mark.parametrize(
    ("capability", "head_dim", "is_torchs"),
    [((8, 0), 128, True), ((9, 0), 128, False), ((9, 0), 256, True), ((10, 0), 128, True)],
    ids=str,
)
def test_equal_bits_are_our_own_kernels_where_those_are_faster(
    capability: tuple[int, int], head_dim: int, is_torchs: bool
) -> None:
    gpu = H200._replace(capability=capability)
    assert torch_attends(gpu, torch.bfloat16, head_dim) == is_torchs


def test_the_backward_pass_runs_in_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd,
        "grad",
        lambda *given: seen.append(torch._C._is_multithreading_enabled()) or grad(*given),
    )
    query, key, value = (heads(count, torch.float32, "cpu") for count in (H, H_KV, H_KV))
    with torch.no_grad():
        mixed = attention(query, key, value, PLAIN, has_backward=True)
        attention_backward(mixed, torch.ones_like(mixed.output))
    assert seen == [False]
    assert torch._C._is_multithreading_enabled()
