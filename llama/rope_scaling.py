"""One set of rotary positions that config.json asks for: rope_theta and the scaling of
frequencies. `llama/layer_ropes.py` finds the set of each layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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

    short_factor: tuple[float, ...]  # of each pair of dimensions
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float  # of cosines and sines


@dataclass(frozen=True)
class YarnRopeScaling:
    """YaRN (Peng et al. 2023): positions divided by a factor for the pairs of dimensions that turn
    at most `beta_slow` times over the length that the model was first trained on, and kept for
    those that turn at least `beta_fast` times."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int
    attention_factor: float  # of cosines and sines
    truncate: bool  # whether the bounds between the pairs are whole numbers


@dataclass(frozen=True)
class ProportionalRopeScaling:
    """Gemma-4's rotation of a share of a head's pairs, the first ones, as slow as if all turned;
    the others stay."""

    share: float
    factor: float  # that positions are divided by


RopeScaling = (
    Llama3RopeScaling
    | LinearRopeScaling
    | LongRopeScaling
    | YarnRopeScaling
    | ProportionalRopeScaling
)
# what config.json calls it, in families that have it
PROPORTIONAL = "proportional"
SHARE = "partial_rotary_factor"
# turns over the first length, far beyond any model of today
_LEAST_TURNS, _MOST_TURNS = 1e-6, 1e6


@dataclass(frozen=True)
class QueryScaling:
    """Llama 4's factor of each query, which grows with its position: 1 before the length that the
    model was first trained on."""

    beta: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rope:
    """How fast the heads of a layer turn with their positions, and how queries grow with them."""

    theta: float
    scaling: RopeScaling | None = None
    query_scaling: QueryScaling | None = None


class Turn(NamedTuple):
    """How the heads of a layer turn, and how many of their dimensions; None: by nothing."""

    rope: Rope | None
    rotary_dim: int


def read_rope(
    fields: JsonFields,
    given: Any,  # the part of config.json that is about this set
    theta: float,  # where that part has none
    rotary_dim: int,  # of the dimensions that turn
    types: Mapping[str, str],
    scales_queries: bool = False,
) -> Rope:
    """Read one set of rotary positions.

    Args:
        types: the family's names of scalings.
        scales_queries: whether the family's queries grow with their positions.
    """
    path = fields.where
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{path}: rope_scaling must be one set of parameters: got {given!r}")
    inner = replace(fields, values=given)
    scaling = _read_scaling(fields, inner, rotary_dim // 2, types)
    query_scaling = _read_query_scaling(fields, inner) if scales_queries else None
    rope = Rope(inner.number("rope_theta", theta), scaling, query_scaling)
    if isinstance(rope.scaling, YarnRopeScaling) and rope.theta <= 1:
        raise ValueError(f"{path}: rope_theta must be above 1 with yarn: got {rope.theta}")
    return rope


def _read_scaling(
    fields: JsonFields, inner: JsonFields, num_pairs: int, types: Mapping[str, str]
) -> RopeScaling | None:
    kind = inner.values.get("rope_type", inner.values.get("type")) or "default"
    kind = types.get(kind, kind) if isinstance(kind, str) else kind
    # dynamic scaling begins beyond max_position_embeddings, which no sequence here exceeds
    if kind in ("default", "dynamic"):
        return None
    if kind == "linear":
        return LinearRopeScaling(inner.number("factor"))
    if kind == "longrope":
        return _read_long_rope(fields, inner, num_pairs)
    if kind == "yarn":
        return _read_yarn(fields, inner)
    if kind == "llama3":
        return _read_llama3(fields, inner)
    if kind == PROPORTIONAL and kind in types:
        return _read_proportional(inner)
    raise ValueError(
        f"{fields.where}: rope_scaling must be absent, default, linear, dynamic, llama3, longrope "
        f"or yarn: got {kind!r}"
    )


def _read_proportional(inner: JsonFields) -> ProportionalRopeScaling:
    share = inner.number(SHARE, 1.0)
    if share > 1:
        raise ValueError(f"{inner.where}: {SHARE} must be at most 1: got {share}")
    return ProportionalRopeScaling(share, inner.number("factor", 1.0))


def _read_llama3(fields: JsonFields, inner: JsonFields) -> Llama3RopeScaling:
    path = fields.where
    scaling = Llama3RopeScaling(
        inner.number("factor"),
        inner.number("low_freq_factor"),
        inner.number("high_freq_factor"),
        _read_original(fields, inner),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            f"{path}: high_freq_factor must be above low_freq_factor: "
            f"got {scaling.high_freq_factor} and {scaling.low_freq_factor}"
        )
    return scaling


def _read_original(fields: JsonFields, inner: JsonFields) -> int:
    """Read the length of the first training, which is given inside of the set, or outside."""
    longest = fields.integer("max_position_embeddings")
    outside = fields.integer("original_max_position_embeddings", longest)
    inside = inner.integer("original_max_position_embeddings", outside)
    if inside != outside and fields.values.get("original_max_position_embeddings") is not None:
        raise ValueError(
            f"{fields.where}: original_max_position_embeddings must be the same inside "
            f"rope_scaling and outside: got {inside} and {outside}"
        )
    return inside


def _read_query_scaling(fields: JsonFields, inner: JsonFields) -> QueryScaling:
    return QueryScaling(inner.number("llama_4_scaling_beta"), _read_original(fields, inner))


def _read_yarn(fields: JsonFields, inner: JsonFields) -> YarnRopeScaling:
    longest = fields.integer("max_position_embeddings")
    original = _read_original(fields, inner)
    factor = inner.number("factor", longest / original)
    mscale, mscale_all_dim = (inner.optional_number(n) for n in ("mscale", "mscale_all_dim"))
    default = _yarn_temperature(factor, 1)
    if mscale is not None and mscale_all_dim is not None:
        default = _yarn_temperature(factor, mscale) / _yarn_temperature(factor, mscale_all_dim)
    scaling = YarnRopeScaling(
        factor,
        inner.number("beta_fast", 32),
        inner.number("beta_slow", 1),
        original,
        inner.number("attention_factor", default),
        inner.boolean("truncate", True),
    )
    if not _LEAST_TURNS <= scaling.beta_slow < scaling.beta_fast <= _MOST_TURNS:
        raise ValueError(
            f"{fields.where}: beta_fast must be above beta_slow, and both within {_LEAST_TURNS:g} "
            f"and {_MOST_TURNS:g}: got {scaling.beta_fast} and {scaling.beta_slow}"
        )
    return scaling


def _yarn_temperature(factor: float, mscale: float) -> float:
    """The root of 1 / t in YaRN's equation 22, which its authors fitted."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _read_long_rope(fields: JsonFields, scaling: JsonFields, num_pairs: int) -> LongRopeScaling:
    """Read longrope's factors, and work out what they do to the cosines."""
    path = fields.where
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
    if original < 2:
        raise ValueError(
            f"{path}: original_max_position_embeddings must be at least 2: got {original}"
        )
    factor = scaling.number("factor", longest / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    attention_factor = scaling.number("attention_factor", default)
    return LongRopeScaling(factors[0], factors[1], original, attention_factor)
