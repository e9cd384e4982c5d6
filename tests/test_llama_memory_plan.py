"""llama/memory_plan.py: the walk through a step against the GPU's own count; mixes; refusals."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from micro_steps import LORA, gradients_of, load_tiny
from tiny_llama import VARIANTS, write_variant

from benchmarks.random_model import LLAMA_3_8B, random_model
from llama.checkpoint import frozen_bytes, load_model
from llama.families import FAMILIES
from llama.memory_plan import GIB, choose_policies, mix, nearest_that_fits, plan_memory, plan_within
from llama.micro_step import POLICIES, MicroStep
from llama.model import PROJECTIONS
from llama.workload import Workload
from lora.config import LoRAConfig
from nf4.weight import NF4Weight

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORK = Workload(
    config=LLAMA_3_8B,
    lora=LoRAConfig(16, 32.0, 0.0, PROJECTIONS),
    frozen_bytes=5_700_000_000,
    moment_bytes=8,
    batch=4,
    tokens=2048,
    dtype=torch.bfloat16,
)
NUM_LAYERS = LLAMA_3_8B.num_hidden_layers


@pytest.mark.parametrize("quantization", [None, (64, True), (128, False)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_bytes_are_those_of_the_loaded_model(
    tmp_path: Path, variant: str, quantization: tuple[int, bool] | None
) -> None:
    folder = write_variant(tmp_path, variant, torch.bfloat16)
    model = load_model(folder, CPU, torch.float32, quantization)
    expected = sum(parameter.nbytes for parameter in model.parameters())
    for _, group in model.groups():
        weight = group.weight
        expected += weight.num_bytes if isinstance(weight, NF4Weight) else weight.nbytes
        expected += 0 if group.bias is None else group.bias.nbytes
    assert frozen_bytes(folder, quantization) == expected


@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "v_proj", "down_proj")], ids=str)
def test_the_adapter_and_the_groups_are_those_of_the_model(
    tmp_path: Path, targets: tuple[str, ...]
) -> None:
    lora = replace(LORA, target_modules=targets)
    model = load_tiny(tmp_path, lora)
    work = replace(WORK, config=model.config, lora=lora)
    assert work.num_adapted == sum(p.numel() for p in model.trainable_parameters())
    layer = model.layers[0]
    groups = (layer.self_attn.qkv, layer.self_attn.o, layer.mlp.gate_up, layer.mlp.down)
    for planned, group in zip(work.groups, groups, strict=True):
        assert (planned.N, planned.K, planned.tail) == (
            group.num_rows,
            group.in_features,
            group.tail,
        )


def test_members_of_other_ranks_are_planned_with_room_for_the_largest(tmp_path: Path) -> None:
    patterns = {"q_proj": 40, "0.self_attn.o_proj": 80}
    lora = replace(LORA, rank_pattern=patterns, exclude_modules=("layers.1.mlp.up_proj",))
    model = load_tiny(tmp_path, lora)
    work = replace(WORK, config=model.config, lora=lora)
    assert work.num_adapted == sum(p.numel() for p in model.trainable_parameters())
    # the longest of the layers' tails
    qkv, o, gate_up, down = work.groups
    assert (qkv.tail, o.tail, gate_up.tail, down.tail) == (128, 128, 64, 64)
    trainable, _ = model.num_parameters()
    assert trainable == sum(t.numel() for t in model.adapter_tensors().values())
    assert trainable < work.num_adapted


def test_each_policy_needs_less_than_the_one_before() -> None:
    keep, recompute, offload = (
        plan_memory(WORK, (policy,) * NUM_LAYERS) for policy in POLICIES.values()
    )
    assert keep.device > recompute.device > offload.device
    # what a layer keeps, as llama/decoder_layer.py counts it: 4.5 D + 2 F numbers a token, and the
    # few columns of the updates and 4 bytes a row and head of the softmax
    numbers = 4.5 * 4096 + 2 * 14336
    assert keep.kept_per_layer == pytest.approx(2 * WORK.M * numbers, rel=0.02)
    assert recompute.input_per_layer == pytest.approx(2 * WORK.M * 4096, rel=0.02)
    assert (keep.host, recompute.host) == (0, 0)
    assert offload.host == NUM_LAYERS * 2 * WORK.M * 4096
    assert keep.moments == 8 * WORK.num_adapted == 8 * 41_943_040


def test_norms_behind_the_halves_keep_what_those_gave() -> None:
    norms = FAMILIES["Gemma2ForCausalLM"].norms
    work = replace(WORK, config=replace(LLAMA_3_8B, norms=norms))
    for policy, num_rows in (("keep", 2), ("recompute", 0)):
        plan = plan_memory(work, (POLICIES[policy],) * NUM_LAYERS)
        other = plan_memory(WORK, (POLICIES[policy],) * NUM_LAYERS)
        more = num_rows * WORK.M * (2 * 4096 + 4)
        assert plan.kept_per_layer - other.kept_per_layer == 2 * WORK.M * (2 * 4096 + 4)
        assert plan.input_per_layer == other.input_per_layer
        # one layer's pass has a few more rows at its peak, whatever all others keep
        assert 0 <= plan.step - other.step - NUM_LAYERS * more <= 4 * 2 * WORK.M * 4096


@pytest.mark.parametrize("gib", [9, 10, 12, 16, 24, 32, 80])
def test_the_mix_fills_the_budget_and_stays_within_it(gib: int) -> None:
    plan = choose_policies(WORK, gib * GIB)
    assert plan is not None
    assert plan.device <= gib * GIB
    counts = [plan.policies.count(policy) for policy in ("offload", "recompute", "keep")]
    assert plan.policies == mix(NUM_LAYERS, counts[2], counts[1])
    # one more layer that keeps more would not fit
    if counts[2] < NUM_LAYERS:
        assert plan_memory(WORK, mix(NUM_LAYERS, counts[2] + 1, 0)).device > gib * GIB
    if counts[0]:
        more = mix(NUM_LAYERS, counts[2], counts[1] + 1)
        assert plan_memory(WORK, more).device > gib * GIB
    assert plan.layers() in plan.table()


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    work = replace(WORK, batch=64)
    assert choose_policies(work, 16 * GIB) is None
    nearest = nearest_that_fits(work, 16 * GIB)
    assert nearest is not None
    assert choose_policies(nearest, 16 * GIB) is not None
    assert choose_policies(replace(nearest, batch=nearest.batch + 1), 16 * GIB) is None
    advice = f"--batch-size {nearest.batch} --max-length 2048 fits"
    with pytest.raises(ValueError, match=rf"must fit 16\.00 GiB.* at the least; .*{advice}"):
        plan_within(work, None, 16 * GIB)
    with pytest.raises(ValueError, match="with --batch-size"):
        plan_within(WORK, "keep", 16 * GIB)
    # a batch of one must be shorter
    single = replace(WORK, batch=2, tokens=65536)
    with pytest.raises(ValueError, match=r"--batch-size 1 --max-length \d+ fits"):
        plan_within(single, None, 9 * GIB)
    with pytest.raises(ValueError, match="no micro-batch fits beside the weights"):
        plan_within(WORK, None, 5 * GIB)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(4, 1024), (1, 2048)], ids=str)
@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "v_proj")], ids=str)
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_gpu_holds_what_was_planned(
    family: str, targets: tuple[str, ...], shape: tuple[int, int], policy: str
) -> None:
    config = replace(
        LLAMA_3_8B,
        norms=FAMILIES[family].norms,
        attn_logit_softcapping=50.0 if family == "Gemma2ForCausalLM" else None,
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=7168,
        num_hidden_layers=6,
        num_attention_heads=16,
    )
    lora = LoRAConfig(16, 32.0, 0.0, targets)
    # what earlier tests left in cycles would be given back in the middle
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = random_model(config, CUDA)
    frozen = torch.cuda.memory_allocated() - before
    model.attach_lora(lora, seed=0)
    work = replace(WORK, config=config, lora=lora, frozen_bytes=frozen, moment_bytes=0)
    work = replace(work, batch=shape[0], tokens=shape[1])
    policies = (POLICIES[policy],) * 6
    step = MicroStep(model, policies, captures=True)
    input_ids = torch.randint(config.vocab_size, shape)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        gradients_of(step, input_ids, input_ids)
    plan = plan_memory(work, policies)
    actual = torch.cuda.max_memory_allocated() - before
    # the loss is over when the layers' backward passes need most, and has its memory all the same
    assert 0.95 * (plan.in_use - plan.loss) <= actual <= 1.05 * plan.in_use
    # the same of what is not frozen, beside cuBLAS's workspaces
    working, least = actual - frozen, plan.in_use - plan.loss - frozen
    assert 0.9 * least <= working <= 1.1 * (plan.in_use - frozen) + (64 << 20)
