"""config.json of a checkpoint: read, checked, refused where it asks for what the model does not
compute.

"What it asks for" is what transformers' class of that architecture does with the same file: a field
that changes its function is either computed here or refused; a field that it ignores
(pretraining_tp, initializer_range, temperature) is ignored, and an unknown one is refused if it is
set. `llama/config_fields.py` has the lists.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foreign.json_fields import JsonFields
from foreign.json_text import read_object
from foreign.reading import Reading
from kernels.glu import Activation
from llama.config_checks import check_fields, check_function, check_model_type, fields_of
from llama.families import FAMILIES
from llama.family import Family, LayerNorms
from llama.layer_experts import Experts, read_experts
from llama.layer_heads import MOST_HEAD_DIM, MOST_HEADS, Heads, read_heads
from llama.layer_ropes import read_ropes, read_rotary_dim
from llama.layer_windows import read_windows
from llama.rope_scaling import LongRopeScaling, Rope, Turn
from llama.towers import BESIDE_THE_TEXT, TOWERS, text_of

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
# far beyond any model of today, and small enough to be laid out before the weights contradict
_MOST_SIZE = 1 << 24
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that decide what the model computes, under their names there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # this and head_dim of all layers, or where own_heads gives none
    head_dim: int
    rms_norm_eps: float
    ropes: tuple[Rope | None, ...]  # of each layer; None: its heads are not rotated
    rotary_dim: int  # of the dimensions of a head that turn, the first ones
    is_interleaved: bool  # dimensions 2 i and 2 i + 1 turn together, not the halves
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    is_fused: bool  # qkv_proj is a tensor of its own
    is_mlp_fused: bool  # gate_up_proj is one
    activation: Activation  # of the gates
    qk_norm: bool  # queries and keys are normalized before they are rotated, head by head
    has_joint_qk_norm: bool  # or all heads of a token together
    # of each layer: how many tokens each sees, itself included; None: all before it
    windows: tuple[int | None, ...]
    query_pre_attn_scalar: float  # scores are divided by its root
    attn_logit_softcapping: float | None  # what no score exceeds
    final_logit_softcapping: float | None  # what no logit exceeds
    norms: LayerNorms
    norm_offset: float  # what the weights of all norms are stored less
    has_centred_norms: bool  # norms subtract the mean first: layer normalization
    is_parallel: bool  # the MLP has attention's input, and not its result added to that
    embedding_scale: float  # rounded to the dtype of the computation before it multiplies
    embedding_multiplier: float | None
    residual_multiplier: float | None  # of what a half of a layer adds
    attention_multiplier: float | None  # of scores, in place of the root's reciprocal
    logit_scale: float | None  # of logits, before they are capped
    eos_token_ids: tuple[int, ...]  # generation_config.json's where it has them
    experts: Experts | None = None  # in place of the MLP, in some layers or all
    # parts of tensors' names in checkpoints, and what they are called here
    file_names: tuple[tuple[str, str], ...] = ()
    has_sinks: bool = False  # each head has a score beside those of the tokens, without a value
    is_tower: bool = False  # the model lies beside an encoder of images, in a larger one
    own_heads: tuple[Heads, ...] = ()  # of each layer; empty: all have the ones above
    has_value_norm: bool = False  # values are normalized too, head by head, and without a weight
    has_layer_scalar: bool = False  # what leaves a layer is multiplied by a number of its own

    @property
    def decoder(self) -> str:
        """The module that has embeddings, layers and the last norm, as transformers 5 names it."""
        return "model.language_model" if self.is_tower else "model"

    def heads(self, layer: int) -> Heads:
        """The heads of a layer."""
        common = Heads(self.num_key_value_heads, self.head_dim, self.rotary_dim)
        return self.own_heads[layer] if self.own_heads else common

    @property
    def distinct_heads(self) -> list[Heads]:
        """The heads of all layers, each once."""
        return list(dict.fromkeys(map(self.heads, range(self.num_hidden_layers))))

    def qk_norm_widths(self, layer: int) -> tuple[int, int]:
        """How many numbers of queries are normalized together in a layer, and of keys."""
        heads = self.heads(layer)
        counts = (self.num_attention_heads, heads.num_key_value_heads)
        num_queries, num_keys = counts if self.has_joint_qk_norm else (1, 1)
        return num_queries * heads.head_dim, num_keys * heads.head_dim

    @property
    def score_scale(self) -> float:
        """What q k^T is multiplied by."""
        return self.attention_multiplier or 1 / math.sqrt(self.query_pre_attn_scalar)

    @property
    def distinct_ropes(self) -> list[Rope | None]:
        """The rotary positions of all layers, each once."""
        return list(dict.fromkeys(self.ropes))

    def turn(self, layer: int) -> Turn:
        """How the heads of a layer turn."""
        return Turn(self.ropes[layer], self.heads(layer).rotary_dim)

    @property
    def distinct_turns(self) -> list[Turn]:
        """How the heads of all layers turn, each once."""
        return list(dict.fromkeys(map(self.turn, range(self.num_hidden_layers))))

    @property
    def short_length(self) -> int | None:
        """The most tokens of a sequence that is not rotated by LongRoPE's frequencies for long
        ones; None: the frequencies do not depend on the length."""
        scalings = [rope.scaling for rope in self.ropes if rope is not None]
        lengths = (
            scaling.original_max_position_embeddings
            for scaling in scalings
            if isinstance(scaling, LongRopeScaling)
        )
        return next(lengths, None)

    def is_long(self, num_tokens: int) -> bool:
        """Tell whether a sequence is rotated by LongRoPE's frequencies for long ones."""
        return self.short_length is not None and self.short_length < num_tokens


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
    if name in TOWERS:
        check_model_type(fields, name, [TOWERS[name].model_type])
        family, text = text_of(fields, TOWERS[name])
        around, inside = BESIDE_THE_TEXT, fields_of(family)
        if TOWERS[name].may_be_flat:
            # some versions of transformers wrote each field in both places
            around = inside = around | inside
        check_fields(fields, name, around)
        check_fields(text, name, inside, family.harmless)
        return family, text, True
    sharing = [f for key, f in FAMILIES.items() if name in (key, f.transformers_class)]
    by_type = {family.model_type: family for family in sharing}
    check_model_type(fields, name, by_type)
    family = by_type[values.get("model_type", FAMILIES[name].model_type)]
    check_fields(fields, name, fields_of(family), family.harmless)
    return family, fields, False


