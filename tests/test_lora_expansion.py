"""lora/expansion.py: base products in 8 bits, with the updates in 16 bits in the same sums."""

from pathlib import Path

import pytest
import torch
from support.equality import assert_equal
from support.micro_steps import LORA, gradients_of, load_tiny, step_of, tokens
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint
from test_lora_linear_group import SEED, TARGETS, make, mask_of, results_of, run, run_torch
from test_step_micro_step import CUDA, GPU_POLICIES, adapter, assert_same, some_labels
from torch import Tensor

from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from kernels.fp8 import E4M3
from kernels.nf4_to_fp8 import fp8_scale, nf4_to_fp8
from kernels.nf4_to_int8 import int8_scales, nf4_to_int8
from kernels.rotation import INT8
from kernels.rows_8bit import empty_8bit_rows, quantize_rows
from llama.model import PROJECTIONS, Llama
from lora import expansion
from lora.config import LoRAConfig
from lora.expansion import EightBits, SixteenBits
from lora.linear_group import LinearGroup
from nf4.weight import NF4Weight, Quantization
from optim.adamw import AdamW
from rows.batch import Batch
from step.micro_step import Policy

ROWS, IN_FEATURES, NUM_TOKENS = (32, 16, 48), 64, 11
NF4 = Quantization(64, True)
BF16 = torch.bfloat16
DROPOUTS = pytest.mark.parametrize("dropout", [0.0, 0.4])
NAMED_TARGETS = pytest.mark.parametrize("targets", ["none", "outer", "all"])
FORMATS = pytest.mark.parametrize("forward", [E4M3, INT8], ids=["E4M3", "INT8"])


def eight_bits(
    targets: str, dropout: float = 0.0, forward: torch.dtype | None = E4M3
) -> LinearGroup:
    sizes = {"rows": ROWS, "in_features": IN_FEATURES, "dtype": BF16}
    group = make(TARGETS[targets], NF4, True, dropout, **sizes).group
    group.multiply_in_8_bits(forward)
    assert isinstance(group.expand(BF16), EightBits)
    return group


def drawn() -> tuple[Tensor, Tensor]:
    """Rows and gradients."""
    return torch.randn(NUM_TOKENS, IN_FEATURES).to(BF16), torch.randn(NUM_TOKENS, sum(ROWS)).to(
        BF16
    )


def in_8_bits(matrix: Tensor, format: torch.dtype) -> Tensor:
    matrix = matrix.contiguous()
    out = empty_8bit_rows(matrix.shape, format, matrix.device)
    values, scales = quantize_rows(matrix, out)
    return values.float() * scales[:, None]


@FORMATS
@DROPOUTS
@NAMED_TARGETS
def test_base_products_alone_are_rounded_to_8_bits(
    targets: str, dropout: float, forward: torch.dtype
) -> None:
    group = eight_bits(targets, dropout, forward)
    x, grad_y = drawn()
    seed = torch.tensor([SEED])
    actual = run(group, x, grad_y, seed)
    weight = group.weight
    assert isinstance(weight, NF4Weight)
    W = nf4_to_fp8(weight, fp8_scale(weight))
    W = W.values.float() * W.scale
    expansion = group.expand(BF16)
    A, sB = expansion.A.float(), expansion.sB.float()
    h, grad_h = actual.h.float(), actual.grad_h.float()
    assert group.bias is not None
    W_forward = W
    if forward == INT8:
        values, scales = nf4_to_int8(weight, int8_scales(weight))
        W_forward = values.float() * scales[:, None]
    y = in_8_bits(x, forward) @ W_forward.T + h @ sB.T + group.bias.float()
    # by the E4M3 weight's own transpose, which is made of the packed weight
    mask = mask_of(group, x, seed)
    grad_x = in_8_bits(grad_y, E4M3) @ W + (grad_h @ A) * (1 if mask is None else mask.float())
    assert actual.grad_x is not None
    for found, expected in ((actual.y, y), (actual.grad_x, grad_x)):
        # bfloat16's own rounding of the sum, and of the update before it is dropped
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2**-6)


