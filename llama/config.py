"""config.json of a checkpoint: read, checked, refused where it asks for what the model does not
compute.

"What it asks for" is what transformers' class of that architecture does with the same file: a field
that changes its function is either computed here or refused; a field that it ignores
(pretraining_tp, initializer_range, temperature) is ignored, and an unknown one is refused if it is
set. `llama/config_fields.py` has the lists.
"""

import json
import math
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path

from foreign.json_fields import JsonFields
from foreign.json_text import read_object
from foreign.reading import Reading
from kernels.glu import Activation
from kernels.masked_attention_tiles import MAX_HEAD
from llama.config_fields import COMPUTED, ONE_VALUE, WITHOUT_EFFECT
from llama.families import ACTIVATION_NAMES, FAMILIES, Family, LayerNorms
from llama.rope_scaling import LongRopeScaling, RopeScaling, read_rope
from llama.towers import BESIDE_THE_TEXT, TOWERS, text_of

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
# far beyond any model of today, and small enough to be laid out before the weights contradict
_MOST_SIZE = 1 << 24
_MOST_HEADS = _MOST_HEAD_DIM = 1 << 16
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that decide what the model computes, under their names there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    is_fused: bool  # qkv_proj and gate_up_proj are tensors of their own
    activation: Activation  # of the gates
    qk_norm: bool  # queries and keys are normalized head by head before they are rotated
    # of each layer: how many tokens each sees, itself included; None: all before it
    windows: tuple[int | None, ...]
    query_pre_attn_scalar: float  # scores are divided by its root
    attn_logit_softcapping: float | None  # what no score exceeds
    final_logit_softcapping: float | None  # what no logit exceeds
    norms: LayerNorms
    norm_offset: float  # what the weights of all norms are stored less
    embedding_scale: float
    eos_token_ids: tuple[int, ...]  # generation_config.json's where it has them
    is_tower: bool = False  # the model lies beside an encoder of images, in a larger one

    @property
    def decoder(self) -> str:
        """The module that has embeddings, layers and the last norm, as transformers 5 names it."""
        return "model.language_model" if self.is_tower else "model"

    @property
    def rotary_factor(self) -> float:
        """The factor of cosines and sines."""
        scaling = self.rope_scaling
        return scaling.attention_factor if isinstance(scaling, LongRopeScaling) else 1.0

    def is_long(self, num_tokens: int) -> bool:
        """Tell whether a sequence is rotated by LongRoPE's frequencies for long ones."""
        scaling = self.rope_scaling
        is_longrope = isinstance(scaling, LongRopeScaling)
        return is_longrope and scaling.original_max_position_embeddings < num_tokens


def _eos_token_ids(fields: JsonFields) -> tuple[int, ...] | None:
    value = fields.values.get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(
            f"{fields.where}: eos_token_id must be a token id or a list of them: got {value!r}"
        )
    return tuple(ids)


def _language_model(fields: JsonFields) -> tuple[Family, JsonFields, bool]:
    """Find the language model that config.json describes.

    Returns:
        Its family, the fields that describe it, and whether it is a tower of a larger model.
    """
    path, values = fields.path, fields.values
    architectures = values.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    name = named[0] if len(named) == 1 else None
    # a list or an object is no key of a table
    if not isinstance(name, str) or name not in FAMILIES.keys() | TOWERS.keys():
        raise ValueError(
            f"{path} must describe one of the architectures {', '.join([*FAMILIES, *TOWERS])}: "
            f"got {architectures!r} (model_type {values.get('model_type')!r})"
            + ("; code that auto_map names is never run" if values.get("auto_map") else "")
        )
    expected = (TOWERS.get(name) or FAMILIES[name]).model_type
    if values.get("model_type", expected) != expected:
        raise ValueError(
            f"{path}: model_type must be {expected!r} with {name}: got {values['model_type']!r}"
        )
    if name not in TOWERS:
        _check_fields(fields, name, FAMILIES[name].fields)
        return FAMILIES[name], fields, False
    family, text = text_of(fields, TOWERS[name])
    if text.section:
        _check_fields(fields, name, BESIDE_THE_TEXT)
        _check_fields(text, name, family.fields)
    else:
        _check_fields(fields, name, BESIDE_THE_TEXT | family.fields)
    return family, text, True


def _check_fields(fields: JsonFields, name: str, own: Set[str]) -> None:
    """Refuse fields that are unknown, and those that another model than this one is needed for.

    Args:
        name: of the architecture.
        own: the fields that it has beside those of all.
    """
    known = COMPUTED | own | WITHOUT_EFFECT | ONE_VALUE.keys()
    unknown = sorted(key for key, value in fields.values.items() if value and key not in known)
    if unknown:
        raise ValueError(
            f"{fields.where} must hold fields that {name} has: got {unknown[0]} = "
            f"{fields.values[unknown[0]]!r}; remove it or set it to null, which is safe if the "
            "field does not change what the model computes"
        )
    _check_function(fields)


