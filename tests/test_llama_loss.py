"""llama/loss.py: the chunked loss and its gradient against torch's cross-entropy in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.equality import assert_equal, assert_no_worse_than
from support.layer_cases import part_of_wider_rows
from torch import Tensor

import llama.loss
from llama.loss import chunk_rows, linear_cross_entropy, linear_cross_entropy_with_gradient

EPS = torch.finfo(torch.float32).eps
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NUM_ROWS, HIDDEN, VOCAB = 37, 24, 101
# of a row of the logits' buffer
ROW_WIDTH = 112
HALVES = [torch.bfloat16, torch.float16]
FACTOR = 3.0


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


def set_chunk(monkeypatch: pytest.MonkeyPatch, num_rows: int, itemsize: int = 4) -> None:
    monkeypatch.setattr(llama.loss, "LOGITS_BYTES", num_rows * ROW_WIDTH * itemsize)


def loss_and_gradient(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    factor: float = FACTOR,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Call the product on a copy of hidden that it may consume, as part of wider rows."""
    consumed = part_of_wider_rows(hidden, hidden.dtype, hidden.device)
    loss, gradient = linear_cross_entropy_with_gradient(
        consumed, head, targets, torch.tensor(factor, device=hidden.device), scale=scale, cap=cap
    )
    assert gradient.data_ptr() == consumed.data_ptr()
    assert gradient.stride() == consumed.stride()
    return loss, gradient


