"""llama/mixtures.py: gpt-oss's config.json as it is published, and tensors by their names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_llama import FIELDS, VARIANTS

from checkpoint.tensor_names import TensorNames
from llama.config import LlamaConfig, read_config
from llama.model import Llama
from llama.rope_scaling import Rope, YarnRopeScaling
from lora.expert_group import ExpertGroup

YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": YARN,
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


def read(folder: Path, fields: dict[str, Any], *left_out: str) -> LlamaConfig:
    given = {name: value for name, value in fields.items() if name not in left_out}
    (folder / "config.json").write_text(json.dumps(given))
    return read_config(folder)


def test_the_published_config_is_read(tmp_path: Path) -> None:
    config = read(tmp_path, GPT_OSS_20B)
    assert config.windows == (128, None) * 12
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.has_sinks) == (True,) * 4
    assert config.activation == "clamped_swish"
    experts = config.experts
    assert experts is not None
    assert (experts.num_experts, experts.num_chosen, experts.width) == (32, 4, 2880)
    assert experts.is_normalized
    # 0.1 log(32) + 1
    yarn = YarnRopeScaling(32.0, 32.0, 1.0, 4096, 1.3465735902799727, truncate=False)
    assert config.distinct_ropes == [Rope(150000.0, yarn)]


def test_missing_fields_are_those_of_transformers_class(tmp_path: Path) -> None:
    names = ("attention_bias", "head_dim", "layer_types", "num_experts_per_tok", "rms_norm_eps")
    more = ("rope_scaling", "rope_theta", "sliding_window", "swiglu_limit", "num_key_value_heads")
    assert read(tmp_path, GPT_OSS_20B, *names, *more) == read(tmp_path, GPT_OSS_20B)
    # transformers 5 writes the frequency among the parameters, and null counts as missing
    others = {"rope_scaling": None, "rope_parameters": YARN | {"rope_theta": 150000}}
    assert read(tmp_path, GPT_OSS_20B | others) == read(tmp_path, GPT_OSS_20B)
    both = {"rope_scaling": None, "rope_parameters": None}
    assert read(tmp_path, GPT_OSS_20B | both) == read(tmp_path, GPT_OSS_20B)
    # an empty object is none
    plain = read(tmp_path, GPT_OSS_20B | {"rope_scaling": None, "rope_parameters": {}})
    assert plain.distinct_ropes == [Rope(150000.0)]
    assert read(tmp_path, GPT_OSS_20B | {"swiglu_alpha": 1.702}) == read(tmp_path, GPT_OSS_20B)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit must be 7, which is what is computed here: got 5"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha must be 1.702, which is what is computed here"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act must be one of silu"),
        ({"num_experts_per_tok": 33}, "at most the number of experts, 32: got 33"),
    ],
    ids=str,
)
def test_another_function_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, GPT_OSS_20B | fields)


def test_a_file_may_ask_for_the_auxiliary_loss(tmp_path: Path) -> None:
    for asks in (False, True):
        experts = read(tmp_path, GPT_OSS_20B | {"output_router_logits": asks}).experts
        assert experts is not None
        assert experts.asks_for_aux_loss == asks


def test_tensors_have_the_names_and_shapes_of_the_files(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Llama(read(tmp_path, FIELDS | VARIANTS["gpt-oss"]), torch.float32)
    names = TensorNames(parts=model.config.file_names)
    found = {names.in_files(name): tuple(p.shape) for name, p in model.named_parameters()}
    for prefix, group in model.frozen_groups():
        for suffix, shapes in ((".weight", group.shapes()), (".bias", group.bias_shapes())):
            found |= {names.in_files(f"{prefix}{n}{suffix}"): s for n, s in shapes.items()}
    layer = {
        name.removeprefix("model.layers.0."): shape
        for name, shape in found.items()
        if name.startswith("model.layers.0.") and "_proj" not in name.partition("self_attn")[2]
    }
    assert layer == {
        "self_attn.sinks": (4,),
        "mlp.router.weight": (4, 32),
        "mlp.router.bias": (4,),
        "mlp.experts.gate_up_proj": (4, 32, 48),
        "mlp.experts.gate_up_proj_bias": (4, 48),
        "mlp.experts.down_proj": (4, 24, 32),
        "mlp.experts.down_proj_bias": (4, 32),
        "input_layernorm.weight": (32,),
        "post_attention_layernorm.weight": (32,),
    }
    # names of attention's projections stay as they are
    assert found["model.layers.0.self_attn.q_proj.bias"] == (48,)
    for name in found:
        assert names.in_files(names.in_model(name)) == name
    assert sum(isinstance(group, ExpertGroup) for _, group in model.frozen_groups()) == 4