@FORMATS
@DROPOUTS
@NAMED_TARGETS
def test_the_updates_gradients_are_those_of_16_bits(
    targets: str, dropout: float, forward: torch.dtype
) -> None:
    group = eight_bits(targets, dropout, forward)
    given = (*drawn(), torch.tensor([SEED]))
    actual = run(group, *given)
    group.fp8_scale = None
    expected = run(group, *given)
    for name, grad in expected.grads.items():
        assert_equal(actual.grads[name], grad, name)
    for name in ("y", "grad_x"):
        found, wanted = (results_of(passed)[name].float() for passed in (actual, expected))
        # both operands of a sum are rounded, to 4 bits or to 127 steps, and round independently
        error = (found - wanted).norm() / wanted.norm()
        bound = 0.02 if forward == INT8 and name == "y" else 0.06
        assert 0 < error < bound, (name, error)


@FORMATS
@NAMED_TARGETS
def test_an_expanded_weight_that_stays_gives_the_same_bits(
    targets: str, forward: torch.dtype
) -> None:
    group = eight_bits(targets, 0.4, forward)
    given = (*drawn(), torch.tensor([SEED]))
    expected = run(group, *given)
    group.keep_expanded(BF16)
    # in 8 bits forward and transposed, and the updates' matrices
    assert sum(t.nbytes for t in group.expanded_tensors()) == 2 * sum(ROWS) * IN_FEATURES + 2 * (
        group.tail * (sum(ROWS) + IN_FEATURES)
    )
    actual = run(group, *given)
    for name, tensor in results_of(expected).items():
        assert_equal(results_of(actual)[name], tensor, name)


@pytest.mark.parametrize("is_fp8", [False, True], ids=["16 bits", "8 bits"])
@NAMED_TARGETS
def test_gradients_may_be_multiplied_in_parts(
    monkeypatch: pytest.MonkeyPatch, targets: str, is_fp8: bool
) -> None:
    group, given = eight_bits(targets), drawn()
    if not is_fp8:
        group.fp8_scale = None
    expected = run(group, *given).grad_x
    for name in ("PART_ROWS", "QUANTIZED_ROWS"):
        # three parts, of which the last is shorter
        monkeypatch.setattr(expansion, name, NUM_TOKENS // 3)
    actual = run(group, *given).grad_x
    assert actual is not None
    assert expected is not None
    # bfloat16's rounding, of sums that another number of rows may order otherwise
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-9)


@DROPOUTS
@NAMED_TARGETS
def test_the_backward_pass_alone_may_be_in_e4m3(targets: str, dropout: float) -> None:
    group = eight_bits(targets, dropout)
    given = (*drawn(), torch.tensor([SEED]))
    in_fp8 = results_of(run(group, *given))
    group.fp8_scale = None
    expected = results_of(run(group, *given))
    group.multiply_in_8_bits(None)
    expected["grad_x"] = in_fp8["grad_x"]
    for is_kept in (False, True):
        if is_kept:
            group.keep_expanded(BF16)
        found = results_of(run(group, *given))
        for name, tensor in expected.items():
            assert_equal(found[name], tensor, name)
    # 16 bits with the updates inside; E4M3 transposed, and the updates' matrices beside it
    N, K, T = sum(ROWS), IN_FEATURES, group.tail
    in_16_bits = 2 * (N + T) * (K + T) if T else 2 * N * K
    kept = sum(tensor.nbytes for tensor in group.expanded_tensors())
    assert kept == in_16_bits + N * K + 2 * T * (N + K)


@pytest.mark.parametrize(
    ("quantization", "rows"), [(None, ROWS), (NF4, (32, 17, 48))], ids=["unquantized", "odd rows"]
)
def test_what_has_no_e4m3_stays_in_16_bits(
    quantization: Quantization | None, rows: tuple[int, ...]
) -> None:
    group = make(TARGETS["all"], quantization, rows=rows, in_features=64, dtype=BF16).group
    group.multiply_in_8_bits(E4M3)
    assert isinstance(group.expand(BF16), SixteenBits)