def loss_and_gradient_of_torch(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    factor: float = FACTOR,
    scale: float | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As transformers does: logits in the model's dtype, the loss in float32 at least."""
    hidden = hidden.clone().requires_grad_()
    logits = hidden @ head.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if scale is not None:
        logits = scale * logits
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(factor * loss, hidden)
    return loss.detach(), gradient


def in_dtype(
    case: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head, targets = case
    return hidden.to(dtype), head.to(dtype), targets


@pytest.mark.parametrize("cap", [None, 5.0], ids="cap-{}".format)
@pytest.mark.parametrize("scale", [None, 0.3], ids="scale-{}".format)
@pytest.mark.parametrize("chunk", [1, 5, NUM_ROWS - 1, NUM_ROWS, NUM_ROWS + 1])
def test_loss_and_gradient_equal_float64_for_every_chunk(
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[Tensor, Tensor, Tensor],
    chunk: int,
    scale: float | None,
    cap: float | None,
) -> None:
    set_chunk(monkeypatch, chunk)
    hidden, head, targets = case
    loss, gradient = loss_and_gradient(hidden, head, targets, scale=scale, cap=cap)
    alone = linear_cross_entropy(hidden, head, targets, scale=scale, cap=cap)
    truth = in_dtype(case, torch.float64)
    expected, expected_gradient = loss_and_gradient_of_torch(*truth, scale=scale, cap=cap)

    # a logit is a sum of HIDDEN products, and logsumexp moves by no more than its largest logit
    factor = scale or 1.0
    magnitudes = factor * (hidden.double().abs() @ head.double().abs().T)
    logits = factor * (hidden.double() @ head.double().T)
    logit_error = HIDDEN * EPS * magnitudes.amax(1) + 4 * EPS * (logits.abs().amax(1) + 1)
    for actual in (loss, alone):
        assert actual.shape == ()
        assert actual.dtype == torch.float32
        assert actual.isfinite()
        sum_error = NUM_ROWS * EPS * expected
        assert (actual.double() - expected).abs() <= 2 * logit_error.sum() + sum_error

    assert gradient.shape == hidden.shape
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    # a probability inherits twice the logits' error, and its row of the head sums VOCAB products;
    # a cap bends logits towards zero, and its slope has less than their error again
    share = 2
    if cap is not None:
        logits, share = cap * torch.tanh(logits / cap), 3
    slope = logits.softmax(1)
    slope[torch.arange(NUM_ROWS), targets] += 1
    relative = share * logit_error + (VOCAB + 5) * EPS
    bound = FACTOR * factor * relative[:, None] * (slope @ head.double().abs())
    assert ((gradient.double() - expected_gradient).abs() <= bound).all()


def test_the_loss_alone_keeps_the_hidden_states(case: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, targets = case
    before = hidden.clone()
    linear_cross_entropy(hidden, head, targets)
    assert_equal(hidden, before)


def test_what_lies_behind_the_hidden_states_is_left(case: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, targets = case
    wide = torch.zeros(NUM_ROWS, HIDDEN + 3)
    wide[:, :HIDDEN] = hidden
    linear_cross_entropy_with_gradient(wide[:, :HIDDEN], head, targets, torch.tensor(1.0))
    assert (wide[:, HIDDEN:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_no_rows_give_a_loss_of_zero(
    case: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    head = case[1].to(dtype)
    hidden, targets = torch.empty(0, HIDDEN, dtype=dtype), torch.empty(0, dtype=torch.int64)
    assert_equal(linear_cross_entropy(hidden, head, targets), torch.tensor(0.0))
    loss, gradient = loss_and_gradient(hidden, head, targets)
    assert_equal(loss, torch.tensor(0.0))
    assert_equal(gradient, hidden)


def test_a_factor_is_the_gradients_not_the_losss(case: tuple[Tensor, Tensor, Tensor]) -> None:
    loss, gradient = loss_and_gradient(*case, factor=1.0)
    for factor in (0.0, 0.25, 1024.0):
        again, scaled = loss_and_gradient(*case, factor=factor)
        assert_equal(again, loss)
        # powers of two round nothing
        assert_equal(scaled, factor * gradient)


def test_a_small_factor_does_not_underflow_before_the_gradient_is_large(
    case: tuple[Tensor, Tensor, Tensor],
) -> None:
    hidden, head, targets = in_dtype(case, torch.float16)
    # below float16's smallest number, as 1 / tokens may be; the head makes up for it
    factor, large = 2.0**-26, 2.0**13 * head
    _, expected = loss_and_gradient(hidden * 2.0**-13, large, targets, factor=1.0)
    _, scaled = loss_and_gradient(hidden * 2.0**-13, large, targets, factor=factor)
    assert scaled.count_nonzero() > 0
    tiny = 2.0**-24
    assert (scaled.double() - factor * expected.double()).abs().max() <= tiny


@pytest.mark.parametrize("with_gradient", [False, True], ids=["loss", "gradient"])
def test_the_logits_of_one_chunk_are_held_in_one_buffer(
    monkeypatch: pytest.MonkeyPatch, case: tuple[Tensor, Tensor, Tensor], with_gradient: bool
) -> None:
    set_chunk(monkeypatch, 5)
    shapes, places = [], set()
    addmm = torch.addmm

    def record(*matrices: Tensor, out: Tensor, **factors: float) -> Tensor:
        shapes.append(tuple(out.shape))
        places.add((out.data_ptr(), out.stride()))
        return addmm(*matrices, out=out, **factors)

    monkeypatch.setattr(torch, "addmm", record)
    if with_gradient:
        loss_and_gradient(*case)
    else:
        linear_cross_entropy(*case)
    assert shapes == [(5, VOCAB)] * 7 + [(2, VOCAB)]
    assert len(places) == 1
    ((_, stride),) = places
    assert stride == (ROW_WIDTH, 1)


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "num_rows", "expected"),
    [
        # 128 MiB of 2 bytes hold 523 rows, of which whole tiles are 512
        (128_256, torch.bfloat16, 8192, 512),
        (128_256, torch.float32, 8192, 256),
        (128_256, torch.float16, 500, 500),
        (32_000, torch.bfloat16, 8192, 2048),
        # rows of 128,272 values
        (128_257, torch.bfloat16, 8192, 512),
        # less than a tile
        (2**21, torch.bfloat16, 8192, 32),
        # less than a row
        (2**28, torch.float32, 8192, 1),
        (101, torch.float32, 0, 1),
    ],
)
def test_a_chunk_is_what_the_budget_holds(
    vocab_size: int, dtype: torch.dtype, num_rows: int, expected: int
) -> None:
    assert chunk_rows(vocab_size, dtype, num_rows) == expected


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_errs_no_more_than_twice_as_much_as_torch(
    monkeypatch: pytest.MonkeyPatch, case: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    set_chunk(monkeypatch, 5, itemsize=2)
    inputs = in_dtype(case, dtype)
    baseline = loss_and_gradient_of_torch(*inputs)
    truth = loss_and_gradient_of_torch(*in_dtype(inputs, torch.float64))
    for actual, floor, expected in zip(loss_and_gradient(*inputs), baseline, truth, strict=True):
        assert_no_worse_than(actual, floor, expected)
    assert_no_worse_than(linear_cross_entropy(*inputs), baseline[0], truth[0])


def test_nothing_is_recorded_for_autograd(case: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, targets = case
    hidden.requires_grad_()
    assert not linear_cross_entropy(hidden * 1, head, targets).requires_grad
    loss, gradient = linear_cross_entropy_with_gradient(
        hidden * 1, head, targets, torch.tensor(1.0)
    )
    assert not loss.requires_grad
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": torch.ones(5, 7)}, "^hidden and head must be matrices with rows of one length"),
        ({"hidden": torch.ones(3, 8, 1)}, "^hidden and head must be matrices"),
        (
            {"head": torch.ones(5, 8).half()},
            "^hidden and head must share a dtype: got",
        ),
        ({"targets": torch.zeros(4).long()}, "^targets must be one for each row of hidden"),
        ({"head": torch.ones(5, 8, device="meta")}, "must be on one device: got cpu, meta and cpu"),
        (
            {"hidden": torch.ones(8, 3).T},
            "^hidden must have contiguous rows: got strides",
        ),
        ({"factor": torch.ones(1)}, "^the factor must be one float32 on hidden's device"),
        ({"factor": torch.tensor(1.0).half()}, "^the factor must be one float32"),
        ({"factor": torch.ones((), device="meta")}, "^the factor must be one float32"),
    ],
    ids=[
        "width",
        "dimensions",
        "dtype",
        "targets",
        "device",
        "scattered",
        "factor's shape",
        "factor's dtype",
        "factor's device",
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"hidden": torch.ones(3, 8), "head": torch.ones(5, 8)}
    given |= {"targets": torch.zeros(3).long(), "factor": torch.tensor(1.0)}
    given |= changes
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_with_gradient(**given)
    if "factor" not in changes:
        del given["factor"]
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(**given)


def test_a_gradient_may_be_beyond_float16_until_the_factor_brings_it_back() -> None:
    head = torch.full((VOCAB, HIDDEN), 60000.0).half()
    targets = torch.tensor([VOCAB - 1])
    head[targets] = -60000
    factor = 2.0**-10
    # all tokens are as probable: the mean row of the head, less the target's
    expected = factor * (head.double().mean(0) - head[targets].double())
    assert expected.max() / factor > torch.finfo(torch.float16).max
    _, gradient = loss_and_gradient(torch.zeros(1, HIDDEN).half(), head, targets, factor)
    # probabilities are rounded to float16, and so is the result
    torch.testing.assert_close(gradient.double(), expected, rtol=2.0**-10, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gpu_loss_and_gradient_are_as_good_as_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    num_rows, width, vocab_size = 300, 512, 32_003
    # whole tiles, and what is left
    monkeypatch.setattr(llama.loss, "LOGITS_BYTES", 200 * 32_016 * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator)
    head = torch.randn(vocab_size, width, generator=generator) / 16
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    hidden[:100] = 8 * head[targets[:100]]
    inputs = in_dtype((hidden.to(CUDA), head.to(CUDA), targets.to(CUDA)), dtype)
    baseline = loss_and_gradient_of_torch(*inputs)
    truth = loss_and_gradient_of_torch(*in_dtype(inputs, torch.float64))
    found = loss_and_gradient(*inputs)
    for actual, floor, expected in zip(found, baseline, truth, strict=True):
        assert_no_worse_than(actual, floor, expected)
    for actual, again in zip(found, loss_and_gradient(*inputs), strict=True):
        assert_equal(again, actual)
    assert_no_worse_than(linear_cross_entropy(*inputs), baseline[0], truth[0])


@pytest.mark.gpu
def test_gpu_is_not_waited_for_and_holds_one_chunk_of_logits() -> None:
    # odd, so rows of the logits are parts of wider ones
    num_rows, width, vocab_size, row_width = 4096, 256, 128_257, 128_272
    hidden = torch.randn(num_rows, width, device=CUDA).bfloat16()
    head = torch.randn(vocab_size, width, device=CUDA).bfloat16()
    targets = torch.randint(vocab_size, (num_rows,), device=CUDA)
    factor = torch.tensor(0.5, device=CUDA)
    # compiles, and makes cuBLAS's workspace
    linear_cross_entropy_with_gradient(hidden.clone(), head, targets, factor)
    linear_cross_entropy(hidden, head, targets)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, head, targets)
        linear_cross_entropy_with_gradient(hidden, head, targets, factor)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    num_chunk_rows = chunk_rows(vocab_size, torch.bfloat16, num_rows)
    logits_bytes = num_chunk_rows * row_width * 2
    # beside them the gradient of a chunk in float32, and the losses
    bound = logits_bytes + num_chunk_rows * width * 4 + (1 << 20)
    assert torch.cuda.max_memory_allocated() - before <= bound