def _activation(fields: JsonFields, family: Family) -> Activation:
    name = fields.values.get(family.activation_field)
    if name is None:
        name = family.defaults.get(family.activation_field, "silu")
    if not isinstance(name, str) or name not in family.activation_names:
        raise ValueError(
            f"{fields.where}: {family.activation_field} must be one of "
            f"{', '.join(family.activation_names)}: got {name!r}"
        )
    return family.activation_names[name]


def _has_bias(fields: JsonFields, said: bool | str) -> bool:
    return fields.boolean(said, False) if isinstance(said, str) else said


def _logit_scale(fields: JsonFields) -> float | None:
    divisor = fields.optional_number("logits_scaling")
    return fields.optional_number("logit_scale") if divisor is None else 1 / divisor


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


def _named(fields: JsonFields, given: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Bring the values of a family's own names under the names that they have here.

    Raises:
        ValueError: names of one thing have different values.
    """
    named: dict[str, Any] = {}
    for alias, name in family.aliases.items():
        if alias in given:
            said = named.setdefault(name, given.get(name, given[alias]))
            # true is no 1
            if repr(said) != repr(given[alias]):
                raise ValueError(
                    f"{fields.where}: {alias} must be what is said of {name}, {said!r}: "
                    f"got {given[alias]!r}"
                )
    return named


def _checked(fields: JsonFields) -> LlamaConfig:
    family, text, is_tower = _language_model(fields)
    # a name of Llama's is not read where the family has its own alone
    replaced = set(family.aliases.values()) - family.fields
    given = {key: value for key, value in text.values.items() if key not in replaced}
    fields = replace(text, values={**family.defaults, **given, **_named(text, given, family)})
    is_given = fields.values.get("rope_parameters") is not None
    if not is_given and not fields.values.get("rope_scaling"):
        fields.values["rope_parameters"] = dict(family.rope_default)
    path = fields.where
    check_function(fields, family)
    num_heads = fields.integer("num_attention_heads", most=MOST_HEADS)
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
    num_layers = fields.integer("num_hidden_layers", most=_MOST_LAYERS)
    windows = read_windows(fields, family.windows, num_layers)
    head_dim = family.head_dim or max(1, hidden_size // num_heads)
    head_dim = fields.integer("head_dim", head_dim, most=MOST_HEAD_DIM)
    sees_window = [window is not None for window in windows]
    heads = Heads(
        fields.integer("num_key_value_heads", num_heads, MOST_HEADS),
        head_dim,
        read_rotary_dim(fields, family.rotary_share, head_dim),
    )
    own_heads = read_heads(fields, family.heads, heads, sees_window)
    rotary_dims = [own.rotary_dim for own in own_heads or (heads,) * num_layers]
    config = LlamaConfig(
        vocab_size=fields.integer("vocab_size", most=_MOST_SIZE),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", most=_MOST_SIZE),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=heads.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps"),
        ropes=read_ropes(
            fields,
            family.ropes,
            sees_window,
            rotary_dims,
            family.rope_types,
            family.scales_queries,
        ),
        rotary_dim=heads.rotary_dim,
        is_interleaved=family.is_interleaved,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        qkv_bias=_has_bias(fields, family.qkv_bias),
        o_bias=_has_bias(fields, family.o_bias),
        mlp_bias=_has_bias(fields, family.mlp_bias),
        is_fused=family.is_fused,
        is_mlp_fused=family.is_fused or family.is_mlp_fused,
        activation=_activation(fields, family),
        qk_norm=family.qk_norm,
        has_joint_qk_norm=family.has_joint_qk_norm,
        windows=windows,
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar", float(head_dim)),
        attn_logit_softcapping=fields.optional_number("attn_logit_softcapping"),
        final_logit_softcapping=fields.optional_number("final_logit_softcapping"),
        norms=family.norms,
        norm_offset=family.norm_offset,
        has_centred_norms=family.has_centred_norms,
        is_parallel=family.is_parallel,
        embedding_scale=math.sqrt(hidden_size) if family.scales_embeddings else 1.0,
        embedding_multiplier=fields.optional_number("embedding_multiplier"),
        residual_multiplier=fields.optional_number("residual_multiplier"),
        attention_multiplier=fields.optional_number("attention_multiplier"),
        logit_scale=_logit_scale(fields),
        eos_token_ids=eos_token_ids or (),
        experts=read_experts(fields, family.experts, num_layers),
        file_names=tuple(family.file_names.items()),
        has_sinks=family.has_sinks,
        is_tower=is_tower,
        own_heads=own_heads,
        has_value_norm=family.has_value_norm,
        has_layer_scalar=family.has_layer_scalar,
    )
    for own in config.distinct_heads:
        if num_heads % own.num_key_value_heads:
            raise ValueError(
                f"{path}: num_attention_heads must be a multiple of num_key_value_heads: "
                f"got {num_heads} and {own.num_key_value_heads}"
            )
    return config
