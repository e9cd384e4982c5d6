"""Tiny random Llama checkpoints for the tests of llama/ and lora/, written without the product's
code."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FIELDS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# what a checkpoint may have, in Llama's family and in others; the rope scaling bends at 16 tokens,
# and windows are of 8, so tests of 40 see them
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3-rope": {
        "head_dim": 12,
        "num_key_value_heads": 1,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "linear-rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    # of a first training on 64 tokens, over which some pairs of dimensions turn often, some not
    "yarn": {
        "head_dim": 12,
        "rope_theta": 100.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 8,
    },
    "ministral": {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "head_dim": 12,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # queries have other factors from 8 tokens on
    "ministral3": {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.7,
        },
    },
    "internlm3": {
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "head_dim": 12,
        "qkv_bias": True,
        "bias": True,
    },
    "seed-oss": {
        "architectures": ["SeedOssForCausalLM"],
        "model_type": "seed_oss",
        "pad_token_id": 0,
        "head_dim": 12,
        "attention_bias": True,
        "attention_out_bias": False,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    "ernie4.5": {
        "architectures": ["Ernie4_5ForCausalLM"],
        "model_type": "ernie4_5",
        "pad_token_id": 0,
        "head_dim": 12,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "pad_token_id": 0,
        "sliding_window": 8,
        # sequences of 40 are long, those of the first 16 tokens not
        "original_max_position_embeddings": 16,
        # of 8 dimensions 6 turn, as in Phi-4-mini
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.5],
            "long_factor": [1.0, 2.0, 4.0],
        },
    },
    # the whole of each head turns, in interleaved pairs
    "glm": {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "pad_token_id": 0,
        "head_dim": 12,
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
    },
    "glm4": {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "pad_token_id": 0,
        "head_dim": 12,
        "attention_bias": True,
    },
    "olmo2": {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "pad_token_id": 0,
        "attention_bias": True,
    },
    "olmo3": {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "pad_token_id": 0,
        # of the layers without a window
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.2,
        },
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "exaone4": {
        "architectures": ["Exaone4ForCausalLM"],
        "model_type": "exaone4",
        "head_dim": 12,
        "sliding_window": 8,
        # as the 32B model has it, beside layer_types
        "sliding_window_pattern": "LLLG",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "command-r": {
        "architectures": ["CohereForCausalLM"],
        "model_type": "cohere",
        "pad_token_id": 0,
        # beside rms_norm_eps, which this family does not have
        "layer_norm_eps": 1e-2,
        "logit_scale": 0.3,
        "tie_word_embeddings": True,
    },
    "command-r7b": {
        "architectures": ["Cohere2ForCausalLM"],
        "model_type": "cohere2",
        "pad_token_id": 0,
        "attention_bias": True,
        "layer_norm_eps": 1e-2,
        "logit_scale": 0.3,
        "tie_word_embeddings": False,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        # large enough to be seen beside a residual stream of several units
        "rms_norm_eps": 0.5,
        # none of them a power of two
        "embedding_multiplier": 3.3,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.4,
        "logits_scaling": 0.7,
    },
    "gemma": {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "pad_token_id": 0,
        "hidden_act": "gelu",
        "head_dim": 12,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "pad_token_id": 0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 12,
        "sliding_window": 8,
        # scores and logits are of order one: caps near it bend most of them
        "query_pre_attn_scalar": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 12,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    # the first layer sees a window, the second everything, each with its own rotary positions
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "pad_token_id": 0,
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 12,
        "attention_bias": True,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "query_pre_attn_scalar": 6,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    # the second layer sees everything: its heads are wider, their keys are the values too, and a
    # quarter of each turns
    "gemma4": {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "pad_token_id": 0,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "head_dim": 12,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "attention_bias": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.25,
                "factor": 2.0,
            },
        },
        "final_logit_softcapping": 3.0,
        "use_bidirectional_attention": "vision",
        "tie_word_embeddings": True,
    },
    # the second layer does not rotate its heads, and sees a window
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "pad_token_id": 0,
        "no_rope_layer_interval": 2,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 4.0,
        },
        "use_sliding_window": True,
        "sliding_window": 8,
        "tie_word_embeddings": True,
    },
    # the first layer has one MLP
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 12,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "pad_token_id": 0,
        "attention_bias": True,
        "intermediate_size": 24,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "head_dim": 12,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    # one tensor has all experts
    "granite-moe": {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "rms_norm_eps": 0.5,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 3.3,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.4,
        "logits_scaling": 0.7,
    },
    # the first layer sees a window, the second everything
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "pad_token_id": 0,
        "head_dim": 12,
        "attention_bias": True,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_theta": 100.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 32,
            "truncate": False,
        },
        "swiglu_limit": 7.0,
    },
}

MIXTURES = [name for name, fields in VARIANTS.items() if "num_experts_per_tok" in fields]

NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
NORMS_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
OTHER_NORMS = {
    "gemma2": GEMMA_NORMS,
    "gemma3_text": GEMMA_NORMS,
    "gemma4_text": GEMMA_NORMS,
    "glm4": (*NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
    "olmo2": NORMS_BEHIND,
    "olmo3": NORMS_BEHIND,
    "exaone4": NORMS_BEHIND,
    "cohere": NORMS[:1],
    "cohere2": NORMS[:1],
}
NORMS_OF_HEADS = {"qwen3", "qwen3_moe", "gemma3_text", "gemma4_text"}
NORMS_OF_HEADS |= {"olmo2", "olmo3", "olmoe", "exaone4"}
# what says whether q, k and v have biases, o has one, and the MLP has
BIAS_FIELDS = ("attention_bias", "attention_bias", "mlp_bias")
OTHER_BIAS_FIELDS = {
    "glm": ("attention_bias", "no field", "no field"),
    "glm4": ("attention_bias", "no field", "no field"),
    "seed_oss": ("attention_bias", "attention_out_bias", "mlp_bias"),
    "internlm3": ("qkv_bias", "bias", "bias"),
    "ernie4_5": ("use_bias", "use_bias", "use_bias"),
}


def _experts_apart(
    fields: dict[str, Any], block: str, names: tuple[str, str, str]
) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer's router and its experts, three of each."""
    D = fields["hidden_size"]
    inner = fields.get("moe_intermediate_size", fields["intermediate_size"])
    count = fields["num_experts" if "num_experts" in fields else "num_local_experts"]
    found: dict[str, tuple[int, ...]] = {f"{block}.gate": (count, D)}
    for expert in range(count):
        of_one = ((inner, D), (inner, D), (D, inner))
        for name, shape in zip(names, of_one, strict=True):
            found[f"{block}.experts.{expert}.{name}"] = shape
    return found


