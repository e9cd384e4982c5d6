"""llama/balance.py: the auxiliary loss and its gradients are transformers', and the reference's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.equality import assert_equal
from support.llama_peers import EXPERT_TENSORS, tiny_peer
from support.micro_steps import (
    CPU,
    KEEP,
    LORA,
    NF4,
    adapter_gradients,
    gradients_of,
    load_tiny,
    step_of,
    tokens,
)
from support.tiny_llama import MIXTURES, float32_error
from test_llama_reference import SAMPLES, joined, load, reference_of
from torch import Tensor

from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from llama.balance import Balance, balance_reference
from llama.layer_experts import Experts
from llama.reference import ExpertMLP
from llama.routing import route
from lora.adapter_file import load_adapter, read_adapter_config
from lora.config import LoRAConfig
from rows.batch import Batch
from step.micro_step import Policy

CUDA = torch.device("cuda")
OF_EXPERTS = replace(LORA, r=8, target_parameters=EXPERT_TENSORS)
EPS = torch.finfo(torch.float32).eps
EVERY_POLICY: tuple[tuple[Policy, Policy], ...] = (
    ("expand", "expand"),
    ("recompute", "recompute"),
    ("keep", "recompute"),
)


def with_padding(T: int) -> Tensor:
    """The lengths of two samples, of which the second has padding behind it."""
    return torch.stack([torch.full((T,), T), torch.where(torch.arange(T) < T - 5, T - 5, 0)])


def nothing_to_learn(ids: Tensor) -> Tensor:
    return torch.full_like(ids, -100)


@pytest.mark.parametrize("variant", MIXTURES)
def test_loss_and_gradients_equal_transformers_and_pefts(
    tmp_path_factory: pytest.TempPathFactory, variant: str
) -> None:
    peer = tiny_peer(tmp_path_factory, variant)
    adapter = peer.folder / "peft_adapter"
    model = load_model(open_checkpoint(peer.checkpoint), CPU, torch.float32, None)
    model.attach_lora(read_adapter_config(adapter), seed=0)
    load_adapter(adapter, model.adapter_tensors())
    ids, is_token = peer.inputs["input_ids"], peer.inputs["attention_mask"]
    assert not is_token.all()
    step = step_of(model, KEEP, has_aux_loss=True)
    found = gradients_of(step, ids, nothing_to_learn(ids), lengths=40 * is_token, aux_factor=1.0)
    expected = peer.outputs["aux_loss"]
    assert abs(found["aux_loss"] - expected) <= float32_error(expected, 40)
    actual = adapter_gradients(model)
    for name, grad in actual.items():
        truth = peer.outputs[f"aux_grad.{name}"]
        # the last layer's experts are behind all choices
        assert bool(truth.any()) != (name.startswith("model.layers.1.") and ".experts." in name)
        assert (grad - truth).abs().max() <= float32_error(truth, 80), name
    assert len(actual) == sum(name.startswith("aux_grad.") for name in peer.outputs)


@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("variant", MIXTURES)
def test_both_losses_together_have_the_references_gradients(
    tmp_path: Path, variant: str, is_packed: bool
) -> None:
    positions = SAMPLES if is_packed else None
    ids, lengths = tokens(2, SAMPLES.shape[1]), with_padding(SAMPLES.shape[1])
    labels = ids.masked_fill(SAMPLES == 0, -100).masked_fill(lengths == 0, -100)
    model = load(tmp_path, variant, NF4)
    step = step_of(model, KEEP, has_aux_loss=True)
    actual = gradients_of(
        step, ids, labels, 0.1, positions=positions, lengths=lengths, aux_factor=0.7
    )
    reference = reference_of(model)
    loss = reference.loss(Batch(ids, labels, positions))
    mlps = [layer.mlp for layer in reference.model.layers if isinstance(layer.mlp, ExpertMLP)]
    shares = torch.cat([mlp.shares[lengths > 0] for mlp in mlps])
    aux_loss = balance_reference(shares, mlps[0].num_chosen)
    (0.1 * loss + 0.7 * aux_loss).backward()
    for name, expected in {"loss": loss, "aux_loss": aux_loss}.items():
        assert (actual[name] - expected).abs() <= float32_error(expected.detach(), 80), name
    grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    truth = joined(grads, model.config)
    for name, grad in adapter_gradients(model).items():
        expected = truth[name.replace(".block_sparse_moe.", ".mlp.")]
        assert (grad - expected).abs().max() <= float32_error(expected, 80), name


def test_a_loss_of_tokens_that_are_spread_evenly_is_the_number_of_experts_of_each() -> None:
    experts = Experts(4, 2, 8, True, False, (True, False, True))
    # each token has two experts alone, and each expert half of the tokens
    router = 100 * torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    even, uneven = torch.eye(2).repeat(3, 1), torch.eye(2)[:1].repeat(6, 1)
    for y, expected in ((even, 2.0), (uneven, 4.0)):
        balance = Balance.of(torch.ones(6), experts)
        for _ in range(2):
            balance.add(route(y, router, 2, True, needs_shares=True))
        assert abs(balance.loss() - expected) <= 8 * EPS


def test_padding_does_not_count(tmp_path: Path) -> None:
    model = load(tmp_path, "olmoe", NF4)
    step = step_of(model, KEEP, has_aux_loss=True)
    ids, T = tokens(1, 12), 12
    alone = gradients_of(
        step, ids, nothing_to_learn(ids), lengths=torch.full((1, T), T), aux_factor=1.0
    )
    padded = torch.cat([ids, tokens(1, 7, seed=9)], dim=1)
    lengths = torch.tensor([[T] * T + [0] * 7])
    found = gradients_of(step, padded, nothing_to_learn(padded), lengths=lengths, aux_factor=1.0)
    for name, expected in alone.items():
        # sums of the same numbers in another order
        assert (found[name] - expected).abs().max() <= float32_error(expected, 80), name


@pytest.mark.parametrize(
    "lora", [replace(LORA, lora_dropout=0.3), OF_EXPERTS], ids=["dropout", "experts"]
)
@pytest.mark.parametrize("variant", ["olmoe", "mixtral"])
def test_every_policy_gives_the_same_bits(tmp_path: Path, variant: str, lora: LoRAConfig) -> None:
    model = load_tiny(tmp_path, lora, variant=variant)
    ids, lengths = tokens(2, 14), with_padding(14)

    def run(policies: tuple[Policy, ...]) -> dict[str, Tensor]:
        step = step_of(model, policies, has_aux_loss=True)
        return gradients_of(step, ids, ids, 0.25, 7, lengths=lengths, aux_factor=0.5)

    expected = run(KEEP)
    for policies in EVERY_POLICY:
        for name, tensor in run(policies).items():
            assert_equal(tensor, expected[name], f"{policies} {name}")


def test_a_factor_scales_the_gradient_and_not_the_loss(tmp_path: Path) -> None:
    model = load(tmp_path, "qwen3-moe", NF4)
    step = step_of(model, KEEP, has_aux_loss=True)
    ids, lengths = tokens(2, 14), with_padding(14)
    once, quarter, none = (
        gradients_of(step, ids, nothing_to_learn(ids), lengths=lengths, aux_factor=factor)
        for factor in (1.0, 0.25, 0.0)
    )
    assert_equal(quarter["aux_loss"], once["aux_loss"])
    for name in step.gradients.parameters:
        grad = once[name]
        # the last layer's experts are behind all choices
        assert bool(grad.any()) == (".self_attn." in name)
        assert_equal(quarter[name], grad / 4, name)
        assert not none[name].any()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "error"], ids=["", "deterministic"])
@pytest.mark.parametrize("policy", ["keep", "expand", "recompute", "offload"])
@pytest.mark.parametrize("variant", ["qwen3-moe", "olmoe"])
def test_gpu_captured_steps_give_the_same_bits(
    tmp_path: Path, variant: str, policy: Policy, mode: str
) -> None:
    given = (tmp_path, OF_EXPERTS, NF4, CUDA, torch.bfloat16, variant)
    one, other = (load_tiny(*given) for _ in range(2))
    launched = step_of(one, KEEP, has_aux_loss=True)
    captured = step_of(other, (policy, policy), captures=True, has_aux_loss=True)
    torch.set_deterministic_debug_mode(mode)
    try:
        # launched, captured, replayed; other tokens, padding and factors each time. What waits for
        # the device cannot be captured
        for turn in range(3):
            ids, lengths = tokens(2, 64, seed=turn), with_padding(64 + turn)[:, turn:]
            expected, actual = (
                gradients_of(step, ids, ids, 0.5, turn, lengths=lengths, aux_factor=0.5 + turn)
                for step in (launched, captured)
            )
            for name, tensor in expected.items():
                assert_equal(actual[name], tensor, name)
    finally:
        torch.set_deterministic_debug_mode("default")
