"""step/micro_step.py: gradients are slopes; every policy, captured or not, gives the same bits."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.equality import assert_equal
from support.micro_steps import CPU, KEEP, LORA, NF4, gradients_of, load_tiny, step_of, tokens
from support.tiny_llama import VARIANTS, write_variant
from torch import Tensor

import step.micro_step as step_module
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from kernels.neftune import neftune_, noise_scale
from llama.model import PROJECTIONS, projections
from lora.config import LoRAConfig
from nf4.weight import Quantization
from rows.batch import Batch
from step.micro_step import MicroStep, Policy, padded_tokens

CUDA = torch.device("cuda")
POLICIES: dict[str, tuple[Policy, Policy]] = {
    "keep": ("keep", "keep"),
    "recompute": ("recompute", "recompute"),
    "first": ("keep", "recompute"),
    "last": ("recompute", "keep"),
    "expand": ("expand", "expand"),
    "expand last": ("recompute", "expand"),
}
GPU_POLICIES: dict[str, tuple[Policy, Policy]] = {
    **POLICIES,
    "offload": ("offload", "offload"),
    "offload first": ("offload", "keep"),
    "offload last": ("recompute", "offload"),
}
DROPOUTS = pytest.mark.parametrize("dropout", [0.0, 0.3])
DEVICES = pytest.mark.parametrize(
    "device", [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)


def adapter(dropout: float, targets: Sequence[str] = PROJECTIONS) -> LoRAConfig:
    return LoRAConfig(4, 6, dropout, tuple(targets))


def some_labels(input_ids: Tensor) -> Tensor:
    labels = input_ids.clone()
    labels[0, :4] = -100
    labels[-1, -3:] = -100
    return labels


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, name)


@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "v_proj"), ("down_proj",)], ids=str)
def test_gradients_with_dropout_are_the_slopes_of_the_loss(
    tmp_path: Path, targets: tuple[str, ...]
) -> None:
    model = load_tiny(tmp_path, adapter(0.3, targets))
    step = step_of(model, KEEP)
    input_ids = tokens(4, 9)

    def run() -> dict[str, Tensor]:
        return gradients_of(step, input_ids, some_labels(input_ids), dropout_seed=7)

    gradients = run()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # uphill, where the slope is the gradient's length; a step that changes the loss by far more
        # than it is rounded, and by less than the slope changes on the way
        gradient = gradients[name]
        size = 1e-2 / gradient.norm()
        parameter.data += size * gradient
        above = run()["loss"].double()
        parameter.data -= 2 * size * gradient
        below = run()["loss"].double()
        parameter.data += size * gradient
        slope = (above - below) / (2 * size)
        # another mask than the forward pass had would be off by tens of percent
        assert abs(slope / gradient.square().sum() - 1) < 0.02, name


@DEVICES
@DROPOUTS
@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "v_proj")], ids=str)
def test_every_policy_gives_the_same_bits(
    tmp_path: Path, targets: tuple[str, ...], policies: str, dropout: float, device: torch.device
) -> None:
    model = load_tiny(tmp_path, adapter(dropout, targets), device=device)
    input_ids = tokens(2, 65)
    labels = some_labels(input_ids)
    expected = gradients_of(step_of(model, KEEP), input_ids, labels, 0.25, 7)
    assert all(grad.any() for grad in expected.values())
    actual = gradients_of(step_of(model, POLICIES[policies]), input_ids, labels, 0.25, 7)
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("variant", ["grouped-query", "gemma2"])
def test_gradients_in_half_precision_on_a_cpu_point_where_those_in_float32_do(
    tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    # rows are no multiples of what a product reads at once, and behind them lies whatever there was
    input_ids, labels = tokens(2, 65), some_labels(tokens(2, 65))
    found = {}
    for one in (torch.float32, dtype):
        model = load_tiny(tmp_path / str(one), dtype=one, variant=variant)
        found[one] = gradients_of(step_of(model, KEEP), input_ids, labels)
    for name, expected in found[torch.float32].items():
        close = torch.cosine_similarity(found[dtype][name].flatten(), expected.flatten(), dim=0)
        assert close > 0.98, (name, close)


@DEVICES
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_is_recomputed_bit_for_bit(
    tmp_path: Path, variant: str, device: torch.device
) -> None:
    model = load_model(
        open_checkpoint(write_variant(tmp_path, variant)), device, torch.float32, NF4
    )
    model.attach_lora(LoRAConfig(4, 6, 0.3, projections(model.config)), seed=0)
    input_ids = tokens(2, 65)
    expected = gradients_of(step_of(model, KEEP), input_ids, some_labels(input_ids), 0.25, 7)
    recompute: tuple[Policy, Policy] = ("recompute", "recompute")
    step = step_of(model, recompute)
    assert_same(gradients_of(step, input_ids, some_labels(input_ids), 0.25, 7), expected)


@DEVICES
def test_gradients_are_added_and_scaled(tmp_path: Path, device: torch.device) -> None:
    model = load_tiny(tmp_path, device=device)
    step = step_of(model, KEEP)
    input_ids = tokens(2, 9)
    once = gradients_of(step, input_ids, input_ids)
    quarter = gradients_of(step, input_ids, input_ids, 0.25)
    assert_equal(quarter["loss"], once["loss"])
    # on top of the quarter that is there
    step(Batch(input_ids, input_ids), torch.tensor(0.25, device=device))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert_equal(quarter[name], once[name] / 4, name)
            # a sum over 18 rows that starts from another number rounds otherwise
            error = (parameter.grad.cpu() - once[name] / 2).abs().max()
            assert error <= 18 * torch.finfo(torch.float32).eps * once[name].abs().max(), name


@DROPOUTS
def test_a_dropout_seed_decides_the_masks(tmp_path: Path, dropout: float) -> None:
    step = step_of(load_tiny(tmp_path, adapter(dropout)), KEEP)
    input_ids = tokens(2, 9)
    first, again, other = (gradients_of(step, input_ids, input_ids, 1.0, s) for s in (1, 1, 2))
    assert_same(again, first)
    for name, grad in other.items():
        assert torch.equal(grad, first[name]) == (dropout == 0), name
    # evaluation has none
    loss = step.model.loss(Batch(input_ids, input_ids))
    assert torch.equal(loss, first["loss"]) == (dropout == 0)


def some_lengths(B: int, T: int) -> Tensor:
    """Of samples that are shorter by a token from row to row."""
    return torch.stack([(torch.arange(T) < T - row) * (T - row) for row in range(B)])


@DEVICES
@pytest.mark.parametrize("policies", POLICIES)
def test_noise_on_embeddings_is_as_if_the_embeddings_had_it(
    tmp_path: Path, policies: str, device: torch.device
) -> None:
    model = load_tiny(tmp_path, adapter(0.3), device=device)
    # each token once, so that each has an embedding of its own
    input_ids = torch.randperm(model.config.vocab_size)[:66].view(2, 33)
    lengths = some_lengths(2, 33)
    noisy = step_of(model, POLICIES[policies], noise_alpha=5.0)
    actual = gradients_of(noisy, input_ids, input_ids, 0.25, 7, lengths=lengths)
    plain = step_of(model, KEEP)
    assert not torch.equal(
        gradients_of(plain, input_ids, input_ids, 0.25, 7)["loss"], actual["loss"]
    )
    num_padding = padded_tokens(33, device) - 33
    places = F.pad(input_ids, (0, num_padding)).flatten()
    scale = noise_scale(F.pad(lengths, (0, num_padding)), 5.0, model.config.hidden_size)
    weight = model.decoder.embed_tokens.weight
    seed = torch.tensor([7], device=device)
    embeddings = neftune_(weight[places.to(device)], scale.flatten().to(device), seed)
    is_token = (scale > 0).flatten()
    # the last token of the shorter row has no noise of its own, nor has the padding
    weight[places[is_token].to(device)] = embeddings[is_token.to(device)]
    assert_same(gradients_of(plain, input_ids, input_ids, 0.25, 7), actual)


def test_noise_comes_before_a_multiplier_of_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(load_tiny(tmp_path, variant="granite"), KEEP, noise_alpha=5.0)
    input_ids, lengths = tokens(2, 9), some_lengths(2, 9)
    largest = []
    monkeypatch.setattr(step_module, "neftune_", lambda x, scale, seed: largest.append(scale))
    gradients_of(step, input_ids, input_ids, lengths=lengths)
    # the residual stream is kept divided by its own multiplier
    multiplied = (3.3 / 0.22) * noise_scale(lengths, 5.0, step.model.config.hidden_size)
    assert_equal(largest[0], multiplied.flatten())


def test_a_seed_decides_the_noise_and_evaluation_has_none(tmp_path: Path) -> None:
    step = step_of(load_tiny(tmp_path), KEEP, noise_alpha=5.0)
    input_ids, lengths = tokens(2, 9), some_lengths(2, 9)
    first, again, other = (
        gradients_of(step, input_ids, input_ids, 1.0, seed, lengths=lengths) for seed in (1, 1, 2)
    )
    assert_same(again, first)
    assert not torch.equal(other["loss"], first["loss"])
    assert_equal(
        step.evaluate(Batch(input_ids, input_ids)), step.model.loss(Batch(input_ids, input_ids))
    )


@DEVICES
def test_evaluation_is_the_models_loss(tmp_path: Path, device: torch.device) -> None:
    step = step_of(load_tiny(tmp_path, adapter(0.3), device=device), KEEP)
    input_ids = tokens(2, 64)
    loss = step.evaluate(Batch(input_ids, some_labels(input_ids)))
    assert_equal(loss, step.model.loss(Batch(input_ids, some_labels(input_ids))))


def test_what_is_given_back_is_expanded_again(tmp_path: Path) -> None:
    step = step_of(load_tiny(tmp_path), ("expand", "expand"))
    expected = gradients_of(step, tokens(2, 9), tokens(2, 9))
    assert list(step.model.expanded_tensors())
    step.release()
    assert not list(step.model.expanded_tensors())
    assert_same(gradients_of(step, tokens(2, 9), tokens(2, 9)), expected)


def test_a_step_takes_the_gradients_of_its_own_model(tmp_path: Path) -> None:
    own, other = (step_of(load_tiny(tmp_path), KEEP) for _ in range(2))
    with pytest.raises(AssertionError):
        MicroStep(own.model, other.gradients, KEEP)


def test_labels_that_ask_for_nothing_give_no_loss_and_no_gradient(tmp_path: Path) -> None:
    step = step_of(load_tiny(tmp_path), ("keep", "recompute"))
    labels = torch.full((2, 9), -100)
    # the first token of a sequence has nothing before it
    labels[:, 0] = 3
    for name, tensor in gradients_of(step, tokens(2, 9), labels).items():
        assert not tensor.any(), name


@pytest.mark.gpu
@DROPOUTS
@pytest.mark.parametrize("policies", GPU_POLICIES)
@pytest.mark.parametrize("quantization", [None, NF4], ids=["unquantized", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "variant", ["grouped-query", "gemma2", "olmo2", "command-r", "qwen3-moe", "gpt-oss"]
)
def test_gpu_captured_steps_give_the_same_bits(
    tmp_path: Path,
    dtype: torch.dtype,
    quantization: Quantization | None,
    policies: str,
    dropout: float,
    variant: str,
) -> None:
    # two models: a weight stays expanded for all steps of one
    one, other = (
        load_tiny(tmp_path, adapter(dropout), quantization, CUDA, dtype, variant) for _ in range(2)
    )
    launched = step_of(one, KEEP)
    captured = step_of(other, GPU_POLICIES[policies], captures=True)
    # two shapes, each three times: launched, captured, replayed; other tokens and seeds each time
    for turn in range(3):
        for shape in ((2, 40), (3, 65)):
            input_ids = tokens(*shape, seed=turn)
            labels = some_labels(input_ids)
            expected = gradients_of(launched, input_ids, labels, 0.5, turn)
            assert_same(gradients_of(captured, input_ids, labels, 0.5, turn), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("variant", ["grouped-query", "gemma2", "qwen3-moe", "gpt-oss"])
def test_gpu_captured_evaluations_give_the_same_bits(
    tmp_path: Path, variant: str, is_packed: bool
) -> None:
    model = load_tiny(tmp_path, adapter(0.3), NF4, CUDA, torch.bfloat16, variant)
    launched, captured = (step_of(model, KEEP, captures=captures) for captures in (False, True))
    losses = []
    for turn in range(3):
        for B, T in ((2, 40), (3, 65), (2, 64)):
            input_ids = tokens(B, T, seed=turn)
            positions = torch.arange(T).expand(B, T) % 24 if is_packed else None
            batch = Batch(input_ids, some_labels(input_ids), positions)
            losses.append(captured.evaluate(batch))
            assert_equal(losses[-1], launched.evaluate(batch))
        # training in between leaves the evaluation as it is
        gradients_of(captured, input_ids, input_ids)
    assert len(set(map(float, losses))) == len(losses)


@pytest.mark.gpu
@pytest.mark.parametrize("policies", GPU_POLICIES)
@pytest.mark.parametrize("is_packed", [False, True])
def test_gpu_captured_steps_have_the_same_noise(
    tmp_path: Path, policies: str, is_packed: bool
) -> None:
    one, other = (
        load_tiny(tmp_path, adapter(0.3), device=CUDA, dtype=torch.bfloat16) for _ in range(2)
    )
    launched = step_of(one, KEEP, noise_alpha=5.0)
    captured = step_of(other, GPU_POLICIES[policies], noise_alpha=5.0, captures=True)
    positions = torch.arange(64).expand(2, 64) % 32 if is_packed else None
    for turn in range(3):
        input_ids, lengths = tokens(2, 64, seed=turn), some_lengths(2, 64) - turn
        labels = some_labels(input_ids)
        if is_packed:
            labels[:, ::32] = -100
        given = (input_ids, labels, 0.5, turn, positions, lengths)
        assert_same(gradients_of(captured, *given), gradients_of(launched, *given))


@pytest.mark.gpu
def test_gpu_a_step_without_labels_may_be_captured(tmp_path: Path) -> None:
    step = step_of(load_tiny(tmp_path, device=CUDA), KEEP, captures=True)
    input_ids = tokens(2, 9)
    expected = gradients_of(step, input_ids, input_ids)
    for _ in range(3):
        for tensor in gradients_of(step, input_ids, torch.full((2, 9), -100)).values():
            assert not tensor.any()
    assert_same(gradients_of(step, input_ids, input_ids), expected)


def peak_of(step: MicroStep, input_ids: Tensor) -> int:
    """Bytes that a micro-batch takes beyond what is there before it."""
    gradients_of(step, input_ids, input_ids)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients_of(step, input_ids, input_ids)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
def test_gpu_what_is_not_kept_takes_no_memory(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, LORA, device=CUDA)
    policies: tuple[Policy, ...] = ("keep", "recompute", "offload")
    keep, recompute, offload = (
        peak_of(step_of(model, (policy, policy)), tokens(8, 512)) for policy in policies
    )
    # of two layers the one whose input is on the host has a place for it all the same
    assert keep > recompute >= offload


@pytest.mark.gpu
def test_gpu_shapes_share_one_pool(tmp_path: Path) -> None:
    step = step_of(load_tiny(tmp_path, LORA, device=CUDA), KEEP, captures=True)
    sizes = []
    # the largest first; each launched, captured and replayed
    for num_tokens in (512, 256, 384):
        for _ in range(3):
            gradients_of(step, tokens(8, num_tokens), tokens(8, num_tokens))
        sizes.append(torch.cuda.memory_reserved())
    # what cuBLAS and graphs take beside it does not grow with the shapes
    assert sizes[2] <= sizes[0] + (8 << 20)