def _experts_stacked(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer's router and its experts, gate and up together."""
    D, inner, count = (
        fields[name] for name in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    return {
        "block_sparse_moe.router.layer": (count, D),
        "block_sparse_moe.input_linear": (count, 2 * inner, D),
        "block_sparse_moe.output_linear": (count, D, inner),
    }


def _experts_by_columns(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer's router and its experts, with biases, whose matrices lie by columns
    and have names of their own."""
    D, inner, count = (
        fields[name] for name in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    return {
        "mlp.router.weight": (count, D),
        "mlp.router.bias": (count,),
        "mlp.experts.gate_up_proj": (count, D, 2 * inner),
        "mlp.experts.gate_up_proj_bias": (count, 2 * inner),
        "mlp.experts.down_proj": (count, inner, D),
        "mlp.experts.down_proj_bias": (count, D),
        "self_attn.sinks": (fields["num_attention_heads"],),
    }


_PROJ = ("gate_proj", "up_proj", "down_proj")
EXPERT_SHAPES: dict[str, Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]] = {
    "qwen3_moe": lambda fields: _experts_apart(fields, "mlp", _PROJ),
    "olmoe": lambda fields: _experts_apart(fields, "mlp", _PROJ),
    "mixtral": lambda fields: _experts_apart(fields, "block_sparse_moe", ("w1", "w3", "w2")),
    "granitemoe": _experts_stacked,
    "gpt_oss": _experts_by_columns,
}


def _sees_window(fields: dict[str, Any], layer: int) -> bool:
    return fields["layer_types"][layer] == "sliding_attention"


def _widths(fields: dict[str, Any], layer: int) -> tuple[int, int, int]:
    """Numbers of all queries of a layer, of its keys, and of a head."""
    own = dict(fields)
    if "global_head_dim" in fields and not _sees_window(fields, layer):
        own["head_dim"] = fields["global_head_dim"]
        own["num_key_value_heads"] = fields["num_global_key_value_heads"]
    head_dim = own.get("head_dim", own["hidden_size"] // own["num_attention_heads"])
    return own["num_attention_heads"] * head_dim, own["num_key_value_heads"] * head_dim, head_dim


def shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with these config fields."""
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (fields["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not fields["tie_word_embeddings"]:
        found["lm_head.weight"] = (fields["vocab_size"], hidden)
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    kind = fields["model_type"]
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        queries, keys, head_dim = _widths(fields, layer)
        attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden)}
        attention["o"] = (hidden, queries)
        if kind == "gemma4_text":
            found[f"{prefix}layer_scalar"] = (1,)
        if fields.get("attention_k_eq_v") and not _sees_window(fields, layer):
            del attention["v"]
        for name in OTHER_NORMS.get(kind, NORMS):
            found[f"{prefix}{name}.weight"] = (hidden,)
        if kind in NORMS_OF_HEADS:
            is_joint = kind.startswith("olmo")
            found[f"{prefix}self_attn.q_norm.weight"] = (queries if is_joint else head_dim,)
            found[f"{prefix}self_attn.k_norm.weight"] = (keys if is_joint else head_dim,)
        halves = (tuple("qkv"), tuple("o"), tuple(mlp))
        names = OTHER_BIAS_FIELDS.get(kind, BIAS_FIELDS)
        biased = {m for some, n in zip(halves, names, strict=True) if fields.get(n) for m in some}
        biased |= set("qkv") if kind == "qwen2" else set()
        if kind == "phi3":
            attention = {"qkv": (queries + 2 * keys, hidden), "o": attention["o"]}
        if kind in ("phi3", "glm", "glm4"):
            mlp = {"gate_up": (2 * inner, hidden), "down": mlp["down"]}
        blocks = {"self_attn": attention, "mlp": mlp}
        if kind in EXPERT_SHAPES and layer not in fields.get("mlp_only_layers", ()):
            del blocks["mlp"]
            suffix = "" if kind == "gpt_oss" else ".weight"
            found |= {f"{prefix}{n}{suffix}": s for n, s in EXPERT_SHAPES[kind](fields).items()}
        for block, members in blocks.items():
            for name, shape in members.items():
                found[f"{prefix}{block}.{name}_proj.weight"] = shape
                if name in biased:
                    found[f"{prefix}{block}.{name}_proj.bias"] = shape[:1]
    return found


def random_tensors(
    fields: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Draw a checkpoint's tensors so that every activation is of order one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(fields).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            # Gemma adds the one itself, before its fourth version
            is_offset = fields["model_type"] in ("gemma", "gemma2", "gemma3_text")
            tensor = (not is_offset) + 0.1 * noise
        elif name.endswith("layer_scalar"):
            tensor = 0.6 + 0.1 * noise
        elif name == "model.embed_tokens.weight" or len(shape) == 1:
            tensor = noise
        elif name.endswith("_proj_bias"):
            # of experts: some of what gpt-oss clamps exceeds 7
            tensor = 5 * noise
        else:
            columns = -2 if name.endswith(".experts.gate_up_proj") else -1
            tensor = noise / math.sqrt(shape[columns])
        tensors[name] = tensor.to(dtype)
    return tensors


def write_checkpoint(
    folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor], num_shards: int = 1
) -> Path:
    """Write config.json and the tensors, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::num_shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_variant(
    folder: Path, variant: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write the checkpoint of one of VARIANTS, with other config fields than that has."""
    fields = FIELDS | VARIANTS[variant] | changes
    return write_checkpoint(folder, fields, random_tensors(fields, dtype))


def deeper(variant: str, num_layers: int) -> dict[str, Any]:
    """The config fields of one of VARIANTS with more layers, in the order that its layers have."""
    fields = FIELDS | VARIANTS[variant]
    fields["num_hidden_layers"] = num_layers
    if "layer_types" in fields:
        fields["layer_types"] = (fields["layer_types"] * num_layers)[:num_layers]
    return fields


def float32_error(truth: Tensor, num_operations: int) -> Tensor:
    """What float32 may lose on a path of `num_operations` rounded sums of at most 96 terms.

    Each errs by sqrt(96) half units at random, and so do they together.
    """
    return math.sqrt(num_operations * 96) * torch.finfo(torch.float32).eps * truth.abs().max()
