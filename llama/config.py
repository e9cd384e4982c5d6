"""config.json of a checkpoint: read, checked, refused where it asks for what the model does not
compute.

"What it asks for" is what transformers' class of that architecture does with the same file: a field
that changes its function is either computed here or refused; a field that it ignores
(pretraining_tp, initializer_range, temperature) is ignored, and an unknown one is refused if it is
set. `llama/config_fields.py` has the lists.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreign.json_text import read_object
from foreign.reading import Reading
from kernels.glu import Activation
from kernels.masked_attention_tiles import MAX_HEAD
from llama.config_fields import COMPUTED, ONE_VALUE, WITHOUT_EFFECT
from llama.families import ACTIVATION_NAMES, FAMILIES, Family, LayerNorms

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
DEFAULT_ROPE_THETA = 10000.0
# far beyond any model of today, and small enough to be laid out before the weights contradict
_MOST_POSITIONS = 2**31 - 1
_MOST_SIZE = 1 << 24
_MOST_HEADS = _MOST_HEAD_DIM = 1 << 16
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies; fields as in config.json's
    rope_scaling."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LinearRopeScaling:
    """Positions divided by a factor."""

    factor: float


@dataclass(frozen=True)
class LongRopeScaling:
    """Phi-3's factors for each pair of dimensions (Ding et al. 2024, "LongRoPE"): other ones for
    sequences beyond the length that the model was first trained on."""

    short_factor: tuple[float, ...]  # (head_dim / 2,)
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float  # of cosines and sines


RopeScaling = Llama3RopeScaling | LinearRopeScaling | LongRopeScaling


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


@dataclass(frozen=True)
class _Fields:
    """A JSON object of a file, whose values are checked as they are taken; null counts as
    absent."""

    path: Path
    values: dict[str, Any]

    def _take(self, key: str, default: Any, what: str, is_valid: bool) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise ValueError(f"{self.path} must give {key}: the key is missing")
        if value is not None and not is_valid:
            raise ValueError(f"{self.path}: {key} must be {what}: got {value!r}")
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, most: int = _MOST_POSITIONS) -> int:
        value = self.values.get(key)
        is_positive = type(value) is int and value > 0
        what = f"at most {most:,}" if is_positive else "a positive integer"
        return self._take(key, default, what, type(value) is int and 0 < value <= most)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        is_valid = (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and 0 < value <= sys.float_info.max
        )
        return float(self._take(key, default, "a positive number", is_valid))

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        is_valid = isinstance(self.values.get(key), bool)
        return self._take(key, default, "true or false", is_valid)


def _read_fields(path: Path) -> _Fields:
    return _Fields(path, read_object(path))


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Read rope_theta and the scaling of its frequencies."""
    path, values = fields.path, fields.values
    # transformers 5 writes rope_parameters, with rope_theta inside; earlier versions rope_scaling
    given = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(
            f"{path}: rope_parameters and rope_scaling must agree: "
            f"got {given[0]!r} and {given[1]!r}"
        )
    rope = given[0] if given else {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{path}: rope_scaling must be one set of parameters: got {rope!r}")
    theta = fields.number("rope_theta", DEFAULT_ROPE_THETA)
    inner = _Fields(path, rope)
    theta = inner.number("rope_theta", theta)
    for scope in (fields, inner):
        if (share := scope.number("partial_rotary_factor", 1.0)) != 1:
            raise ValueError(f"{path}: partial_rotary_factor must be absent or 1: got {share}")
    kind = rope.get("rope_type", rope.get("type")) or "default"
    # dynamic scaling begins beyond max_position_embeddings, which no sequence here exceeds
    if kind in ("default", "dynamic"):
        return theta, None
    if kind == "linear":
        return theta, LinearRopeScaling(inner.number("factor"))
    if kind in ("longrope", "su"):
        return theta, _long_rope(fields, inner)
    if kind != "llama3":
        raise ValueError(
            f"{path}: rope_scaling must be absent, default, linear, dynamic, llama3 or longrope: "
            f"got {kind!r}"
        )
    scaling = Llama3RopeScaling(
        inner.number("factor"),
        inner.number("low_freq_factor"),
        inner.number("high_freq_factor"),
        inner.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            f"{path}: high_freq_factor must be above low_freq_factor: "
            f"got {scaling.high_freq_factor} and {scaling.low_freq_factor}"
        )
    original = scaling.original_max_position_embeddings
    if fields.integer("original_max_position_embeddings", original) != original:
        raise ValueError(
            f"{path}: original_max_position_embeddings must be the same inside rope_scaling and "
            f"outside: got {original} and {values['original_max_position_embeddings']}"
        )
    return theta, scaling


def _long_rope(fields: _Fields, scaling: _Fields) -> LongRopeScaling:
    """Read longrope's factors, and work out what they do to the cosines."""
    path = fields.path
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    num_pairs = fields.integer("head_dim", max(1, hidden_size // num_heads)) // 2
    factors = []
    for name in ("short_factor", "long_factor"):
        values = scaling.values.get(name)
        is_list = isinstance(values, list) and len(values) == num_pairs
        if not is_list or not all(type(v) in (int, float) and v > 0 for v in values or ()):
            raise ValueError(f"{path}: {name} must be {num_pairs} positive numbers: got {values!r}")
        factors.append(tuple(float(value) for value in values or ()))
    longest = fields.integer("max_position_embeddings")
    # where transformers looks for it
    inside = scaling.integer("original_max_position_embeddings", longest)
    original = fields.integer("original_max_position_embeddings", inside)
    factor = scaling.number("factor", longest / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    attention_factor = scaling.number("attention_factor", default)
    return LongRopeScaling(factors[0], factors[1], original, attention_factor)


def _eos_token_ids(fields: _Fields) -> tuple[int, ...] | None:
    value = fields.values.get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(
            f"{fields.path}: eos_token_id must be a token id or a list of them: got {value!r}"
        )
    return tuple(ids)


def _family(fields: _Fields) -> Family:
    """Find the family, and refuse what it does not know."""
    path, values = fields.path, fields.values
    architectures = values.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    name = named[0] if len(named) == 1 else None
    # a list or an object is no key of a table
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"{path} must describe one of the architectures {', '.join(FAMILIES)}: "
            f"got {architectures!r} (model_type {values.get('model_type')!r})"
            + ("; code that auto_map names is never run" if values.get("auto_map") else "")
        )
    family = FAMILIES[name]
    if values.get("model_type", family.model_type) != family.model_type:
        raise ValueError(
            f"{path}: model_type must be {family.model_type!r} with {name}: "
            f"got {values['model_type']!r}"
        )
    known = COMPUTED | family.fields | WITHOUT_EFFECT | ONE_VALUE.keys()
    unknown = sorted(key for key, value in values.items() if value and key not in known)
    if unknown:
        raise ValueError(
            f"{path} must hold fields that {name} has: got {unknown[0]} = "
            f"{values[unknown[0]]!r}; remove it or set it to null, which is safe if the field does "
            "not change what the model computes"
        )
    return family


def _windows(fields: _Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Read which layers see how many tokens."""
    path, values = fields.path, fields.values
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


def number_format(folder: Path) -> str | None:
    """Name what the quantization_config of config.json asks for; None where there is none.

    Whether weights are stored so the files say: the field outlives a conversion to 16 bits.
    """
    described = _read_fields(folder / CONFIG_NAME).values.get("quantization_config")
    if not isinstance(described, dict):
        return None if described is None else str(described)
    method = described.get("quant_method")
    in_4_bits, in_8_bits = described.get("load_in_4bit"), described.get("load_in_8bit")
    # early configs have no method
    if method not in (None, "bitsandbytes") or not (method or in_4_bits or in_8_bits):
        return str(method or "an unnamed method")
    if in_4_bits:
        # where none is given, transformers takes this one
        return f"bitsandbytes {described.get('bnb_4bit_quant_type') or 'fp4'}"
    return "bitsandbytes int8" if in_8_bits else "bitsandbytes"


def _check_function(fields: _Fields) -> None:
    """Refuse what another model than this one would be needed for."""
    path, values = fields.path, fields.values
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


def _activation(fields: _Fields, family: Family) -> Activation:
    name = fields.values.get(family.activation_field)
    if name is None:
        name = family.defaults.get(family.activation_field, "silu")
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        raise ValueError(
            f"{fields.path}: {family.activation_field} must be one of "
            f"{', '.join(ACTIVATION_NAMES)}: got {name!r}"
        )
    return ACTIVATION_NAMES[name]


def read_config(folder: Path) -> LlamaConfig:
    """Read and check a checkpoint's config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object, describes another architecture, lacks a field, has one
            of the wrong type or one this model does not compute.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"a checkpoint folder must hold {CONFIG_NAME}: none in {folder}")
    with Reading(path):
        return _checked(_read_fields(path))


def _checked(fields: _Fields) -> LlamaConfig:
    path = fields.path
    family = _family(fields)
    _check_function(fields)
    fields = _Fields(path, {**family.defaults, **fields.values})
    num_heads = fields.integer("num_attention_heads", most=_MOST_HEADS)
    hidden_size = fields.integer("hidden_size", most=_MOST_SIZE)
    has_head_dim = family.head_dim or fields.values.get("head_dim") is not None
    if not has_head_dim and hidden_size % num_heads:
        raise ValueError(
            f"{path}: hidden_size must be a multiple of num_attention_heads where head_dim is not "
            f"given: got {hidden_size} and {num_heads}"
        )
    generation_path = path.with_name(GENERATION_CONFIG_NAME)
    eos_token_ids = None
    if generation_path.is_file():
        eos_token_ids = _eos_token_ids(_read_fields(generation_path))
    if eos_token_ids is None:
        eos_token_ids = _eos_token_ids(fields)
    rope_theta, rope_scaling = _rope(fields)
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
