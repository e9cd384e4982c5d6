"""The model families that share one model here, and how each differs from Llama.

A family is what transformers calls an architecture. Its differences are fields: the model asks what
a layer has, never which family it is. A field of config.json that no list here names is refused if
it is set, because it might change the function.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from kernels.glu import Activation
from llama.layer_ropes import LayerRopes


class LayerNorms(NamedTuple):
    """Where a layer normalizes, by what the checkpoint calls each norm; None: nowhere there.

    A norm behind a half of the layer comes before its result is added to the residual stream.
    """

    before_attention: str = "input_layernorm"
    behind_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    behind_mlp: str | None = None


LLAMA_NORMS = LayerNorms()
_GEMMA_NORMS = LayerNorms(
    behind_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    behind_mlp="post_feedforward_layernorm",
)


@dataclass(frozen=True)
class Family:
    """How a family reads its config.json.

    Attributes:
        qkv_bias, o_bias: whether the projections have one; None where `attention_bias` says.
        is_fused: the checkpoint has q, k and v as one tensor, qkv_proj, and gate and up as another,
            gate_up_proj: one member of a linear group, with one update, where others have several.
        is_mlp_fused: that holds for gate and up alone.
        head_dim: where the file gives none; None for hidden_size / num_attention_heads.
        windows: which layers see only the last `sliding_window` tokens: none, all, every other one
            from the first on, all but every `sliding_window_pattern`th, or, where
            `use_sliding_window` is set, those from `max_window_layers` on, or those without rotary
            positions.
        rotary_share: of a head's dimensions, which turn, where `partial_rotary_factor` does not
            say; None: all, and the family does not read that field.
        is_interleaved: rotary positions turn dimensions 2 i and 2 i + 1 together, not the halves.
        ropes: which layers have which rotary positions, as `read_ropes` takes it.
        activation_field: what names the activation of the gates.
        norm_offset: added to the stored weights of all norms.
        scales_embeddings: whether embeddings are multiplied by the root of hidden_size.
        defaults: for fields missing in the file, where they differ from Llama's; null in the file
            stays null.
        fields: of config.json that this family has beside Llama's.
    """

    model_type: str
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    is_fused: bool = False
    is_mlp_fused: bool = False
    head_dim: int | None = None
    windows: Literal["none", "all", "alternating", "pattern", "later", "unrotated"] = "none"
    rotary_share: float | None = None
    is_interleaved: bool = False
    ropes: LayerRopes = "alike"
    activation_field: str = "hidden_act"
    norms: LayerNorms = LLAMA_NORMS
    norm_offset: float = 0.0
    scales_embeddings: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fields: frozenset[str] = frozenset()


_WINDOW_FIELDS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers"})

FAMILIES = {
    "LlamaForCausalLM": Family("llama", fields=frozenset({"attention_bias", "mlp_bias"})),
    "MistralForCausalLM": Family(
        "mistral",
        qkv_bias=False,
        o_bias=False,
        windows="all",
        defaults={"sliding_window": 4096},
        fields=frozenset({"sliding_window"}),
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2", qkv_bias=True, o_bias=False, windows="later", fields=_WINDOW_FIELDS
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        qk_norm=True,
        head_dim=128,
        windows="later",
        fields=_WINDOW_FIELDS | {"attention_bias"},
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        qkv_bias=False,
        o_bias=False,
        is_fused=True,
        windows="all",
        rotary_share=1.0,
        # transformers ignores the bias
        fields=frozenset({"sliding_window", "attention_bias"}),
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
    "Glm4ForCausalLM": Family(
        "glm4",
        o_bias=False,
        is_mlp_fused=True,
        head_dim=128,
        rotary_share=0.5,
        is_interleaved=True,
        norms=LayerNorms(
            behind_attention="post_self_attn_layernorm",
            before_mlp="post_attention_layernorm",
            behind_mlp="post_mlp_layernorm",
        ),
        defaults={"num_key_value_heads": 2, "attention_bias": True},
        fields=frozenset({"attention_bias"}),
    ),
    "GlmForCausalLM": Family(
        "glm",
        o_bias=False,
        is_mlp_fused=True,
        head_dim=128,
        rotary_share=0.5,
        is_interleaved=True,
        defaults={"num_key_value_heads": 2, "attention_bias": True},
        fields=frozenset({"attention_bias"}),
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        windows="unrotated",
        ropes="listed",
        defaults={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
        # transformers ignores max_window_layers
        fields=_WINDOW_FIELDS
        | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
    ),
}

# what the activations of the gates are called in config.json
ACTIVATION_NAMES: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
