"""llama/layer_experts.py: which layers have experts, by each family's fields."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_llama import FIELDS, VARIANTS

from llama.config import LlamaConfig, read_config
from llama.layer_experts import Experts

QWEN3, OLMOE = VARIANTS["qwen3-moe"], VARIANTS["olmoe"]
MIXTRAL, GRANITE = VARIANTS["mixtral"], VARIANTS["granite-moe"]


def read(folder: Path, fields: dict[str, Any], *left_out: str) -> LlamaConfig:
    given = {name: value for name, value in (FIELDS | fields).items() if name not in left_out}
    (folder / "config.json").write_text(json.dumps(given))
    return read_config(folder)


def experts_of(folder: Path, fields: dict[str, Any], *left_out: str) -> Experts:
    experts = read(folder, fields, *left_out).experts
    assert experts is not None
    return experts


def test_each_familys_experts_are_read(tmp_path: Path) -> None:
    assert experts_of(tmp_path, QWEN3) == Experts(6, 2, 40, True, False, (False, True))
    assert experts_of(tmp_path, OLMOE) == Experts(5, 3, 24, False, False, (True, True))
    assert experts_of(tmp_path, MIXTRAL) == Experts(4, 2, 24, True, False, (True, True))
    granite = Experts(4, 3, 24, True, True, (True, True), block="block_sparse_moe")
    assert experts_of(tmp_path, GRANITE) == granite
    assert read(tmp_path, {}).experts is None


def test_the_layers_of_qwen3_with_experts_follow_a_step_and_a_list(tmp_path: Path) -> None:
    more = QWEN3 | {"num_hidden_layers": 6}
    every_second = more | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    found = experts_of(tmp_path, every_second).has_experts
    assert found == (False, True, False, False, False, True)
    assert experts_of(tmp_path, more | {"mlp_only_layers": None}).has_experts == (True,) * 6
    # then it is a dense model
    assert read(tmp_path, QWEN3 | {"mlp_only_layers": [0, 1]}).experts is None


def test_a_window_is_of_all_layers_of_qwen3_or_of_none(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN3).windows == (8, 8)
    # published files have a size, and do not use it
    assert read(tmp_path, QWEN3 | {"use_sliding_window": False}).windows == (None, None)
    assert read(tmp_path, QWEN3 | {"max_window_layers": 1}).windows == (8, 8)
    assert read(tmp_path, QWEN3 | {"sliding_window": None}).windows == (None, None)
    # transformers does not read which layers are named
    with pytest.raises(ValueError, match="layer_types must be sliding_attention for all layers"):
        read(tmp_path, QWEN3 | {"layer_types": ["sliding_attention", "full_attention"]})


def test_a_number_of_experts_has_two_names(tmp_path: Path) -> None:
    # transformers 5 writes the second for Qwen3-MoE
    for fields in (QWEN3, OLMOE):
        renamed = fields | {"num_local_experts": 3}
        assert experts_of(tmp_path, renamed, "num_experts").num_experts == 3
    assert experts_of(tmp_path, MIXTRAL | {"num_experts": 3}, "num_local_experts").num_experts == 3


def test_missing_fields_are_those_of_transformers_classes(tmp_path: Path) -> None:
    fields = ("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob")
    bare = experts_of(tmp_path, QWEN3, *fields, "moe_intermediate_size")
    assert (bare.num_experts, bare.num_chosen, bare.width, bare.is_normalized) == (
        128,
        8,
        768,
        False,
    )
    bare = experts_of(tmp_path, OLMOE, *fields)
    assert (bare.num_experts, bare.num_chosen, bare.is_normalized) == (64, 8, False)
    for family in (MIXTRAL, GRANITE):
        bare = experts_of(tmp_path, family, *fields)
        assert (bare.num_experts, bare.num_chosen, bare.is_normalized) == (8, 2, True)


@pytest.mark.parametrize(("fields", "eps"), [(QWEN3, 1e-6), (OLMOE, 1e-5), (MIXTRAL, 1e-5)])
def test_norms_without_an_eps_have_that_of_transformers_class(
    tmp_path: Path, fields: dict[str, Any], eps: float
) -> None:
    assert read(tmp_path, fields, "rms_norm_eps").rms_norm_eps == eps


def test_qwen3_coders_file_says_that_it_has_norms_of_heads(tmp_path: Path) -> None:
    # the class reads no such field
    coder = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
    assert read(tmp_path, QWEN3 | coder) == read(tmp_path, QWEN3)


def test_fields_that_change_nothing_here_are_ignored(tmp_path: Path) -> None:
    for fields in (QWEN3, OLMOE, MIXTRAL, GRANITE):
        without_effect = {"output_router_logits": False, "router_aux_loss_coef": 0.001}
        assert read(tmp_path, fields | without_effect) == read(tmp_path, fields)


def test_a_file_may_ask_for_the_auxiliary_loss(tmp_path: Path) -> None:
    for fields in (QWEN3, OLMOE, MIXTRAL, GRANITE):
        assert not experts_of(tmp_path, fields).asks_for_aux_loss
        assert experts_of(tmp_path, fields | {"output_router_logits": True}).asks_for_aux_loss


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (OLMOE | {"clip_qkv": 8.0}, "must hold fields that OlmoeForCausalLM has: got clip_qkv"),
        (MIXTRAL | {"router_jitter_noise": 0.1}, "got router_jitter_noise = 0.1"),
        (QWEN3 | {"output_router_logits": 1}, "output_router_logits must be true or false: got 1"),
        (QWEN3 | {"shared_expert_intermediate_size": 64}, "got shared_expert_intermediate_size"),
        (QWEN3 | {"num_experts_per_tok": 7}, "at most the number of experts, 6: got 7"),
        (QWEN3 | {"num_experts": 0}, "num_experts must be a positive integer: got 0"),
        (QWEN3 | {"norm_topk_prob": 1}, "norm_topk_prob must be true or false: got 1"),
        (QWEN3 | {"mlp_only_layers": ["0"]}, "mlp_only_layers must be a list of layers: got"),
        (QWEN3 | {"mlp_only_layers": 1}, "mlp_only_layers must be a list of layers: got 1"),
        (QWEN3 | {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer"),
        (FIELDS | {"num_experts": 4}, "must hold fields that LlamaForCausalLM has: got num_exp"),
        (GRANITE | {"num_experts": 4}, "num_experts"),
    ],
    ids=str,
)
def test_another_function_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, fields)
