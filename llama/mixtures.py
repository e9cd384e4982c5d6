"""The families of mixtures of experts, and how each differs from Llama: a part of `families.py`."""

from kernels.glu import LIMIT, STEEPNESS
from llama.family import Family
from llama.layer_experts import LayerExperts
from nf4.mxfp4 import BLOCKS, SCALES

MULTIPLIERS = frozenset(
    {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
)
# transformers adds the auxiliary loss that the last one weighs where output_router_logits is set;
# here --router-aux-loss-coef does
_EXPERT_FIELDS = frozenset({"num_experts_per_tok", "output_router_logits", "router_aux_loss_coef"})
WINDOW_FIELDS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers"})

MIXTURES = {
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        qk_norm=True,
        windows="switched",
        experts=LayerExperts("sparse", "moe_intermediate_size"),
        defaults={
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        # transformers ignores max_window_layers and use_qk_norm
        fields=_EXPERT_FIELDS
        | WINDOW_FIELDS
        | {
            "attention_bias",
            "decoder_sparse_step",
            "mlp_only_layers",
            "moe_intermediate_size",
            "norm_topk_prob",
            "num_experts",
            "use_qk_norm",
        },
        aliases={"num_local_experts": "num_experts"},
    ),
    "OlmoeForCausalLM": Family(
        "olmoe",
        qk_norm=True,
        has_joint_qk_norm=True,
        experts=LayerExperts(),
        defaults={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        fields=_EXPERT_FIELDS | {"attention_bias", "norm_topk_prob", "num_experts"},
        aliases={"num_local_experts": "num_experts"},
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        qkv_bias=False,
        o_bias=False,
        windows="all",
        experts=LayerExperts(is_normalized=True),
        defaults={
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "rope_theta": 1e6,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        fields=_EXPERT_FIELDS | {"sliding_window", "num_experts"},
        aliases={"num_local_experts": "num_experts"},
        file_names={
            ".block_sparse_moe.": ".mlp.",
            ".w1.": ".gate_proj.",
            ".w3.": ".up_proj.",
            ".w2.": ".down_proj.",
        },
    ),
    "GraniteMoeForCausalLM": Family(
        "granitemoe",
        experts=LayerExperts(is_normalized=True, is_stacked=True, block="block_sparse_moe"),
        defaults={"attention_multiplier": 1.0, "num_experts": 8, "num_experts_per_tok": 2},
        fields=_EXPERT_FIELDS | MULTIPLIERS | {"attention_bias"},
        aliases={"num_local_experts": "num_experts"},
        file_names={
            ".block_sparse_moe.router.layer.": ".mlp.gate.",
            ".block_sparse_moe.input_linear.": ".mlp.experts.gate_up_proj.",
            ".block_sparse_moe.output_linear.": ".mlp.experts.down_proj.",
        },
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        mlp_bias=True,
        head_dim=64,
        windows="alternating",
        has_sinks=True,
        experts=LayerExperts(is_normalized=True, is_stacked=True, is_by_columns=True),
        activation_names={"silu": "clamped_swish"},
        constants={"swiglu_alpha": STEEPNESS.value, "swiglu_limit": LIMIT.value},
        defaults={
            "attention_bias": True,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "rope_theta": 150000.0,
            "num_experts": 128,
            "num_experts_per_tok": 4,
        },
        rope_default={
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        fields=_EXPERT_FIELDS
        | {
            "attention_bias",
            "num_experts",
            "sliding_window",
            "swiglu_alpha",
            "swiglu_limit",
            # in the first files beside fields that say the same, and not read
            "experts_per_token",
            "initial_context_length",
        },
        aliases={"num_local_experts": "num_experts"},
        file_names={
            ".mlp.router.": ".mlp.gate.",
            **{
                f".experts.{name}{theirs}$": f".experts.{name}{ours}$"
                for name in ("gate_up_proj", "down_proj")
                for theirs, ours in (
                    ("", ".weight"),
                    ("_bias", ".bias"),
                    ("_blocks", f".weight{BLOCKS}"),
                    ("_scales", f".weight{SCALES}"),
                )
            },
        },
    ),
}
