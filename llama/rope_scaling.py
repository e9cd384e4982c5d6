"""One set of rotary positions that config.json asks for: rope_theta and the scaling of
frequencies. `llama/layer_ropes.py` finds the set of each layer."""

import math
from dataclasses import dataclass
from typing import Any

from foreign.json_fields import JsonFields


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
class Rope:
    """How fast the heads of a layer turn with their positions."""

    theta: float
    scaling: RopeScaling | None = None


def read_rope(
    fields: JsonFields,
    given: Any,  # the part of config.json that is about this set
    theta: float,  # where that part has none
) -> Rope:
    """Read one set of rotary positions."""
    path = fields.path
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{path}: rope_scaling must be one set of parameters: got {given!r}")
    inner = JsonFields(path, given)
    for scope in (fields, inner):
        if (share := scope.number("partial_rotary_factor", 1.0)) != 1:
            raise ValueError(f"{path}: partial_rotary_factor must be absent or 1: got {share}")
    return Rope(inner.number("rope_theta", theta), _read_scaling(fields, inner))


def _read_scaling(fields: JsonFields, inner: JsonFields) -> RopeScaling | None:
    kind = inner.values.get("rope_type", inner.values.get("type")) or "default"
    # dynamic scaling begins beyond max_position_embeddings, which no sequence here exceeds
    if kind in ("default", "dynamic"):
        return None
    if kind == "linear":
        return LinearRopeScaling(inner.number("factor"))
    if kind in ("longrope", "su"):
        return _read_long_rope(fields, inner)
    if kind == "llama3":
        return _read_llama3(fields, inner)
    raise ValueError(
        f"{fields.path}: rope_scaling must be absent, default, linear, dynamic, llama3 or "
        f"longrope: got {kind!r}"
    )


def _read_llama3(fields: JsonFields, inner: JsonFields) -> Llama3RopeScaling:
    path = fields.path
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
            f"outside: got {original} and {fields.values['original_max_position_embeddings']}"
        )
    return scaling


def _read_long_rope(fields: JsonFields, scaling: JsonFields) -> LongRopeScaling:
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
