"""step/duration.py: what is reckoned with are the products that a micro-step multiplies."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.micro_steps import gradients_of, load_tiny, step_of, tokens
from test_step_memory_plan import WORK
from torch.utils.flop_counter import FlopCounterMode

from lora.linear_group import LinearGroup
from nf4.weight import quantize
from step.duration import ATTENTION_SHARE, Rates, step_seconds
from step.micro_step import Policy
from step.workload import Workload

B, T = 2, 40
# samples so short that attention has nothing to multiply
NO_ATTENTION = 1e-9
POLICIES: list[tuple[Policy, Policy]] = [("keep", "keep"), ("keep", "recompute")]
NUM_LAYERS = WORK.config.num_hidden_layers


def products(work: Workload, policies: tuple[Policy, ...]) -> float:
    """FLOPs that are reckoned with; a moved byte takes no time."""
    return step_seconds(work, policies, Rates(product=1.0, memory=math.inf))


def matrix_products(counter: FlopCounterMode) -> int:
    """FLOPs of what was multiplied, attention left out."""
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    return sum(counts.get(operation, 0) for operation in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("policies", POLICIES, ids=str)
@pytest.mark.parametrize("variant", ["grouped-query", "gemma2", "qwen3-moe"])
def test_products_are_those_of_a_micro_step(
    tmp_path: Path, variant: str, policies: tuple[Policy, Policy]
) -> None:
    # the updates' products, a percent of a real model's, are not reckoned with
    model = load_tiny(tmp_path, lora=None, variant=variant)
    input_ids = tokens(B, T)
    with FlopCounterMode(display=False) as counter:
        gradients_of(step_of(model, policies), input_ids, input_ids)
    work = replace(WORK, model=model, batch=B, tokens=T, sample_tokens=NO_ATTENTION)
    qkv = model.layers[0].self_attn.qkv
    # the embeddings are frozen, and the last token of a row has no label
    left_out = 2 * B * T * qkv.num_rows * qkv.in_features + 4 * B * model.head.numel()
    assert products(work, policies) == pytest.approx(matrix_products(counter) + left_out, rel=1e-9)


@pytest.mark.parametrize(("policy", "num_again"), [("keep", 0), ("recompute", 2)])
def test_attention_multiplies_half_a_square_for_each_of_its_products(
    policy: Policy, num_again: int
) -> None:
    policies = (policy,) * NUM_LAYERS
    without = products(replace(WORK, sample_tokens=NO_ATTENTION), policies)
    config = WORK.config
    square = 2 * WORK.M * WORK.tokens * config.num_attention_heads * config.head_dim
    # q k^T and its product with v; back, five with torch's kernels and seven with our own
    for num_back, work in ((5, WORK), (7, replace(WORK, sample_tokens=WORK.tokens))):
        num_products = 2 + num_again + num_back
        expected = NUM_LAYERS * num_products * square / 2 / ATTENTION_SHARE
        assert products(work, policies) - without == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("policy", ["expand", "keep", "recompute"])
def test_weights_are_read_in_nf4_and_written_expanded_before_their_products(
    policy: Policy,
) -> None:
    weight = quantize(torch.randn(256, 256), 64, double_quant=True)
    bytes_of_one = weight.num_bytes / 256**2 + WORK.dtype.itemsize
    *others, down = (
        group.num_rows * group.in_features
        for group in WORK.model.layers[0].modules()
        if isinstance(group, LinearGroup)
    )
    # forward and back; and again, but for the last, whose result the backward pass does not need
    num_expanded = 2 * (sum(others) + down) + (policy == "recompute") * sum(others)
    if policy == "expand":
        # once, before the first pass
        num_expanded = 0
    # no row that moves
    work, rates = replace(WORK, batch=0), Rates(product=1.0, memory=1.0)
    expected = NUM_LAYERS * num_expanded * bytes_of_one
    assert step_seconds(work, (policy,) * NUM_LAYERS, rates) == pytest.approx(expected, rel=1e-3)
