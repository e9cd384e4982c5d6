"""llama/served.py: amid a training in FP8 a model computes what users of the adapter will."""

from pathlib import Path

import pytest
import torch
from support.equality import assert_equal
from support.micro_steps import gradients_of, load_tiny, step_of, tokens

from kernels.fp8 import E4M3
from kernels.rotation import INT8
from llama.served import as_served
from rows.batch import Batch
from step.micro_step import Policy

BF16 = torch.bfloat16
POLICIES: list[Policy] = ["keep", "expand"]


@pytest.mark.parametrize("forward", [E4M3, INT8], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_served_model_multiplies_in_16_bits(
    tmp_path: Path, policy: Policy, forward: torch.dtype
) -> None:
    model, input_ids = load_tiny(tmp_path, dtype=BF16, intermediate_size=80), tokens(2, 65)
    expected = model.logits(input_ids)
    model.multiply_in_8_bits(forward)
    step = step_of(model, (policy, policy))
    in_fp8 = model.logits(input_ids)
    assert not torch.equal(in_fp8, expected)
    held = [id(tensor) for tensor in model.expanded_tensors()]
    for _ in range(2):
        with as_served(model):
            assert_equal(model.logits(input_ids), expected)
    # an evaluation too, and the training goes on as it was
    batch = Batch(input_ids, input_ids)
    with as_served(model):
        loss = model.loss(batch)
    assert_equal(step.evaluate(batch), loss)
    assert not torch.equal(gradients_of(step, input_ids, input_ids)["loss"], loss)
    assert_equal(model.logits(input_ids), in_fp8)
    assert [id(tensor) for tensor in model.expanded_tensors()] == held


def test_weights_that_stay_in_16_bits_serve_an_evaluation_too(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, dtype=BF16, intermediate_size=80)
    model.multiply_in_8_bits(E4M3)
    step = step_of(model, ("expand", "expand"))
    gradients_of(step, tokens(1, 9), tokens(1, 9))
    with as_served(model):
        for prefix, group in model.groups():
            # attention's forward products are not in FP8
            assert (group.expanded is not None) == prefix.endswith(".self_attn."), prefix


def test_a_failed_pass_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, dtype=BF16, intermediate_size=80)
    model.multiply_in_8_bits(E4M3)
    in_fp8 = model.logits(tokens(1, 9))
    with pytest.raises(RuntimeError, match="no room"), as_served(model):
        raise RuntimeError("no room")
    assert_equal(model.logits(tokens(1, 9)), in_fp8)
