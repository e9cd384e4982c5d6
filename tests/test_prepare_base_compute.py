"""prepare/base_compute.py: FP8 products are refused by name, and what stays in 16 bits is said."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.micro_steps import LORA, NF4, load_tiny
from support.tiny_llama import FIELDS, random_tensors, write_checkpoint, write_variant
from test_run_machine import install_gpu

from checkpoint.loading import load_sizes
from checkpoint.opening import open_checkpoint
from kernels.fp8 import E4M3
from kernels.rotation import INT8
from prepare.asked import ask
from prepare.base import sized_model
from prepare.base_compute import check_base_compute, describe_base_compute, set_base_compute
from prepare.job import BUNDLED
from run.config import TrainConfig
from run.ranks import Ranks

CONFIG = TrainConfig(model="m", data="d", dtype="bfloat16", base_compute="fp8")
BF16 = torch.bfloat16


@pytest.mark.parametrize("capability", [None, (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_and_a_gpu_that_is_new_enough_are_taken(
    capability: tuple[int, int] | None, dtype: str
) -> None:
    check_base_compute(replace(CONFIG, dtype=dtype), capability)


@pytest.mark.parametrize(
    ("changes", "capability", "complaint"),
    [
        ({"quant": "none"}, None, "fp8 must be given with --quant nf4, .*: got --quant none$"),
        ({"dtype": "float32"}, None, "--dtype bfloat16 or float16: got float32; choose --dtype b"),
        (
            {},
            (8, 6),
            r"8\.9 or later: this GPU has .8, 6.; leave out --base-compute fp8",
        ),
    ],
    ids=["unquantized", "32 bits", "old GPU"],
)
def test_what_cannot_be_in_fp8_is_refused_by_name(
    changes: dict[str, str], capability: tuple[int, int] | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint) as refusal:
        check_base_compute(replace(CONFIG, **changes), capability)
    assert "\n" not in str(refusal.value)
    # and says nothing of products in 16 bits
    check_base_compute(replace(CONFIG, base_compute="bf16", **changes), capability)


@pytest.mark.parametrize("is_here", [True, False], ids=["here", "planned"])
def test_a_run_and_a_plan_are_refused_before_data_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, is_here: bool
) -> None:
    arguments = f"--model {BUNDLED / 'model'} --data d.jsonl --base-compute fp8"
    if is_here:
        install_gpu(monkeypatch, (8, 0))
        monkeypatch.setattr("prepare.asked.configure_torch", lambda *_: None)
    else:
        arguments += " --plan --gpu a100-80"
    with pytest.raises(ValueError, match=r"FP8 products need .*: this GPU has \(8, 0\)"):
        ask(arguments.split(), {}, Ranks())


def test_a_model_without_a_projection_for_it_is_refused(tmp_path: Path) -> None:
    fields = FIELDS | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, fields, random_tensors(fields, BF16)))
    config = replace(CONFIG, model="base", block_size=32)
    with pytest.raises(ValueError, match="whose sizes are multiples of 16: base has none"):
        sized_model(config, LORA, checkpoint)
    sized_model(replace(config, base_compute="bf16"), LORA, checkpoint)


def test_it_is_said_once_what_stays_in_16_bits(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, dtype=BF16)
    assert describe_base_compute(model) == []
    model.multiply_in_8_bits(E4M3)
    # the MLP's width is 72
    assert describe_base_compute(model) == [
        "base products in FP8: 0 of 14 projections forward, 8 back; in bfloat16: 2 gate_proj, "
        "2 up_proj, 2 down_proj, not in NF4 or of sizes that are no multiples of 16; evaluations "
        "and answers are in bfloat16"
    ]


def test_products_in_int8_are_told_from_those_in_fp8(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, dtype=BF16, intermediate_size=80)
    set_base_compute(model, replace(CONFIG, base_compute="int8"))
    formats = {group.forward_format for _, group in model.groups()}
    assert formats == {None, INT8}
    assert describe_base_compute(model) == [
        "base products in 8 bits: 6 of 14 projections forward in INT8, 14 back in FP8; "
        "evaluations and answers are in bfloat16"
    ]


def test_experts_are_said_to_stay_in_16_bits(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_variant(tmp_path, "qwen3-moe"))
    model = load_sizes(checkpoint, torch.float16, NF4)
    model.multiply_in_8_bits(E4M3)
    (line,) = describe_base_compute(model)
    # the queries and keys have 6 rows a head
    assert line.startswith("base products in FP8: 0 of 8 projections forward, 2 back; in float16:")
    assert "multiples of 16; the experts in float16; evaluations and" in line