def _windows(fields: JsonFields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Read which layers see how many tokens."""
    path, values = fields.where, fields.values
    size = values.get("sliding_window")
    if size is not None:
        size = fields.integer("sliding_window")
    if family.windows == "alternating":
        sees_window = [layer % 2 == 0 for layer in range(num_layers)]
    elif family.windows == "none" or size is None:
        sees_window = [False] * num_layers
    elif family.windows == "all":
        sees_window = [True] * num_layers
    else:
        first = 28 if (first := values.get("max_window_layers")) is None else first
        if type(first) is not int:
            raise ValueError(f"{path}: max_window_layers must be an integer: got {first!r}")
        is_used = fields.boolean("use_sliding_window", False)
        sees_window = [is_used and layer >= first for layer in range(num_layers)]
    kinds = values.get("layer_types")
    if kinds is not None:
        named = {"full_attention": False, "sliding_attention": True}
        is_list = isinstance(kinds, list) and len(kinds) == num_layers
        if not is_list or not all(kind in tuple(named) for kind in kinds):
            raise ValueError(
                f"{path}: layer_types must name one of {', '.join(named)} for each of "
                f"{num_layers} layers: got {kinds!r}"
            )
        given = [named[kind] for kind in kinds]
        if family.windows in ("alternating", "later"):
            sees_window = given
        elif given != sees_window:
            raise ValueError(f"{path}: layer_types must be those of {family.model_type}")
    if any(sees_window) and size is None:
        raise ValueError(f"{path}: sliding_window must be given with sliding layers: got none")
    return tuple(size if sees else None for sees in sees_window)


def _check_function(fields: JsonFields) -> None:
    """Refuse what another model than this one would be needed for."""
    path, values = fields.where, fields.values
    for key in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        if (dropout := values.get(key)) not in (None, 0):
            raise ValueError(
                f"{path}: {key} must be 0: got {dropout!r}; "
                "set it to 0 to fine-tune without, the weights do not depend on it"
            )
    for key, computed in ONE_VALUE.items():
        if key in values and bool(values[key]) != bool(computed):
            raise ValueError(
                f"{path}: {key} must be {json.dumps(computed)} or absent: got "
                f"{json.dumps(values[key])}; another value is another function, which is not "
                "computed here"
            )


def _activation(fields: JsonFields, family: Family) -> Activation:
    name = fields.values.get(family.activation_field)
    if name is None:
        name = family.defaults.get(family.activation_field, "silu")
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        raise ValueError(
            f"{fields.where}: {family.activation_field} must be one of "
            f"{', '.join(ACTIVATION_NAMES)}: got {name!r}"
        )
    return ACTIVATION_NAMES[name]


def read_config(folder: Path) -> LlamaConfig:
    """Read and check a checkpoint's config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object, or as `check_config`.
    """
    return check_config(read_config_json(folder))


def read_config_json(folder: Path) -> JsonFields:
    """Read a checkpoint's config.json, its fields unchecked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        advice = (
            ", which is an adapter's: it goes on with --init-adapter in train.py, and is given as "
            "--adapter elsewhere"
        )
        raise FileNotFoundError(
            f"a checkpoint folder must hold {CONFIG_NAME}: none in {folder}"
            + (advice if is_adapter else "")
        )
    with Reading(path):
        return JsonFields(path, read_object(path))


def check_config(fields: JsonFields) -> LlamaConfig:
    """Check the fields of a config.json, and read generation_config.json beside it.

    Raises:
        ValueError: config.json describes another architecture, lacks a field, or has one of the
            wrong type or a value that this model does not compute.
    """
    with Reading(fields.path):
        return _checked(fields)


def _checked(fields: JsonFields) -> LlamaConfig:
    family, given, is_tower = _language_model(fields)
    fields = replace(given, values={**family.defaults, **given.values})
    path = fields.where
    num_heads = fields.integer("num_attention_heads", most=_MOST_HEADS)
    hidden_size = fields.integer("hidden_size", most=_MOST_SIZE)
    has_head_dim = family.head_dim or fields.values.get("head_dim") is not None
    if not has_head_dim and hidden_size % num_heads:
        raise ValueError(
            f"{path}: hidden_size must be a multiple of num_attention_heads where head_dim is not "
            f"given: got {hidden_size} and {num_heads}"
        )
    generation_path = fields.path.with_name(GENERATION_CONFIG_NAME)
    eos_token_ids = None
    if generation_path.is_file():
        eos_token_ids = _eos_token_ids(JsonFields(generation_path, read_object(generation_path)))
    if eos_token_ids is None:
        eos_token_ids = _eos_token_ids(fields)
    rope_theta, rope_scaling = read_rope(fields)
    num_layers = fields.integer("num_hidden_layers", most=_MOST_LAYERS)
    bias = "attention_bias" in family.fields and fields.boolean("attention_bias", False)
    head_dim = family.head_dim or max(1, hidden_size // num_heads)
    head_dim = fields.integer("head_dim", head_dim, most=_MOST_HEAD_DIM)
    config = LlamaConfig(
        vocab_size=fields.integer("vocab_size", most=_MOST_SIZE),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", most=_MOST_SIZE),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=fields.integer("num_key_value_heads", num_heads, _MOST_HEADS),
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=bias if family.o_bias is None else family.o_bias,
        mlp_bias="mlp_bias" in family.fields and fields.boolean("mlp_bias", False),
        is_fused=family.is_fused,
        activation=_activation(fields, family),
        qk_norm=family.qk_norm,
        windows=_windows(fields, family, num_layers),
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar", float(head_dim)),
        attn_logit_softcapping=fields.optional_number("attn_logit_softcapping"),
        final_logit_softcapping=fields.optional_number("final_logit_softcapping"),
        norms=family.norms,
        norm_offset=family.norm_offset,
        embedding_scale=math.sqrt(hidden_size) if family.scales_embeddings else 1.0,
        eos_token_ids=eos_token_ids or (),
        is_tower=is_tower,
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"{path}: num_attention_heads must be a multiple of num_key_value_heads: "
            f"got {config.num_attention_heads} and {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"{path}: head_dim must be even, rotary positions turn pairs: got {config.head_dim}"
        )
    if config.attn_logit_softcapping is not None and config.head_dim > MAX_HEAD:
        raise ValueError(
            f"{path}: head_dim must be at most {MAX_HEAD} with attn_logit_softcapping: "
            f"got {config.head_dim}"
        )
    return config
