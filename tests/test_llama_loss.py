"""llama/loss.py: the chunked loss and its gradient against torch's cross-entropy in float64."""

import pytest
import torch
import torch.nn.functional as F
from equality import assert_no_worse_than
from torch import Tensor

import llama.loss
from llama.loss import linear_cross_entropy

EPS = torch.finfo(torch.float32).eps
NUM_ROWS, HIDDEN, VOCAB = 37, 24, 101


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=generator)
    head = torch.randn(VOCAB, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (NUM_ROWS,), generator=generator)
    # a row that is certain, one whose logits are all alike
    hidden[1] = 5 * head[targets[1]]
    hidden[2] = 0
    return hidden, head, targets


def set_chunk(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    monkeypatch.setattr(llama.loss, "LOGITS_BYTES", num_rows * VOCAB * 4)


@pytest.mark.parametrize("chunk", [1, 5, NUM_ROWS - 1, NUM_ROWS, NUM_ROWS + 1])
def test_loss_and_gradient_equal_float64_for_every_chunk(
    monkeypatch: pytest.MonkeyPatch, case: tuple[Tensor, Tensor, Tensor], chunk: int
) -> None:
    set_chunk(monkeypatch, chunk)
    hidden, head, targets = case
    hidden = hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, head, targets)
    (3 * loss).backward()

    truth = hidden.detach().double().requires_grad_()
    logits = truth @ head.double().T
    expected = F.cross_entropy(logits, targets, reduction="sum")
    (3 * expected).backward()

    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    # a logit is a sum of HIDDEN products, and logsumexp moves by no more than its largest logit
    logit_error = HIDDEN * EPS * (hidden.detach().abs() @ head.abs().T).double().amax(1)
    logit_error += 4 * EPS * (logits.detach().abs().amax(1) + 1)
    sum_error = NUM_ROWS * EPS * expected.detach()
    assert (loss.double() - expected).abs() <= 2 * logit_error.sum() + sum_error

    assert hidden.grad is not None
    assert truth.grad is not None
    assert hidden.grad.shape == hidden.shape
    assert hidden.grad.isfinite().all()
    # a probability inherits twice the logits' error, and its row of the head sums VOCAB products
    factor = logits.detach().softmax(1)
    factor[torch.arange(NUM_ROWS), targets] += 1
    bound = 3 * (2 * logit_error + (VOCAB + 4) * EPS)[:, None] * (factor @ head.double().abs())
    assert ((hidden.grad.double() - truth.grad).abs() <= bound).all()


def test_no_rows_give_a_loss_of_zero(case: tuple[Tensor, Tensor, Tensor]) -> None:
    _, head, _ = case
    hidden = torch.empty(0, HIDDEN, requires_grad=True)
    loss = linear_cross_entropy(hidden, head, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)


def test_the_logits_are_never_held_at_once(
    monkeypatch: pytest.MonkeyPatch, case: tuple[Tensor, Tensor, Tensor]
) -> None:
    set_chunk(monkeypatch, 5)
    sizes = []
    matmul = Tensor.__matmul__

    def record(a: Tensor, b: Tensor) -> Tensor:
        product = matmul(a, b)
        sizes.append(tuple(product.shape))
        return product

    monkeypatch.setattr(Tensor, "__matmul__", record)
    linear_cross_entropy(*case)
    assert sizes == [(5, VOCAB)] * 7 + [(2, VOCAB)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_no_more_than_twice_as_much_as_torch(
    case: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    hidden, head, targets = (t.to(dtype) if t.is_floating_point() else t for t in case)

    def gradient(dtype: torch.dtype, ours: bool) -> tuple[Tensor, Tensor]:
        x, w = hidden.to(dtype, copy=True).requires_grad_(), head.to(dtype)
        if ours:
            loss = linear_cross_entropy(x, w, targets)
        else:
            logits = x @ w.T
            # as transformers does: logits in the model's dtype, the loss in float32
            logits = logits if dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(logits, targets, reduction="sum")
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad

    for actual, baseline, truth in zip(
        gradient(dtype, True), gradient(dtype, False), gradient(torch.float64, False), strict=True
    ):
        assert_no_worse_than(actual, baseline, truth)


def test_a_head_in_another_dtype_is_used_in_the_hidden_states_dtype(
    case: tuple[Tensor, Tensor, Tensor],
) -> None:
    hidden, head, targets = case
    stored = head.bfloat16()
    assert torch.equal(
        linear_cross_entropy(hidden, stored, targets),
        linear_cross_entropy(hidden, stored.float(), targets),
    )
