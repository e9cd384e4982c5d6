"""config.json of published models, field by field, is read: none is refused for a field without
effect."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama.config import LlamaConfig, read_config

LLAVA_1_5_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
BAKLLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"model_type": "mistral", "vocab_size": 32064},
    "vision_config": {"model_type": "clip_vision_model"},
}
_QWEN2_5_VL = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_token_id": 151655,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_cache": True,
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
    "vocab_size": 152064,
}
# as transformers 4.53 saves it: each field around text_config and inside
QWEN2_5_VL_7B = _QWEN2_5_VL | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "text_config": _QWEN2_5_VL
    | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl_text",
        "layer_types": ["full_attention"] * 28,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.1",
    "vision_config": {"model_type": "qwen2_5_vl", "hidden_size": 1280},
}
PHI_4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 199999,
    "embd_pdrop": 0.0,
    "eos_token_id": 199999,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "phi3",
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [2.0] * 48,
        "short_factor": [1.0] * 48,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 200064,
}
COMMAND_R7B = {
    "architectures": ["Cohere2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 5,
    "cache_implementation": "hybrid",
    "eos_token_id": 255001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "layer_norm_eps": 1e-05,
    "layer_switch": 4,
    "logit_scale": 0.25,
    "max_position_embeddings": 8192,
    "model_type": "cohere2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first",
    "pad_token_id": 0,
    "position_embedding_type": "rope_gptj",
    "rope_scaling": None,
    "rope_theta": 50000,
    "rotary_pct": 1.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
    "vocab_size": 256000,
}
PIXTRAL_12B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "llava",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "is_composition": True,
        "max_position_embeddings": 1024000,
        "model_type": "mistral",
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "vision_config": {"model_type": "pixtral"},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}

MINISTRAL_3_8B = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 262144,
        "model_type": "ministral3",
        "num_attention_heads": 32,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 131072,
    },
    "transformers_version": "5.0.0.dev0",
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024},
    "vision_feature_layer": -1,
}


def read(folder: Path, fields: dict[str, Any]) -> LlamaConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    return read_config(folder)


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        (LLAVA_1_5_7B, (4096, 11_008, 32, 32, 32, 4096)),
        (BAKLLAVA, (4096, 14_336, 32, 32, 8, 131_072)),
        (QWEN2_5_VL_7B, (3584, 18_944, 28, 28, 4, 128_000)),
        (PHI_4_MINI, (3072, 8192, 32, 24, 8, 131_072)),
        (COMMAND_R7B, (4096, 14_336, 32, 32, 8, 8192)),
        (PIXTRAL_12B, (5120, 14_336, 40, 32, 8, 1_024_000)),
        (MINISTRAL_3_8B, (4096, 14_336, 34, 32, 8, 262_144)),
    ],
    ids=[
        "llava-1.5-7b",
        "bakllava",
        "qwen2.5-vl-7b",
        "phi-4-mini",
        "command-r7b",
        "pixtral-12b",
        "ministral-3-8b",
    ],
)
def test_a_published_models_config_is_read(
    tmp_path: Path, fields: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    config = read(tmp_path, fields)
    assert sizes == (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.max_position_embeddings,
    )


def test_a_name_that_the_family_does_not_read_changes_nothing(tmp_path: Path) -> None:
    given = read(tmp_path, COMMAND_R7B | {"rms_norm_eps": 0.5})
    assert given == read(tmp_path, COMMAND_R7B)
    without = {k: v for k, v in COMMAND_R7B.items() if k != "layer_norm_eps"}
    assert read(tmp_path, without | {"rms_norm_eps": 0.5}) == given


def test_yarn_is_longrope_in_phi_alone(tmp_path: Path) -> None:
    rope = PHI_4_MINI["rope_scaling"]
    assert read(tmp_path, PHI_4_MINI | {"rope_scaling": rope | {"type": "yarn"}}) == read(
        tmp_path, PHI_4_MINI
    )
    text = PIXTRAL_12B["text_config"]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256_000}
    longer = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    assert read(
        tmp_path, PIXTRAL_12B | {"text_config": text | {"rope_scaling": yarn | longer}}
    ) == read(tmp_path, PIXTRAL_12B | {"text_config": text | {"rope_scaling": yarn}})


def test_the_length_of_the_first_training_may_be_given_outside(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    inside = COMMAND_R7B | {"rope_scaling": yarn | {"original_max_position_embeddings": 2048}}
    outside = COMMAND_R7B | {"rope_scaling": yarn, "original_max_position_embeddings": 2048}
    assert read(tmp_path, outside) == read(tmp_path, inside)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # the class for images does not cap its logits
        (
            {
                "architectures": ["Gemma3ForConditionalGeneration"],
                "model_type": "gemma3",
                "text_config": {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
            },
            "text_config must hold fields that Gemma3ForConditionalGeneration has: "
            "got final_logit_softcapping = 30.0",
        ),
        (PHI_4_MINI | {"partial_rotary_factor": None}, "must be a number or absent: got null"),
        (
            PHI_4_MINI | {"original_max_position_embeddings": 1},
            "original_max_position_embeddings must be at least 2: got 1",
        ),
    ],
)
def test_what_would_be_another_function_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, fields)