def test_the_truth_is_as_far_as_e4m3_allows() -> None:
    case = make(TARGETS["all"], NF4, True, rows=ROWS, in_features=IN_FEATURES, dtype=BF16)
    case.group.multiply_in_8_bits(E4M3)
    x, grad_y = drawn()
    actual = results_of(run(case.group, x, grad_y))
    for name, truth in run_torch(case, x, grad_y).items():
        error = (actual[name].double() - truth).norm() / truth.norm()
        # two operands in E4M3: 2.6 % each; the updates' gradients are in 16 bits
        assert error < (0.05 if name in ("y", "grad_x") else 0.01), (name, error)


POLICIES: list[tuple[Policy, Policy]] = [
    ("expand", "expand"),
    ("recompute", "recompute"),
    ("expand", "recompute"),
]


@FORMATS
@pytest.mark.parametrize("policies", POLICIES, ids=str)
def test_every_policy_gives_the_same_bits(
    tmp_path: Path, policies: tuple[Policy, Policy], forward: torch.dtype
) -> None:
    model = load_tiny(tmp_path, dtype=BF16, intermediate_size=80)
    sixteen = gradients_of(step_of(model, ("keep", "keep")), tokens(2, 65), tokens(2, 65))
    model.multiply_in_8_bits(forward)
    expected = gradients_of(step_of(model, ("keep", "keep")), tokens(2, 65), tokens(2, 65))
    actual = gradients_of(step_of(model, policies), tokens(2, 65), tokens(2, 65))
    for name, grad in expected.items():
        assert_equal(actual[name], grad, name)
        close = torch.cosine_similarity(grad.flatten(), sixteen[name].flatten(), dim=0)
        assert close > 0.98, (name, close)
    assert any(not torch.equal(grad, sixteen[name]) for name, grad in expected.items())


# norms with a bias to them, both activations, one norm for both halves: all that writes INT8
IN_INT8 = [(name, INT8) for name in ("grouped-query", "gemma2", "command-r")]


@pytest.mark.parametrize(
    ("variant", "forward"), [*((name, E4M3) for name in VARIANTS), *IN_INT8], ids=str
)
def test_every_family_is_recomputed_bit_for_bit(
    tmp_path: Path, variant: str, forward: torch.dtype
) -> None:
    # with ranks that are no multiples of 8, in rows of several samples
    lora = LoRAConfig(5, 6, 0.3, PROJECTIONS)
    model = load_tiny(tmp_path, lora, dtype=BF16, variant=variant, intermediate_size=80)
    model.multiply_in_8_bits(forward)
    assert any(group.fp8_scale is not None for _, group in model.groups())
    input_ids, positions = tokens(4, 16), torch.arange(16).expand(4, 16) % 7
    labels = input_ids.masked_fill(positions == 0, -100)
    policies: list[tuple[Policy, Policy]] = [("keep", "keep"), ("expand", "recompute")]
    expected, actual = (
        gradients_of(step_of(model, each), input_ids, labels, 0.25, 7, positions)
        for each in policies
    )
    for name, grad in expected.items():
        assert grad.isfinite().all(), name
        assert_equal(actual[name], grad, name)


def with_weights(folder: Path, **weights: Tensor) -> Llama:
    """A tiny model of which some weights are given, in training in FP8."""
    tensors = random_tensors(FIELDS, BF16)
    for name, tensor in weights.items():
        tensors[f"model.layers.0.self_attn.{name}.weight"] = tensor.to(BF16)
    checkpoint = open_checkpoint(write_checkpoint(folder, FIELDS, tensors))
    model = load_model(checkpoint, torch.device("cpu"), BF16, NF4)
    model.attach_lora(LORA, seed=0)
    for name, tensor in model.adapter_tensors().items():
        if name.endswith("lora_B.weight"):
            tensor.fill_(0.1)
    return model


def outlier(*shape: int) -> Tensor:
    weight = torch.randn(shape) * 0.02
    weight[0, 1] = 10.0
    return weight


