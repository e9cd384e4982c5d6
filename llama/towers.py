"""The families whose checkpoints have a language model beside an encoder of images: its tower.

config.json describes the language model in its text_config, whose fields are those of a checkpoint
of its own; the fields around it are about images, but for a few: `text_of` brings them together.
Only text is learned from here, so what an image would do to a token does not matter, and the
rotary positions of Qwen's towers, three for each token, are one: tokens of text have the same
three times.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from foreign.json_fields import JsonFields
from llama.families import FAMILIES
from llama.family import Family

TEXT = "text_config"


@dataclass(frozen=True)
class Tower:
    """How a family's config.json describes its language model.

    Attributes:
        texts: the families of language models that it may have; the first where text_config has no
            model_type.
        is_tied: whether the head is tied to the embeddings where nothing is said around
            text_config; None: as it says.
        ties_as_text: whether it is tied, too, where text_config alone says so.
        has_three_positions: for each token, of which rotary positions are mixed.
        may_be_flat: the language model's fields may lie around those of the encoder.
        defaults: for fields that a text_config may leave out.
    """

    model_type: str
    texts: tuple[Family, ...]
    is_tied: bool | None = False
    ties_as_text: bool = False
    has_three_positions: bool = False
    may_be_flat: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN2_5_VL = Family(
    "qwen2_5_vl_text",
    qkv_bias=True,
    o_bias=False,
    windows="later",
    defaults={"num_key_value_heads": 8, "rope_theta": 1e6, "max_window_layers": 80},
    fields=FAMILIES["Qwen2ForCausalLM"].fields,
)
_QWEN3_VL = Family(
    "qwen3_vl_text",
    qk_norm=True,
    head_dim=128,
    defaults={"num_key_value_heads": 32, "rope_theta": 5e5},
    fields=frozenset({"attention_bias"}),
)
_MISTRAL = FAMILIES["MistralForCausalLM"]
# LLaVA's files leave out what is as transformers' classes have it: Llama-2-7B's and Mistral-7B's
_SIZES_OF_7B = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
}
_LLAVAS_LLAMA = replace(
    FAMILIES["LlamaForCausalLM"],
    defaults=_SIZES_OF_7B | {"intermediate_size": 11_008, "max_position_embeddings": 2048},
)
_LLAVAS_MISTRAL = replace(
    _MISTRAL,
    defaults=_SIZES_OF_7B
    | {
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
)
_GEMMA3 = FAMILIES["Gemma3ForCausalLM"]
_GEMMA4 = FAMILIES["Gemma4ForCausalLM"]
# Gemma-4 12B's, which has no embeddings of single layers
_GEMMA4_UNIFIED = replace(
    _GEMMA4,
    model_type="gemma4_unified_text",
    defaults={**_GEMMA4.defaults, "sliding_window": 1024, "hidden_size_per_layer_input": 0},
)
_SIZES_OF_GEMMA = {
    "vocab_size": 262_144,
    "num_attention_heads": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
}

TOWERS = {
    "Gemma3ForConditionalGeneration": Tower(
        "gemma3",
        # this class of transformers does not cap the logits
        (replace(_GEMMA3, fields=_GEMMA3.fields - {"final_logit_softcapping"}),),
        is_tied=True,
        defaults=_SIZES_OF_GEMMA | {"vocab_size": 262_208},
    ),
    "Gemma4ForConditionalGeneration": Tower(
        "gemma4", (_GEMMA4,), is_tied=True, defaults=_SIZES_OF_GEMMA
    ),
    "Gemma4UnifiedForConditionalGeneration": Tower(
        "gemma4_unified",
        (_GEMMA4_UNIFIED,),
        is_tied=True,
        defaults=_SIZES_OF_GEMMA | {"max_position_embeddings": 262_144},
    ),
    "LlavaForConditionalGeneration": Tower(
        "llava", (_LLAVAS_LLAMA, _LLAVAS_MISTRAL), ties_as_text=True
    ),
    # without the field transformers 5 ties a head unless the files have another one, as those of
    # Mistral-Small-3.1 do, which say nothing
    "Mistral3ForConditionalGeneration": Tower(
        "mistral3", (_MISTRAL, FAMILIES["Ministral3ForCausalLM"]), is_tied=None
    ),
    "Qwen2_5_VLForConditionalGeneration": Tower(
        "qwen2_5_vl",
        (_QWEN2_5_VL,),
        ties_as_text=True,
        has_three_positions=True,
        may_be_flat=True,
    ),
    "Qwen3VLForConditionalGeneration": Tower("qwen3_vl", (_QWEN3_VL,), has_three_positions=True),
}

# fields around text_config that are read, and those about images, videos and sound
BESIDE_THE_TEXT = frozenset(
    {
        TEXT,
        "audio_config",
        "audio_token_id",
        "boa_token_id",
        "boi_token_id",
        "boi_token_index",
        "eoa_token_id",
        "eoa_token_index",
        "eoi_token_id",
        "eoi_token_index",
        "ignore_index",
        "image_seq_length",
        "image_token_id",
        "image_token_index",
        "mm_tokens_per_image",
        "multimodal_projector_bias",
        "projector_hidden_act",
        "spatial_merge_size",
        "video_token_id",
        "vision_config",
        "vision_end_token_id",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "vision_soft_tokens_per_image",
        "vision_start_token_id",
        "vision_token_id",
    }
)


def text_of(fields: JsonFields, tower: Tower) -> tuple[Family, JsonFields]:
    """Find the fields of a tower's language model, and its family.

    Raises:
        ValueError: there is no text_config, or it is of another family.
    """
    values, section = fields.values.get(TEXT), TEXT
    if values is None and tower.may_be_flat:
        values, section = {k: v for k, v in fields.values.items() if k != "model_type"}, ""
    if not isinstance(values, dict):
        raise ValueError(
            f"{fields.path}: {TEXT} must be an object, the language model's fields: got {values!r}"
        )
    families = {family.model_type: family for family in tower.texts}
    kind = values.get("model_type", tower.texts[0].model_type)
    if not isinstance(kind, str) or kind not in families:
        raise ValueError(
            f"{fields.path}, {TEXT}: model_type must be {' or '.join(families)} in "
            f"{tower.model_type}: got {kind!r}"
        )
    text = JsonFields(fields.path, values, section)
    around: dict[str, Any] = {"tie_word_embeddings": _is_tied(fields, text, tower)}
    if (eos := fields.values.get("eos_token_id")) is not None:
        around["eos_token_id"] = eos
    if tower.has_three_positions:
        around |= _one_position(values)
    return families[kind], replace(text, values={**tower.defaults, **values, **around})


def _is_tied(fields: JsonFields, text: JsonFields, tower: Tower) -> bool:
    as_text = text.boolean("tie_word_embeddings", False)
    default = as_text if tower.is_tied is None else tower.is_tied
    is_tied = fields.boolean("tie_word_embeddings", default)
    return is_tied or (tower.ties_as_text and as_text)


def _one_position(text: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the rotary positions of tokens of text."""
    described = {}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := text.get(name), dict):
            kinds = {k: "default" for k in ("type", "rope_type") if rope.get(k) == "mrope"}
            described[name] = rope | kinds
    return described
