"""step/memory_plan.py: what a run takes of the memory; mixes; refusals; and all of it on a GPU."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.micro_steps import KEEP, LORA, NF4, fitting
from support.on_gpu import measure
from support.tiny_llama import VARIANTS, write_variant

from benchmarks.random_model import LLAMA_3_8B, random_model
from checkpoint.loading import load_model, load_sizes
from checkpoint.opening import open_checkpoint
from kernels.fp8 import E4M3
from llama.config import LlamaConfig
from llama.families import FAMILIES
from llama.model import PROJECTIONS
from lora.config import LoRAConfig
from nf4.weight import Quantization
from step.memory_plan import (
    CONTEXT_BYTES,
    EVALUATED_BYTES_PER_LAYER,
    GIB,
    GRAPHS_BYTES_PER_LAYER,
    MIB,
    NCCL_BYTES,
    WORKSPACE_BYTES,
    DoesNotFit,
    choose_policies,
    evaluated_rows,
    mix,
    nearest_that_fits,
    plan_memory,
    plan_within,
)
from step.micro_step import POLICIES
from step.workload import Workload

CPU, META = torch.device("cpu"), torch.device("meta")
NUM_LAYERS = LLAMA_3_8B.num_hidden_layers


def work_for(
    config: LlamaConfig = LLAMA_3_8B,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Workload:
    """Four rows of 2,048 tokens through a model with an adapter of rank 16."""
    model = random_model(config, META, dtype)
    model.attach_lora(LoRAConfig(16, 32.0, dropout, PROJECTIONS), seed=0)
    return Workload(model, moment_bytes=8, batch=4, tokens=2048)


WORK = work_for()
FP8_WORK = work_for()
FP8_WORK.model.multiply_in_8_bits(E4M3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", [None, NF4, Quantization(128, False)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_are_those_of_the_loaded_model(
    tmp_path: Path, variant: str, quantization: Quantization | None, dtype: torch.dtype
) -> None:
    folder = write_variant(tmp_path, variant, torch.bfloat16)
    loaded = load_model(open_checkpoint(folder), CPU, dtype, quantization)
    sizes = load_sizes(open_checkpoint(folder), dtype, quantization)
    found = [(tensor.shape, tensor.dtype) for tensor in sizes.frozen_tensors()]
    assert found == [(tensor.shape, tensor.dtype) for tensor in loaded.frozen_tensors()]
    assert all(tensor.device == META for tensor in sizes.frozen_tensors())
    assert sizes.head.dtype == dtype
    # as an allocator counts them
    sizes.attach_lora(fitting(LORA, sizes.config), seed=0)
    plan = plan_memory(Workload(sizes, 8, 1, 64), KEEP)
    expected = sum(-(-tensor.nbytes // 512) * 512 for tensor in loaded.frozen_tensors())
    assert plan.weights == expected


def test_members_of_other_ranks_are_planned_with_room_for_the_largest(tmp_path: Path) -> None:
    patterns = {"q_proj": 40, "0.self_attn.o_proj": 80}
    lora = replace(LORA, rank_pattern=patterns, exclude_modules=("layers.1.mlp.up_proj",))
    folder = write_variant(tmp_path, "grouped-query")
    model = load_model(open_checkpoint(folder), CPU, torch.float32, NF4)
    sizes = load_sizes(open_checkpoint(folder), torch.float32, NF4)
    for one in (model, sizes):
        one.attach_lora(lora, seed=0)
    work = Workload(sizes, 8, 1, 64)
    assert work.num_adapted == sum(p.numel() for p in model.trainable_parameters())
    plan = plan_memory(work, KEEP)
    assert plan.adapter == plan.gradients == 4 * work.num_adapted
    trainable, _ = model.num_parameters()
    assert trainable == sum(t.numel() for t in model.adapter_tensors().values())
    assert trainable < work.num_adapted


def test_each_policy_needs_less_than_the_one_before() -> None:
    expand, keep, recompute, offload = (
        plan_memory(WORK, (policy,) * NUM_LAYERS) for policy in POLICIES.values()
    )
    assert expand.device > keep.device > recompute.device > offload.device
    # what a layer keeps, as llama/layer.py counts it: 4.5 D + 2 F numbers a token, and the
    # few columns of the updates and 4 bytes a row and head of the softmax
    numbers = 4.5 * 4096 + 2 * 14336
    assert keep.kept_per_layer == pytest.approx(2 * WORK.M * numbers, rel=0.02)
    assert recompute.input_per_layer == pytest.approx(2 * WORK.M * 4096, rel=0.02)
    assert (keep.host, recompute.host) == (0, 0)
    # rows and columns of the four groups of a layer, each with a tail for its updates
    sizes = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    expanded = sum(2 * (rows + 64) * (columns + 64) for rows, columns in sizes)
    assert expand.expanded == NUM_LAYERS * expanded
    assert (keep.expanded, recompute.expanded) == (0, 0)
    # the passes' peak is the MLP's backward pass, where the last weight is expanded
    rows, columns = sizes[-1]
    assert keep.step - expand.step == 2 * (rows + 64) * (columns + 64)
    assert offload.host == NUM_LAYERS * 2 * WORK.M * 4096
    assert keep.moments == 8 * WORK.num_adapted == 8 * 41_943_040


def test_base_products_in_8_bits_take_no_more_memory() -> None:
    for policy in POLICIES.values():
        plan, other = (plan_memory(w, (policy,) * NUM_LAYERS) for w in (FP8_WORK, WORK))
        without = plan.device - plan.expanded
        assert without == pytest.approx(other.device - other.expanded, rel=0.01), policy
    # transposed, a byte a weight, and both matrices of the updates; forward the same of the MLP,
    # with the matrices shared, and what bfloat16 has of attention
    sizes = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    back = sum(rows * columns + 2 * 64 * (rows + columns) for rows, columns in sizes)
    forward = sum(2 * (rows + 64) * (columns + 64) for rows, columns in sizes[:2])
    forward += sum(rows * columns for rows, columns in sizes[2:])
    expanded = NUM_LAYERS * (back + forward)
    assert plan_memory(FP8_WORK, ("expand",) * NUM_LAYERS).expanded == expanded


def test_an_evaluation_expands_in_16_bits_what_trains_in_8() -> None:
    config = replace(LLAMA_3_8B, num_hidden_layers=2, windows=(None, None))
    # of more rows than are multiplied by packed weights
    work, policies = replace(work_for(config), batch=1, tokens=256), mix(2, 2, 0, 2)
    work.model.multiply_in_8_bits(E4M3)
    plan = plan_memory(work, policies)
    expanded = 2 * (28672 + 64) * (4096 + 64)
    assert plan.step < 0.4 * expanded
    evaluated = plan_memory(replace(work, evaluation=(1, 256)), policies)
    assert expanded < evaluated.step < 1.2 * expanded
    assert evaluated.expanded == plan.expanded
    # so does a text that is sampled
    sampling = [
        plan_memory(replace(of, prompt_tokens=2048), policies).sampling
        for of in (work, work_for(config))
    ]
    assert sampling[0] == sampling[1]


def test_pinned_memory_is_rounded_up_to_a_power_of_two() -> None:
    plan = plan_memory(replace(WORK, tokens=2112), ("offload",) * NUM_LAYERS)
    assert plan.host == NUM_LAYERS * (128 << 20)


def test_norms_behind_the_halves_keep_what_those_gave() -> None:
    norms = FAMILIES["Gemma2ForCausalLM"].norms
    plan = plan_memory(work_for(replace(LLAMA_3_8B, norms=norms)), ("keep",) * NUM_LAYERS)
    other = plan_memory(WORK, ("keep",) * NUM_LAYERS)
    more = 2 * WORK.M * (2 * 4096 + 4)
    assert plan.kept_per_layer - other.kept_per_layer == more
    assert plan.input_per_layer == other.input_per_layer
    # and one layer's pass differs by a few rows at its peak, whatever all others keep
    assert abs(plan.step - other.step - NUM_LAYERS * more) <= 4 * 2 * WORK.M * 4096


def test_norms_of_heads_keep_what_they_normalize() -> None:
    plan = plan_memory(work_for(replace(LLAMA_3_8B, qk_norm=True)), ("keep",) * NUM_LAYERS)
    other = plan_memory(WORK, ("keep",) * NUM_LAYERS)
    # 32 heads of queries and 8 of keys, and a float32 for each
    assert plan.kept_per_layer - other.kept_per_layer == WORK.M * 40 * (2 * 128 + 4)


def test_the_loss_holds_a_gradient_in_float32_beside_its_logits() -> None:
    plan = plan_memory(WORK, ("recompute",) * NUM_LAYERS)
    # hidden states of all rows, and again of those with a label; logits of a chunk, and its
    # gradient in float32
    rows = (128 << 20) // (2 * 128256) // 128 * 128
    expected = (2 * WORK.M - WORK.batch) * 4096 * 2 + rows * (2 * 128256 + 4 * 4096)
    assert expected <= plan.loss <= expected + (1 << 20)


def test_the_products_behind_a_layers_norms_hold_their_expanded_weights() -> None:
    # of an MLP that is wide beside a token's numbers, the expanded gates and ups are the peak
    narrow = replace(WORK, batch=1, tokens=64)
    plan = plan_memory(narrow, ("recompute",) * NUM_LAYERS)
    expanded = 2 * (2 * 14336 + 64) * (4096 + 64)
    least = expanded + NUM_LAYERS * plan.input_per_layer
    assert least <= plan.step <= least + plan.kept_per_layer + (4 << 20)


def test_dropout_takes_a_dropped_copy() -> None:
    plan = plan_memory(work_for(dropout=0.1), ("recompute",) * NUM_LAYERS)
    other = plan_memory(WORK, ("recompute",) * NUM_LAYERS)
    assert plan.step >= other.step + 2 * WORK.M * 4096


def test_attention_in_float32_holds_no_scores() -> None:
    plans = [
        plan_memory(
            replace(work_for(dtype=torch.float32), batch=1, tokens=tokens),
            ("recompute",) * NUM_LAYERS,
        )
        for tokens in (8192, 16384, 32768)
    ]
    first, second = (b.step - a.step for a, b in itertools.pairwise(plans))
    # twice the tokens, twice the memory, whatever part of it is that of weights
    assert second == pytest.approx(2 * first, rel=0.01)


def test_what_a_run_takes_outside_of_the_allocator_is_counted() -> None:
    policies = ("recompute",) * NUM_LAYERS
    alone = plan_memory(WORK, policies)
    shapes = replace(WORK, num_ranks=2, num_shapes=5, num_evaluated_shapes=3)
    several = plan_memory(shapes, policies)
    assert alone.device == alone.reserved + alone.moments + alone.graphs + CONTEXT_BYTES
    per_layer = 4 * GRAPHS_BYTES_PER_LAYER + 3 * EVALUATED_BYTES_PER_LAYER
    assert several.device - alone.device == NCCL_BYTES + NUM_LAYERS * per_layer
    assert "NCCL" in several.table()
    assert "NCCL" not in alone.table()


def test_evaluation_and_sampling_are_planned_for() -> None:
    policies = ("recompute",) * NUM_LAYERS
    alone = plan_memory(WORK, policies)
    # as large as what is trained on: the passes have room
    assert plan_memory(replace(WORK, evaluation=(4, 2048)), policies).device == alone.device
    assert plan_memory(replace(WORK, evaluation=(4, 8192)), policies).device > alone.device
    sampling = plan_memory(replace(WORK, prompt_tokens=2048), policies)
    # keys and values of 8 heads of 128 in 32 layers
    assert sampling.sampling > 32 * 2048 * 2 * 8 * 128 * 2
    # and cuBLAS has a workspace on the stream of a sampled text, and one on that of its capture
    assert sampling.reserved - alone.reserved > 2 * WORKSPACE_BYTES
    assert sampling.device > alone.device


def test_no_more_rows_are_evaluated_at_once_than_training_has_memory_for() -> None:
    assert evaluated_rows(WORK, 4, 2048) == 4
    rows = evaluated_rows(WORK, 16, 2048)
    assert 4 <= rows < 16
    leanest = mix(NUM_LAYERS, 0, 0)
    least = plan_memory(WORK, leanest).device
    assert plan_memory(replace(WORK, evaluation=(rows, 2048)), leanest).device <= least
    assert plan_memory(replace(WORK, evaluation=(rows + 1, 2048)), leanest).device > least
    # one row, if that is more already
    assert evaluated_rows(WORK, 4, 65536) == 1


@pytest.mark.parametrize(
    ("work", "gib"),
    [*((WORK, gib) for gib in (9, 10, 12, 16, 24, 32, 36, 80)), (FP8_WORK, 16), (FP8_WORK, 36)],
    ids=lambda value: "fp8" if value is FP8_WORK else "bf16" if value is WORK else str(value),
)
def test_the_mix_fills_the_budget_and_stays_within_it(work: Workload, gib: int) -> None:
    plan = choose_policies(work, gib * GIB)
    assert plan is not None
    assert plan.device <= gib * GIB
    names = ("offload", "recompute", "keep", "expand")
    counts = [plan.policies.count(policy) for policy in names]
    # one more layer that keeps more would not fit
    if counts[3]:
        assert plan.policies == mix(NUM_LAYERS, NUM_LAYERS, 0, counts[3])
        if counts[3] < NUM_LAYERS:
            more = mix(NUM_LAYERS, NUM_LAYERS, 0, counts[3] + 1)
            assert plan_memory(work, more).device > gib * GIB
        return
    assert plan.policies == mix(NUM_LAYERS, counts[2], counts[1])
    if counts[2] < NUM_LAYERS:
        assert plan_memory(work, mix(NUM_LAYERS, counts[2] + 1, 0)).device > gib * GIB
    if counts[0]:
        more = mix(NUM_LAYERS, counts[2], counts[1] + 1)
        assert plan_memory(work, more).device > gib * GIB
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
    # a batch of one must be shorter, and so what is evaluated
    single = replace(WORK, batch=2, tokens=65536, evaluation=(1, 65536))
    with pytest.raises(ValueError, match=r"--batch-size 1 --max-length \d+ fits"):
        plan_within(single, None, 9 * GIB)
    least = plan_memory(WORK, mix(NUM_LAYERS, 0, 0))
    with pytest.raises(
        DoesNotFit, match=r"no micro-batch fits beside the weights, 5\.31 GiB$"
    ) as no:
        plan_within(WORK, None, 5 * GIB)
    assert no.value.num_bytes == least.device


# alone on its GPU, of which it counts what is taken
@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.gpu
def test_gpu_holds_what_was_planned() -> None:
    rows = measure("plans_on_gpu.py", "17", "40")
    assert len(rows) == 40
    off = []
    for row in rows:
        shares = [row["reserved"] / row["planned"], row["used"] / row["used_planned"]]
        line = "  ".join(f"{share - 1:+.1%}" for share in shares)
        line += f"  of {row['planned'] / MIB:,.0f} MiB  {row['given']}"
        if not all(0.95 <= share <= 1.02 for share in shares):
            off.append(line)
    assert not off, "\n".join(off)
