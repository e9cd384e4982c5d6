"""llama/config.py: what is read from config.json, and what is refused rather than ignored."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from support.tiny_llama import FIELDS, VARIANTS

from llama.config import LlamaConfig, read_config
from llama.rope_scaling import (
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    Rope,
    YarnRopeScaling,
)

LLAMA3 = VARIANTS["llama3-rope"]["rope_scaling"]
YARN = VARIANTS["yarn"]["rope_scaling"]
GEMMA2 = VARIANTS["gemma2"]
MISTRAL, QWEN2, PHI3 = VARIANTS["mistral"], VARIANTS["qwen2"], VARIANTS["phi3"]


def read(folder: Path, **changes: Any) -> LlamaConfig:
    (folder / "config.json").write_text(json.dumps(FIELDS | changes))
    return read_config(folder)


def test_every_field_is_read_under_its_name(tmp_path: Path) -> None:
    config = read(tmp_path, **VARIANTS["llama3-rope"], **VARIANTS["biases"])
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        assert getattr(config, name) == FIELDS[name]
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 1, 12)
    assert config.rms_norm_eps == 1e-5
    assert config.ropes == (Rope(500000.0, Llama3RopeScaling(8.0, 1.0, 4.0, 16)),) * 2
    assert config.max_position_embeddings == 128
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (1, 1, 1)
    assert (config.tie_word_embeddings, config.qk_norm) == (0, 0)
    assert config.windows == (None, None)
    assert config.eos_token_ids == (2,)


def test_absent_and_null_fields_have_transformers_defaults(tmp_path: Path) -> None:
    optional = ("num_key_value_heads", "hidden_act", "rope_theta", "tie_word_embeddings")
    nulls: dict[str, Any] = dict.fromkeys((*optional, "head_dim", "rope_scaling", "eos_token_id"))
    config = read(tmp_path, **nulls)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert config.ropes == (Rope(10000.0),) * 2
    assert (config.tie_word_embeddings, config.eos_token_ids) == (False, ())
    (tmp_path / "config.json").write_text(
        json.dumps({name: value for name, value in FIELDS.items() if name not in optional} | nulls)
    )
    assert read_config(tmp_path) == config


def test_rope_parameters_of_transformers_5_mean_the_same(tmp_path: Path) -> None:
    old = read(tmp_path, rope_theta=500000.0, rope_scaling=LLAMA3)
    inside = LLAMA3 | {"rope_theta": 500000.0}
    assert read(tmp_path, rope_theta=None, rope_parameters=inside) == old
    assert read(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 3e4}) == read(
        tmp_path, rope_theta=30000
    )


def test_the_old_key_type_names_the_rope_type(tmp_path: Path) -> None:
    scaling = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}
    assert read(tmp_path, rope_scaling=scaling) == read(tmp_path, rope_scaling=LLAMA3)


def test_generation_config_decides_the_stop_tokens_where_it_has_them(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": [5, 6]}')
    assert read(tmp_path).eos_token_ids == (5, 6)
    path.write_text('{"temperature": 0.6}')
    assert read(tmp_path).eos_token_ids == (2,)
    assert read(tmp_path, eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    path.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a token"):
        read(tmp_path)


def test_fields_without_effect_are_ignored(tmp_path: Path) -> None:
    harmless = {"pretraining_tp": 2, "use_cache": False, "initializer_range": 0.5}
    harmless |= {"unsloth_version": "2025.3", "temperature": 0.6, "_attn_implementation": "eager"}
    harmless |= {"is_causal": True, "pruned_heads": {}, "per_layer_config": None}
    assert read(tmp_path, **harmless, attention_dropout=0.0, torch_dtype="bfloat16") == read(
        tmp_path
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "must describe one of the architectures Llama"),
        ({"architectures": ["LlamaForCausalLM"] * 2}, "must describe one of the architectures"),
        ({"architectures": "LlamaForCausalLM"}, "must describe one of the architectures Llama"),
        (
            {"model_type": "mistral"},
            "model_type must be 'llama' or 'internlm3' with LlamaForCausalLM: got 'mistral'",
        ),
        ({"model_type": []}, "with LlamaForCausalLM: got []"),
        ({"qkv_bias": True}, "must hold fields that LlamaForCausalLM has: got qkv_bias"),
        (
            VARIANTS["internlm3"] | {"bias": 1},
            "bias must be what is said of attention_bias, True: got 1",
        ),
        (VARIANTS["internlm3"] | {"qkv_bias": False}, "said of attention_bias, False: got True"),
        (VARIANTS["internlm3"] | {"attention_bias": False}, "attention_bias, False: got True"),
        ({"logits_scaling": 8.0}, "must hold fields that LlamaForCausalLM has: got logits_sca"),
        (
            VARIANTS["granite"] | {"residual_multiplier": 0},
            "residual_multiplier must be a positive number: got 0",
        ),
        (VARIANTS["command-r"] | {"use_qk_norm": True}, "got use_qk_norm = True; remove it or"),
        (VARIANTS["command-r"] | {"layer_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        (VARIANTS["gemma"] | {"hidden_act": "relu"}, "hidden_act must be one of gelu, silu"),
        (
            {"architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
            "got ['Mine'] (model_type 'llama'); code that auto_map names is never run",
        ),
        ({"attn_logit_softcapping": 50.0}, "got attn_logit_softcapping = 50.0; remove it or"),
        ({"qkv_clip": 8.0}, "got qkv_clip = 8.0; remove it or set it to null, which is safe if"),
        # a field of another family
        (
            {"sliding_window": 4096},
            "must hold fields that LlamaForCausalLM has: got sliding_window",
        ),
        (MISTRAL | {"sliding_window": -1}, "sliding_window must be a positive integer: got -1"),
        (MISTRAL | {"attention_bias": True}, "got attention_bias = True"),
        (
            MISTRAL | {"layer_types": ["full_attention"] * 2},
            "layer_types must be sliding_attention for all layers of this family: got ['full",
        ),
        (QWEN2 | {"layer_types": ["full_attention"]}, "for each of 2 layers"),
        (QWEN2 | {"layer_types": ["chunked", "chunked"]}, "layer_types must name one of"),
        (
            QWEN2 | {"sliding_window": None, "layer_types": ["sliding_attention"] * 2},
            "sliding_window must be given with sliding layers",
        ),
        ({"architectures": None}, "got None"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of silu, gelu_pytorch_tanh: got 'gelu'"),
        (GEMMA2 | {"hidden_activation": "relu"}, "hidden_activation must be one of silu"),
        (
            GEMMA2 | {"sliding_window": None},
            "sliding_window must be the tokens of a window: got null",
        ),
        (QWEN2 | {"max_window_layers": None}, "max_window_layers must be an integer: got None"),
        (
            GEMMA2 | {"use_bidirectional_attention": True},
            "use_bidirectional_attention must be false or absent: got true",
        ),
        ({"is_causal": False}, "is_causal must be true or absent: got false"),
        # transformers takes it for false
        (MISTRAL | {"is_causal": None}, "is_causal must be true or absent: got null"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads must be {} or absent: got "),
        ({"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config must be null or"),
        ({"transformers_weights": "x.safetensors"}, "transformers_weights must be null or absent"),
        (
            GEMMA2 | {"attn_logit_softcapping": 0},
            "attn_logit_softcapping must be a positive number",
        ),
        (GEMMA2 | {"final_logit_softcapping": "30"}, "final_logit_softcapping must be a positive"),
        (GEMMA2 | {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar must be a positive number"),
        ({"rope_scaling": {"type": "linear"}}, "must give factor: the key is missing"),
        (PHI3 | {"rope_scaling": {"type": "longrope"}}, "short_factor must be 3 positive numbers"),
        (
            PHI3 | {"rope_scaling": PHI3["rope_scaling"] | {"long_factor": [1.0, 0.0, 1.0]}},
            "long_factor must be 3 positive numbers: got [1.0, 0.0, 1.0]",
        ),
        ({"rope_parameters": {"rope_type": "axial"}}, "llama3, longrope or yarn: got 'axial'"),
        ({"rope_scaling": YARN | {"factor": -2.0}}, "factor must be a positive number: got -2.0"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "must be above beta_slow, and both within"),
        (
            {"rope_scaling": YARN | {"beta_slow": 1e-9}},
            "within 1e-06 and 1e+06: got 32.0",
        ),
        ({"rope_scaling": YARN | {"beta_fast": 1e9}}, "within 1e-06 and 1e+06: got 1000000000.0"),
        ({"rope_scaling": YARN | {"rope_theta": 1.0}}, "rope_theta must be above 1 with yarn"),
        ({"rope_scaling": YARN | {"truncate": 0}}, "truncate must be true or false: got 0"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 32},
            "must be the same inside rope_scaling and outside: got 64 and 32",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set of parameters"),
        ({"rope_scaling": [8.0]}, "one set of parameters"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1.0}}, "must agree"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be absent or 1: got 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "must give factor: the key is missing"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor must be a positive number: got '8'"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "must be above low_freq_factor"),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
            "must be the same inside rope_scaling and outside: got 16 and 64",
        ),
        ({"hidden_size": None}, "must give hidden_size: the key is missing"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer: got '32'"),
        ({"hidden_size": 32.5}, "hidden_size must be a positive integer: got 32.5"),
        ({"vocab_size": True}, "vocab_size must be a positive integer: got True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer: got 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number: got 'small'"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number: got nan"),
        ({"tie_word_embeddings": "false"}, "must be true or false: got 'false'"),
        ({"attention_bias": 1}, "attention_bias must be true or false: got 1"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id must be a token id or a list of them"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads: got 4 and 3"),
        ({"vocab_size": 10**18}, "vocab_size must be at most 16,777,216: got 1000000000000000000"),
        ({"hidden_size": 10**18}, "hidden_size must be at most 16,777,216: got"),
        ({"intermediate_size": 10**400}, "intermediate_size must be at most 16,777,216: got"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1,000: got 1000000000"),
        ({"num_attention_heads": 10**9}, "num_attention_heads must be at most 65,536: got"),
        ({"num_key_value_heads": 10**9}, "num_key_value_heads must be at most 65,536: got"),
        ({"head_dim": 10**9}, "head_dim must be at most 65,536: got 1000000000"),
        ({"max_position_embeddings": 1 << 31}, "must be at most 2,147,483,647: got 2147483648"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number: got 1000"),
        ({"architectures": [[]]}, "must describe one of the architectures"),
        ({"architectures": [{}]}, "must describe one of the architectures"),
        ({"hidden_act": []}, "hidden_act must be one of silu, gelu_pytorch_tanh: got []"),
        ({"hidden_act": {"a": 1}}, "hidden_act must be one of silu, gelu_pytorch_tanh: got {'a"),
        ({"layer_types": [[], {}]}, "layer_types must name one of full_attention, sliding_attent"),
        (VARIANTS["qwen2"] | {"max_window_layers": "1"}, "max_window_layers must be an integer"),
        ({"head_dim": 7}, "because rotary positions turn pairs: got 7"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:40].strip("-"),
)
def test_what_the_model_does_not_compute_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(raised.value)


@pytest.mark.parametrize("described", [None, {"quant_method": "fp8"}, "awq", {}], ids=str)
def test_a_quantization_config_does_not_change_the_model(tmp_path: Path, described: Any) -> None:
    plain = read(tmp_path)
    assert read(tmp_path, quantization_config=described) == plain


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"must hold config.json: none in {tmp_path}$"):
        read_config(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"is an adapter's: .* --init-adapter in train\.py"):
        read_config(tmp_path)
    for content, message in (("{", "must be JSON"), ("[1]", "must hold a JSON object: got a list")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)


def test_families_differ_in_their_fields(tmp_path: Path) -> None:
    mistral = read(tmp_path, **MISTRAL)
    assert mistral.windows == (8, 8)
    assert (mistral.qkv_bias, mistral.o_bias, mistral.qk_norm) == (False, False, False)
    # absent is transformers' default, null is none
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in (FIELDS | MISTRAL).items() if k != "sliding_window"})
    )
    assert read_config(tmp_path).windows == (4096, 4096)
    assert read(tmp_path, **MISTRAL | {"sliding_window": None}).windows == (None, None)
    ministral = VARIANTS["ministral"]
    assert read(tmp_path, **ministral).windows == (8, None)
    assert read(tmp_path, **ministral | {"layer_types": None}).windows == (8, 8)
    qwen2 = read(tmp_path, **QWEN2)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.windows) == (True, False, (None, 8))
    assert read(tmp_path, **QWEN2 | {"use_sliding_window": False}).windows == (None, None)
    kinds = ["sliding_attention", "full_attention"]
    assert read(tmp_path, **QWEN2 | {"layer_types": kinds}).windows == (8, None)
    qwen3 = read(tmp_path, **VARIANTS["qwen3"])
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 12)
    assert read(tmp_path, **VARIANTS["qwen3"] | {"head_dim": None}).head_dim == 128


def test_biases_have_the_names_that_a_family_gives_them(tmp_path: Path) -> None:
    def biases(variant: str, **changes: Any) -> tuple[bool, bool, bool]:
        config = read(tmp_path, **VARIANTS[variant] | changes)
        return config.qkv_bias, config.o_bias, config.mlp_bias

    assert biases("seed-oss", attention_bias=None, attention_out_bias=True) == (False, True, False)
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in (FIELDS | VARIANTS["seed-oss"]).items() if k[-4:] != "bias"})
    )
    assert read_config(tmp_path).qkv_bias
    assert biases("internlm3") == (True, True, True)
    assert biases("internlm3", bias=False, qkv_bias=False) == (False, False, False)
    # as transformers writes it
    names = {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True}
    resaved = read(tmp_path, model_type="internlm3", head_dim=12, **names)
    assert resaved == read(tmp_path, **VARIANTS["internlm3"])
    # null is the width of the model over its heads, and absent is not
    for variant in ("internlm3", "seed-oss", "ernie4.5"):
        assert read(tmp_path, **VARIANTS[variant] | {"head_dim": None}).head_dim == 8


def test_ernies_dense_model_has_transformers_defaults(tmp_path: Path) -> None:
    ernie = VARIANTS["ernie4.5"]
    config = read(tmp_path, **ernie)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, True)
    assert (config.is_interleaved, config.rotary_dim) == (True, 12)
    left_out = ("use_bias", "head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings")
    bare = {key: value for key, value in (FIELDS | ernie).items() if key not in left_out}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    config = read_config(tmp_path)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)
    assert (config.head_dim, config.num_key_value_heads) == (128, 2)
    assert (config.ropes[0], config.tie_word_embeddings) == (Rope(5e5), True)


def test_granite_multiplies(tmp_path: Path) -> None:
    granite = read(tmp_path, **VARIANTS["granite"])
    assert (granite.embedding_scale, granite.embedding_multiplier) == (1.0, 3.3)
    assert (granite.residual_multiplier, granite.score_scale) == (0.22, 0.4)
    assert granite.logit_scale == 1 / 0.7
    own = ("architectures", "model_type")
    bare = read(tmp_path, **{key: VARIANTS["granite"][key] for key in own})
    # transformers' default, which is not the root's reciprocal
    assert bare.score_scale == 1.0
    llama = read(tmp_path)
    assert llama.score_scale == 1 / math.sqrt(8)
    for name in ("embedding_multiplier", "residual_multiplier", "logit_scale"):
        assert getattr(bare, name) is getattr(llama, name) is None


def test_command_r_centres_and_has_one_input_for_both_halves(tmp_path: Path) -> None:
    for variant, theta in (("command-r", 5e5), ("command-r7b", 1e4)):
        fields = FIELDS | VARIANTS[variant]
        config = read(tmp_path, **VARIANTS[variant])
        assert (config.has_centred_norms, config.is_parallel, config.is_interleaved) == (1, 1, 1)
        assert (config.rms_norm_eps, config.logit_scale) == (1e-2, 0.3)
        assert config.norms.before_attention == config.norms.before_mlp == "input_layernorm"
        own = ("layer_norm_eps", "rms_norm_eps", "logit_scale", "rope_theta", "tie_word_embeddings")
        bare = {name: value for name, value in fields.items() if name not in own}
        (tmp_path / "config.json").write_text(json.dumps(bare))
        config = read_config(tmp_path)
        assert (config.rms_norm_eps, config.logit_scale) == (1e-5, 0.0625)
        assert config.tie_word_embeddings
        assert config.ropes[0] == Rope(theta)
    # Command-R7B's global layers have no rotary positions
    assert config.ropes[1] is None
    llama = read(tmp_path)
    assert (llama.has_centred_norms, llama.is_parallel) == (False, False)


def test_gemma_calls_its_activation_by_two_names(tmp_path: Path) -> None:
    for name in ("gelu", "gelu_pytorch_tanh", None):
        gemma = read(tmp_path, **VARIANTS["gemma"] | {"hidden_act": name})
        assert gemma.activation == "gelu_tanh"
    assert (gemma.norm_offset, gemma.embedding_scale, gemma.head_dim) == (1.0, math.sqrt(32), 12)
    assert gemma.attn_logit_softcapping is None


def test_gemma_2_has_its_own_defaults(tmp_path: Path) -> None:
    gemma2 = read(tmp_path, **GEMMA2)
    assert (gemma2.windows, gemma2.activation) == ((8, None), "gelu_tanh")
    assert (gemma2.norm_offset, gemma2.embedding_scale) == (1.0, math.sqrt(32))
    assert (gemma2.query_pre_attn_scalar, gemma2.head_dim) == (6, 12)
    assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (2.0, 3.0)
    assert gemma2.norms.before_mlp == "pre_feedforward_layernorm"
    assert read(tmp_path, **GEMMA2 | {"layer_types": ["full_attention"] * 2}).windows == (None,) * 2
    # null is no cap, absent is transformers' default
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    assert read(tmp_path, **GEMMA2 | uncapped).attn_logit_softcapping is None
    own = ("architectures", "model_type")
    bare = {
        key: FIELDS[key] for key in FIELDS if key not in GEMMA2 and key != "num_key_value_heads"
    }
    (tmp_path / "config.json").write_text(json.dumps(bare | {key: GEMMA2[key] for key in own}))
    gemma2 = read_config(tmp_path)
    assert (gemma2.num_key_value_heads, gemma2.head_dim, gemma2.query_pre_attn_scalar) == (
        4,
        256,
        256,
    )
    assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (50.0, 30.0)
    assert (gemma2.windows, gemma2.tie_word_embeddings) == ((4096, None), True)
    # other families score as ever, and add what their halves give
    llama = read(tmp_path)
    assert (llama.query_pre_attn_scalar, llama.attn_logit_softcapping) == (8, None)
    assert (llama.norms.behind_attention, llama.norms.behind_mlp) == (None, None)
    assert (llama.norm_offset, llama.embedding_scale, llama.activation) == (0, 1, "silu")


def test_rope_scalings_are_read(tmp_path: Path) -> None:
    linear = read(tmp_path, rope_scaling={"type": "linear", "factor": 4})
    assert linear.ropes == (Rope(10000.0, LinearRopeScaling(4.0)),) * 2
    # it begins beyond the positions that the model has
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    assert read(tmp_path, rope_scaling=dynamic).ropes == (Rope(10000.0),) * 2
    # the names of Phi-3's files in time
    for name in ("su", "yarn"):
        renamed = PHI3 | {"rope_scaling": PHI3["rope_scaling"] | {"type": name}}
        assert read(tmp_path, **renamed) == read(tmp_path, **PHI3)
    long = read(tmp_path, **PHI3)
    factor = math.sqrt(1 + math.log(128 / 16) / math.log(16))
    short, longer = (tuple(PHI3["rope_scaling"][f"{name}_factor"]) for name in ("short", "long"))
    assert long.ropes == (Rope(10000.0, LongRopeScaling(short, longer, 16, factor)),) * 2
    # a sequence as long as those of the first training is not long yet
    assert [long.is_long(num_tokens) for num_tokens in (16, 17)] == [False, True]
    assert (long.is_fused, long.qkv_bias, long.windows) == (True, False, (8, 8))


@pytest.mark.parametrize(
    ("changes", "factor", "attention_factor"),
    [
        ({}, 4.0, (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"mscale": None}, 4.0, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.25}, 4.0, 1.25),
        # max_position_embeddings is 128
        ({"factor": None, "mscale": None}, 2.0, 0.1 * math.log(2) + 1),
        ({"factor": 1.0}, 1.0, 1.0),
    ],
)
def test_yarn_is_read(
    tmp_path: Path, changes: dict[str, Any], factor: float, attention_factor: float
) -> None:
    (rope,) = read(tmp_path, rope_scaling=YARN | changes).distinct_ropes
    assert rope == Rope(
        10000.0, YarnRopeScaling(factor, 32.0, 1.0, 64, attention_factor, truncate=False)
    )


def test_real_configs_are_read(assets: Path) -> None:
    num_read = 0
    for path in sorted(assets.glob("configs/*/config.json")):
        fields = json.loads(path.read_text())
        config = read_config(path.parent)
        num_read += 1
        assert config.hidden_size == fields["hidden_size"]
        (rope,) = config.distinct_ropes
        assert rope is not None
        assert (rope.scaling is None) == (not fields.get("rope_scaling"))
        # the others' windows are as long as their positions, or not used
        windows = {"Mistral-7B-v0.1": {4096}, "Phi-3.5-mini-instruct": {262144}}
        windows |= {name: {4096, None} for name in ("gemma-2-2b", "gemma-2-9b")}
        assert set(config.windows) == windows.get(path.parent.name, {None})
    assert num_read > 20
