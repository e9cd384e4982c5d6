"""What llama.cpp computes for each family, as the fields of a GGUF file; the rest is refused.

A GGUF file names an architecture, and llama.cpp has one graph for each, with fewer choices than
transformers' class of the family: a field of config.json that the graph does not read would be
ignored there. The limits below are those of its sources (src/models/*.cpp) of November 2026.
"""

from dataclasses import dataclass
from typing import Any

from checkpoint.opening import Checkpoint
from kernels.glu import Activation
from llama.config import LlamaConfig
from llama.rope_scaling import LinearRopeScaling, Llama3RopeScaling, LongRopeScaling, Rope

Fields = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures, as far as families here differ in it.

    Attributes:
        name: in the file, and the beginning of its fields' names.
        is_interleaved: rotary positions turn neighbours, not halves: rows of q and k are reordered.
        biases: the projections that may have one: any of "qkv", "o", "mlp".
        rope_scalings: the kinds of scaled rotary positions, besides none.
        has_wide_heads: the heads may be wider together than hidden_size, or narrower.
    """

    name: str
    activation: Activation = "silu"
    is_interleaved: bool = False
    biases: frozenset[str] = frozenset()
    rope_scalings: tuple[type, ...] = (LinearRopeScaling,)
    has_wide_heads: bool = True


_LLAMA = Architecture(
    "llama",
    is_interleaved=True,
    biases=frozenset({"qkv", "o", "mlp"}),
    rope_scalings=(LinearRopeScaling, Llama3RopeScaling),
)
_QWEN2 = Architecture("qwen2", biases=frozenset({"qkv"}), has_wide_heads=False)
_QWEN3 = Architecture("qwen3")
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
    "Phi3ForCausalLM": Architecture("phi3", rope_scalings=(LongRopeScaling,), has_wide_heads=False),
    "Gemma2ForCausalLM": Architecture("gemma2", activation="gelu_tanh"),
    # of towers, those of their language models
    "LlavaForConditionalGeneration": _LLAMA,
    "Mistral3ForConditionalGeneration": _LLAMA,
    "Qwen2_5_VLForConditionalGeneration": _QWEN2,
    "Qwen3VLForConditionalGeneration": _QWEN3,
}
# of the 27B model, whose scores alone llama.cpp divides by another root than the head's
_LAYERS_OF_GEMMA_27B = 46


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Find a checkpoint's architecture in llama.cpp.

    Raises:
        ValueError: llama.cpp has none for the family, or computes another function.
    """
    (family,) = checkpoint.config_json["architectures"]
    if family not in ARCHITECTURES:
        raise ValueError(
            f"--gguf must be for one of {', '.join(ARCHITECTURES)}: got {family}, which GGUF has "
            "no architecture for here"
        )
    architecture = ARCHITECTURES[family]
    for reason in _differences(checkpoint.config, architecture):
        raise ValueError(
            f"--gguf must compute what {checkpoint.folder} does: llama.cpp's {architecture.name} "
            f"{reason}; leave --gguf out, and serve the merged folder"
        )
    return architecture


def has_architecture(checkpoint: Checkpoint) -> bool:
    """Tell whether llama.cpp computes what a checkpoint does."""
    try:
        architecture_of(checkpoint)
    except ValueError:
        return False
    return True


def _differences(config: LlamaConfig, architecture: Architecture) -> list[str]:
    """What llama.cpp would compute otherwise."""
    has_bias = {"qkv": config.qkv_bias, "o": config.o_bias, "mlp": config.mlp_bias}
    biased = [name for name, has in has_bias.items() if has and name not in architecture.biases]
    width = config.num_attention_heads * config.head_dim
    scaling = rope_of(config).scaling
    reasons = {
        f"has the activation {architecture.activation}, not {config.activation}": (
            config.activation != architecture.activation
        ),
        f"has no biases of {' and '.join(biased)}": bool(biased),
        f"has heads of {config.hidden_size} numbers together, not {width}": (
            not architecture.has_wide_heads and width != config.hidden_size
        ),
        "does not scale queries by their positions": rope_of(config).query_scaling is not None,
        f"does not scale rotary positions by {type(scaling).__name__}": (
            scaling is not None and not isinstance(scaling, architecture.rope_scalings)
        ),
    }
    if architecture.name == "gemma2":
        reasons |= _differences_of_gemma2(config)
    return [reason for reason, differs in reasons.items() if differs]


def _differences_of_gemma2(config: LlamaConfig) -> dict[str, bool]:
    is_27b = config.num_hidden_layers == _LAYERS_OF_GEMMA_27B
    root = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    windows = [window is not None for window in config.windows]
    return {
        f"divides scores by the root of {root}, not of {config.query_pre_attn_scalar:g}": (
            config.query_pre_attn_scalar != root
        ),
        "caps scores and logits always": (
            config.attn_logit_softcapping is None or config.final_logit_softcapping is None
        ),
        "has windows in every other layer from the first on": (
            windows != [layer % 2 == 0 for layer in range(config.num_hidden_layers)]
        ),
        "ties the head to the embeddings": not config.tie_word_embeddings,
    }


def fields_of(checkpoint: Checkpoint, architecture: Architecture) -> Fields:
    """List the fields of a GGUF file that decide the function, by their names without the
    architecture's."""
    config = checkpoint.config
    fields: Fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(rope_of(config).theta),
        **_rope_fields(config),
    }
    if architecture.name == "gemma2":
        fields["attention.sliding_window"] = config.windows[0]
        fields["attn_logit_softcapping"] = config.attn_logit_softcapping
        fields["final_logit_softcapping"] = config.final_logit_softcapping
    if architecture.name == "phi3":
        # 0 is how llama.cpp tells Phi-4; windows are switched off there
        fields["attention.sliding_window"] = next(filter(None, config.windows), 0)
    return {f"{architecture.name}.{name}": value for name, value in fields.items()}


def rope_of(config: LlamaConfig) -> Rope:
    """Find the rotary positions, which all layers of the families here share."""
    (rope,) = config.distinct_ropes
    assert rope is not None
    return rope


def _rope_fields(config: LlamaConfig) -> Fields:
    scaling = rope_of(config).scaling
    if isinstance(scaling, LinearRopeScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if isinstance(scaling, LongRopeScaling):
        return {
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
            "rope.scaling.attn_factor": float(scaling.attention_factor),
        }
    # Llama 3.1's factors are a tensor
    return {}


def remarks_of(checkpoint: Checkpoint, architecture: Architecture) -> list[str]:
    """Say what llama.cpp computes otherwise beyond some length."""
    config = checkpoint.config
    windows = [window for window in config.windows if window is not None]
    remarks = []
    if checkpoint.encoders:
        remarks.append("the GGUF file has the language model alone, which answers text")
    if windows and architecture.name != "gemma2" and min(windows) < config.max_position_embeddings:
        remarks.append(
            f"llama.cpp's {architecture.name} has no sliding windows: its answers are the model's "
            f"up to {min(windows):,} tokens"
        )
    if config.short_length is not None:
        remarks.append(
            "llama.cpp chooses the rotary factors by the size of its context: run texts of up to "
            f"{config.short_length:,} tokens with a context of at most that (--ctx-size, num_ctx)"
        )
    return remarks
