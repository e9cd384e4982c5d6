"""step/duration.py: what is reckoned with are the products that a micro-step multiplies."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.micro_steps import gradients_of, load_tiny, step_of, tokens
from test_step_memory_plan import FP8_WORK, WORK
from torch.utils.flop_counter import FlopCounterMode

from kernels.fp8 import E4M3
from lora.linear_group import LinearGroup
from nf4.weight import quantize
from step.duration import (
    ATTENTION_SHARE,
    FP8_SPEEDUP,
    GRADIENT_BYTES,
    INPUT_BYTES,
    Rates,
    step_seconds,
)
from step.micro_step import Policy
from step.workload import Workload

B, T = 2, 40
# samples so short that attention has nothing to multiply
NO_ATTENTION = 1e-9
GEMMA4_OF: dict[int, dict[str, Any]] = {
    width: {"variant": "gemma4", "global_head_dim": width} for width in (256, 258)
}
POLICIES: list[tuple[Policy, Policy]] = [("keep", "keep"), ("keep", "recompute")]
NUM_LAYERS = WORK.config.num_hidden_layers


def products(work: Workload, policies: Sequence[Policy]) -> float:
    """FLOPs that are reckoned with; a moved byte takes no time."""
    return step_seconds(work, policies, Rates(product=1.0, memory=math.inf))


def matrix_products(counter: FlopCounterMode) -> int:
    """FLOPs of what was multiplied, attention left out."""
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    return sum(counts.get(operation, 0) for operation in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("policies", POLICIES, ids=str)
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("grouped-query", torch.float32),
        ("gemma2", torch.float32),
        ("gemma4", torch.float32),
        ("qwen3-moe", torch.float32),
        # in E4M3, but for the MLP
        ("grouped-query", torch.bfloat16),
    ],
)
def test_products_are_those_of_a_micro_step(
    tmp_path: Path,
    variant: str,
    dtype: torch.dtype,
    policies: tuple[Policy, Policy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the updates' products, a percent of a real model's, are not reckoned with
    model = load_tiny(tmp_path, lora=None, variant=variant, dtype=dtype)
    if dtype == torch.bfloat16:
        model.multiply_in_8_bits(E4M3)
    # counted one by one
    monkeypatch.setattr("step.duration.FP8_SPEEDUP", 1)
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


def test_wider_heads_of_a_layer_multiply_more(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, variant="gemma4")
    work = replace(WORK, model=model, batch=B, tokens=T, sample_tokens=float(T))
    policies: list[Policy] = ["keep"] * 2
    without = products(replace(work, sample_tokens=NO_ATTENTION), policies)
    # 4 heads of 12 numbers and 4 of 16; 2 products forward and 7 back, half a square each
    expected = 9 * B * T * T * 4 * (12 + 16) / ATTENTION_SHARE
    assert products(work, policies) - without == pytest.approx(expected, rel=1e-6)


def test_attention_is_our_own_kernels_where_heads_of_some_layers_are_too_wide(
    tmp_path: Path,
) -> None:
    models = (
        load_tiny(tmp_path / str(width), None, None, dtype=torch.bfloat16, **GEMMA4_OF[width])
        for width in GEMMA4_OF
    )
    assert [replace(WORK, model=model).is_masked for model in models] == [False, True]


@pytest.mark.parametrize("policy", ["expand", "keep", "recompute"])
@pytest.mark.parametrize("work", [WORK, FP8_WORK], ids=["bf16", "fp8"])
def test_weights_are_read_in_nf4_and_written_expanded_before_their_products(
    work: Workload, policy: Policy
) -> None:
    weight = quantize(torch.randn(256, 256), 64, double_quant=True)
    packed, again, is_fp8 = weight.num_bytes / 256**2, policy == "recompute", work is FP8_WORK
    qkv, o, gate_up, down = (
        group.num_rows * group.in_features
        for group in WORK.model.layers[0].modules()
        if isinstance(group, LinearGroup)
    )
    # forward attention's are in 16 bits anyway
    num_bytes = (1 + again) * (qkv + o) * (packed + 2)
    # again but for the last, whose result the backward pass does not need
    num_bytes += ((1 + again) * gate_up + down) * (packed + 2 - is_fp8)
    num_bytes += (qkv + o + gate_up + down) * (packed + 2 - is_fp8)
    if policy == "expand":
        # once, before the first pass
        num_bytes = 0
    # no row that moves
    work, rates = replace(work, batch=0), Rates(product=1.0, memory=1.0)
    expected = NUM_LAYERS * num_bytes
    assert step_seconds(work, (policy,) * NUM_LAYERS, rates) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("policy", ["expand", "keep", "recompute"])
def test_products_in_8_bits_take_less_time_and_rows_that_are_quantized_first(
    policy: Policy,
) -> None:
    policies = (policy,) * NUM_LAYERS
    config = WORK.config
    head = 4 * WORK.M * config.vocab_size * config.hidden_size
    by_product, in_fp8 = (
        products(replace(work, sample_tokens=NO_ATTENTION), policies) - head
        for work in (WORK, FP8_WORK)
    )
    # but for attention's forward, and again
    kept = 2 * WORK.M * NUM_LAYERS * (6144 + 4096) * 4096 * (2 if policy == "recompute" else 1)
    assert in_fp8 == pytest.approx(kept + (by_product - kept) / FP8_SPEEDUP, rel=1e-6)
    # the bytes that differ where no weight is expanded: of x forward, and again, and of grad_y
    rates = Rates(product=math.inf, memory=1.0)
    by_bytes, more = (
        step_seconds(work, policies, rates) - step_seconds(replace(work, batch=0), policies, rates)
        for work in (WORK, FP8_WORK)
    )
    inputs, outputs = (4096 + 14336), (6144 + 4096 + 28672 + 4096)
    again = 4096 if policy == "recompute" else 0
    numbers = INPUT_BYTES * (inputs + again) + GRADIENT_BYTES * outputs
    expected = WORK.M * NUM_LAYERS * numbers
    assert more - by_bytes == pytest.approx(expected, rel=1e-6)