@pytest.mark.parametrize(
    "weights",
    [{name: torch.zeros(32, 32) for name in ("q_proj", "o_proj")}, {"o_proj": outlier(32, 32)}],
    ids=["zeros", "outlier"],
)
def test_a_weight_of_zeros_or_of_one_outlier_trains(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    model = with_weights(tmp_path, **weights)
    sixteen = gradients_of(step_of(model, ("keep", "keep")), tokens(2, 33), tokens(2, 33))
    model.multiply_in_8_bits(E4M3)
    found = gradients_of(step_of(model, ("keep", "keep")), tokens(2, 33), tokens(2, 33))
    for name, grad in found.items():
        assert grad.isfinite().all(), name
        assert grad.any() == sixteen[name].any(), name
        close = torch.cosine_similarity(grad.flatten(), sixteen[name].flatten(), dim=0)
        assert close > 0.95 or not grad.any(), (name, close)


@FORMATS
@pytest.mark.parametrize(
    ("embedding", "is_finite"),
    [
        (torch.zeros(32), True),
        (torch.eye(32)[3] * 3e4, True),
        (torch.full((32,), torch.inf), False),
    ],
    ids=["zeros", "outlier", "infinities"],
)
def test_a_step_with_a_row_that_is_not_finite_is_skipped(
    tmp_path: Path, embedding: Tensor, is_finite: bool, forward: torch.dtype
) -> None:
    model = with_weights(tmp_path)
    model.multiply_in_8_bits(forward)
    model.decoder.embed_tokens.weight[5] = embedding.to(BF16)
    input_ids = tokens(2, 33)
    input_ids[:, 7] = 5
    step = step_of(model, ("keep", "recompute"))
    optimizer = AdamW(step.gradients, weight_decay=0.0)
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    loss = step(Batch(input_ids, input_ids), torch.tensor(1.0))
    norm = optimizer.step(0.01)
    assert loss.isfinite() == norm.isfinite() == is_finite
    for name, tensor in model.adapter_tensors().items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, before[name]) != is_finite, name


@pytest.mark.gpu
@FORMATS
@DROPOUTS
@pytest.mark.parametrize("policies", GPU_POLICIES)
@pytest.mark.parametrize("variant", ["grouped-query", "gemma2", "qwen3-moe"])
def test_gpu_captured_steps_give_the_same_bits(
    tmp_path: Path, variant: str, policies: str, dropout: float, forward: torch.dtype
) -> None:
    # two models: a weight stays expanded for all steps of one
    one, other, served = (
        load_tiny(
            tmp_path,
            adapter(dropout),
            device=CUDA,
            dtype=BF16,
            variant=variant,
            # a multiple of 16, or no product is in 8 bits forward
            intermediate_size=80,
        )
        for _ in range(3)
    )
    for model in (one, other):
        model.multiply_in_8_bits(forward)
    launched = step_of(one, ("keep", "keep"))
    captured = step_of(other, GPU_POLICIES[policies], captures=True)
    in_16_bits = step_of(served, ("keep", "keep"))
    # launched, captured, replayed; of so many rows that no weight is multiplied as it is packed
    for turn in range(3):
        for shape in ((4, 64), (3, 65)):
            input_ids = tokens(*shape, seed=turn)
            labels = some_labels(input_ids)
            expected = gradients_of(launched, input_ids, labels, 0.5, turn)
            actual = gradients_of(captured, input_ids, labels, 0.5, turn)
            assert_same(actual, expected)
            sixteen = gradients_of(in_16_bits, input_ids, labels, 0.5, turn)
            # experts stay in 16 bits, so a mixture's loss does
            names = ["loss"] if variant != "qwen3-moe" else [*actual]
            assert any(not torch.equal(actual[name], sixteen[name]) for name in names)
            # an evaluation in between multiplies in 16 bits
            batch = Batch(input_ids, labels)
            assert_equal(captured.evaluate(batch), in_16_bits.evaluate(batch))
