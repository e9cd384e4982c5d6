"""The model families that share one model here, and how each differs from Llama.

A family is what transformers calls an architecture. Its differences are fields: the model asks what
a layer has, never which family it is. A field of config.json that no list here names is refused if
it is set, because it might change the function.
"""

from dataclasses import replace

from llama.family import ACTIVATION_NAMES, Family, LayerNorms
from llama.mixtures import MIXTURES, MULTIPLIERS, WINDOW_FIELDS
from llama.rope_scaling import PROPORTIONAL, SHARE

NORMS_BEHIND = LayerNorms(
    before_attention=None,
    behind_attention="post_attention_layernorm",
    before_mlp=None,
    behind_mlp="post_feedforward_layernorm",
)
_GEMMA_NORMS = LayerNorms(
    behind_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    behind_mlp="post_feedforward_layernorm",
)
_GLM = Family(
    "glm",
    o_bias=False,
    is_mlp_fused=True,
    head_dim=128,
    rotary_share=0.5,
    is_interleaved=True,
    defaults={
        "num_key_value_heads": 2,
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    },
    fields=frozenset({"attention_bias"}),
)
_GEMMA4 = Family(
    "gemma4_text",
    qk_norm=True,
    has_value_norm=True,
    head_dim=256,
    heads="by window",
    windows="pattern but last",
    ropes="by window",
    rope_types={PROPORTIONAL: PROPORTIONAL},
    activation_field="hidden_activation",
    norms=_GEMMA_NORMS,
    scales_embeddings=True,
    has_layer_scalar=True,
    rope_default={
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": PROPORTIONAL, "rope_theta": 1e6, SHARE: 0.25},
    },
    defaults={
        "num_key_value_heads": 4,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
        # scores are as they are
        "query_pre_attn_scalar": 1,
        "tie_word_embeddings": True,
        "hidden_size_per_layer_input": 256,
    },
    fields=frozenset(
        {
            "attention_bias",
            "attention_k_eq_v",
            "enable_moe_block",
            "final_logit_softcapping",
            "global_head_dim",
            "hidden_activation",
            "hidden_size_per_layer_input",
            "num_global_key_value_heads",
            "num_kv_shared_layers",
            "sliding_window",
            # of experts, of embeddings of each layer, and of layers that share keys and values
            "moe_intermediate_size",
            "num_experts",
            "top_k_experts",
            "use_double_wide_mlp",
            "vocab_size_per_layer_input",
        }
    ),
    lacks={
        "hidden_size_per_layer_input": "a second table of embeddings, of which each layer mixes "
        "its own part in (per-layer embeddings, as in Gemma-4 E2B and E4B)",
        "num_kv_shared_layers": "layers that attend to the keys and values of an earlier layer (as "
        "in Gemma-4 E2B and E4B)",
        "enable_moe_block": "experts beside each MLP, with norms and a router of their own (as in "
        "Gemma-4 26B-A4B)",
        "rope_scaling": "a set of rotary positions for each kind of layer, as rope_parameters",
    },
    # tokens of an image see one another
    harmless={"use_bidirectional_attention": "vision"},
)
_COHERE_DEFAULTS = {"rms_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True}
_COHERE = Family(
    "cohere",
    is_interleaved=True,
    norms=LayerNorms(before_mlp="input_layernorm"),
    has_centred_norms=True,
    is_parallel=True,
    defaults=_COHERE_DEFAULTS | {"rope_theta": 5e5},
    fields=frozenset({"attention_bias", "logit_scale"}),
    aliases={"layer_norm_eps": "rms_norm_eps"},
)

FAMILIES = {
    "LlamaForCausalLM": Family(
        "llama", mlp_bias="mlp_bias", fields=frozenset({"attention_bias", "mlp_bias"})
    ),
    "InternLM3ForCausalLM": Family(
        "internlm3",
        mlp_bias="attention_bias",
        defaults={"num_key_value_heads": 2, "head_dim": 128},
        # all biases or none
        fields=frozenset({"attention_bias"}),
        aliases=dict.fromkeys(("qkv_bias", "bias", "mlp_bias"), "attention_bias"),
        transformers_class="LlamaForCausalLM",
    ),
    "SeedOssForCausalLM": Family(
        "seed_oss",
        o_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        defaults={"attention_bias": True, "head_dim": 128},
        fields=frozenset({"attention_bias", "attention_out_bias", "mlp_bias"}),
    ),
    "Ernie4_5ForCausalLM": Family(
        "ernie4_5",
        mlp_bias="attention_bias",
        is_interleaved=True,
        defaults={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rope_theta": 5e5,
            "tie_word_embeddings": True,
        },
        aliases={"use_bias": "attention_bias"},
    ),
    "MistralForCausalLM": Family(
        "mistral",
        qkv_bias=False,
        o_bias=False,
        windows="all",
        defaults={"sliding_window": 4096},
        fields=frozenset({"sliding_window"}),
    ),
    "MinistralForCausalLM": Family(
        "ministral",
        qkv_bias=False,
        o_bias=False,
        windows="listed",
        defaults={"sliding_window": 4096},
        fields=frozenset({"sliding_window"}),
    ),
    "Ministral3ForCausalLM": Family(
        "ministral3",
        qkv_bias=False,
        o_bias=False,
        head_dim=128,
        windows="all",
        scales_queries=True,
        defaults={"num_key_value_heads": 8},
        fields=frozenset({"sliding_window"}),
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        qkv_bias=True,
        o_bias=False,
        windows="later",
        defaults={"max_window_layers": 28},
        fields=WINDOW_FIELDS,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        qk_norm=True,
        head_dim=128,
        windows="later",
        defaults={"max_window_layers": 28},
        fields=WINDOW_FIELDS | {"attention_bias"},
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        qkv_bias=False,
        o_bias=False,
        is_fused=True,
        windows="all",
        rotary_share=1.0,
        rope_types={"su": "longrope", "yarn": "longrope"},
        # transformers ignores the bias, and two fields of Phi-4-mini's own code
        fields=frozenset(
            {"sliding_window", "attention_bias", "full_attn_mod", "interpolate_factor"}
        ),
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        qk_norm=True,
        has_joint_qk_norm=True,
        norms=NORMS_BEHIND,
        fields=frozenset({"attention_bias"}),
    ),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        qk_norm=True,
        has_joint_qk_norm=True,
        windows="pattern",
        ropes="by window",
        norms=NORMS_BEHIND,
        defaults={
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "rope_theta": 5e5,
            # transformers reads rope_theta for the other layers alone
            "rope_local_base_freq": 5e5,
        },
        fields=frozenset({"attention_bias", "sliding_window"}),
    ),
    "Exaone4ForCausalLM": Family(
        "exaone4",
        qkv_bias=False,
        o_bias=False,
        qk_norm=True,
        windows="pattern or none",
        ropes="windowed",
        norms=NORMS_BEHIND,
        defaults={
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        fields=frozenset({"sliding_window", "sliding_window_pattern"}),
    ),
    "CohereForCausalLM": _COHERE,
    "Cohere2ForCausalLM": replace(
        _COHERE,
        model_type="cohere2",
        windows="pattern",
        ropes="windowed",
        defaults=_COHERE_DEFAULTS | {"sliding_window": 4096, "sliding_window_pattern": 4},
        fields=_COHERE.fields
        | frozenset(
            {
                "sliding_window",
                "sliding_window_pattern",
                # of the first checkpoint, which transformers does not read
                "layer_switch",
                "order_of_interleaved_layers",
                "position_embedding_type",
                "rotary_pct",
                "use_embedding_sharing",
                "use_gated_activation",
                "use_parallel_block",
                "use_parallel_embedding",
            }
        ),
    ),
    "GraniteForCausalLM": Family(
        "granite",
        mlp_bias="mlp_bias",
        defaults={"attention_multiplier": 1.0},
        fields=MULTIPLIERS | {"attention_bias", "mlp_bias"},
    ),
    "GemmaForCausalLM": Family(
        "gemma",
        head_dim=256,
        # the first checkpoints call it gelu and were trained with tanh
        activation_names={"gelu": "gelu_tanh", **ACTIVATION_NAMES},
        norm_offset=1.0,
        scales_embeddings=True,
        defaults={
            "num_key_value_heads": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
        # transformers ignores the second name of the activation
        fields=frozenset({"attention_bias", "hidden_activation"}),
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        head_dim=256,
        windows="alternating",
        activation_field="hidden_activation",
        norms=_GEMMA_NORMS,
        norm_offset=1.0,
        scales_embeddings=True,
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
        fields=frozenset(
            {
                "attention_bias",
                "sliding_window",
                "hidden_activation",
                "query_pre_attn_scalar",
                "attn_logit_softcapping",
                "final_logit_softcapping",
            }
        ),
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        qk_norm=True,
        head_dim=256,
        windows="pattern",
        ropes="by window",
        activation_field="hidden_activation",
        norms=_GEMMA_NORMS,
        norm_offset=1.0,
        scales_embeddings=True,
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": True,
        },
        fields=frozenset(
            {
                "attention_bias",
                "sliding_window",
                "sliding_window_pattern",
                # written beside layer_types, and not read
                "_sliding_window_pattern",
                "rope_local_base_freq",
                "hidden_activation",
                "query_pre_attn_scalar",
                "final_logit_softcapping",
            }
        ),
    ),
    "Gemma4ForCausalLM": _GEMMA4,
    "GlmForCausalLM": _GLM,
    "Glm4ForCausalLM": replace(
        _GLM,
        model_type="glm4",
        norms=LayerNorms(
            behind_attention="post_self_attn_layernorm",
            before_mlp="post_attention_layernorm",
            behind_mlp="post_mlp_layernorm",
        ),
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        mlp_bias="mlp_bias",
        windows="unrotated",
        ropes="listed",
        defaults={
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        # transformers ignores max_window_layers
        fields=WINDOW_FIELDS
        | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
    ),
    **MIXTURES,
}
