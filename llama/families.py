"""The model families that share one model here, and how each differs from Llama.

A family is what transformers calls an architecture. Its differences are fields, so the model asks
what a layer has and never whose it is. What is in no family's list of fields is refused where it is
set, because nobody knows whether it changes the function.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """How a family reads its config.json.

    Attributes:
        qkv_bias, o_bias: whether the projections have one; None where `attention_bias` says.
        is_fused: the checkpoint has q, k and v as one tensor, qkv_proj, and gate and up as another,
            gate_up_proj: one member of a linear group, with one update, where others have several.
        head_dim: where the file gives none; None for hidden_size / num_attention_heads.
        windows: which layers see only the last `sliding_window` tokens: none, all, or, where
            `use_sliding_window` is set, those from `max_window_layers` on.
        default_window: where the file has no `sliding_window`; null in the file means no window.
        fields: of config.json that this family has and Llama has not.
    """

    model_type: str
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    is_fused: bool = False
    head_dim: int | None = None
    windows: Literal["none", "all", "later"] = "none"
    default_window: int | None = None
    fields: frozenset[str] = frozenset()


_WINDOW_FIELDS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers"})

FAMILIES = {
    "LlamaForCausalLM": Family("llama", fields=frozenset({"attention_bias", "mlp_bias"})),
    "MistralForCausalLM": Family(
        "mistral",
        qkv_bias=False,
        o_bias=False,
        windows="all",
        default_window=4096,
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
        # transformers ignores the bias
        fields=frozenset({"sliding_window", "attention_bias"}),
    ),
}

# fields of every family that decide what the model computes
COMPUTED = frozenset(
    {
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "tie_word_embeddings",
        "attention_dropout",
        "quantization_config",
        "layer_types",
        "eos_token_id",
    }
)

# what transformers' classes of these families ignore, and what is for its other programs
WITHOUT_EFFECT = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "attention_sink_size",
        # names classes that transformers prefers its own of this architecture to
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "context_window_size",
        "dtype",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefill_chunk_size",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "rope_interleaved",
        "sliding_window_size",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "use_cache",
        "use_mrope",
    }
)
