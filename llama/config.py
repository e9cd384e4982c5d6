"""config.json of a Llama checkpoint: read, checked, refused where it asks for what the model does
not compute.

"What it asks for" is what transformers' LlamaForCausalLM does with the same file: a field that
changes its function is either computed here or refused; a field that it ignores (pretraining_tp,
initializer_range, use_cache) is ignored.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURE = "LlamaForCausalLM"
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies; fields as in config.json's
    rope_scaling."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


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
    rope_scaling: Llama3RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
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

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        is_valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return self._take(key, default, "a positive integer", is_valid)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        is_valid = (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and 0 < value <= sys.float_info.max
        )
        return float(self._take(key, default, "a positive number", is_valid))

    def boolean(self, key: str, default: bool) -> bool:
        is_valid = isinstance(self.values.get(key), bool)
        return self._take(key, default, "true or false", is_valid)


def _read_fields(path: Path) -> _Fields:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object: got a {type(values).__name__}")
    return _Fields(path, values)


def _rope(fields: _Fields) -> tuple[float, Llama3RopeScaling | None]:
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
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{path}: rope_scaling must be absent, default or llama3: got {kind!r}")
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


def _check_function(fields: _Fields) -> None:
    """Refuse what another model than this one would be needed for."""
    path, values = fields.path, fields.values
    architectures = values.get("architectures")
    if architectures != [ARCHITECTURE]:
        raise ValueError(
            f"{path} must describe the architecture {ARCHITECTURE}: got {architectures!r} "
            f"(model_type {values.get('model_type')!r}); other families are not supported yet"
        )
    quantized = values.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{path} must describe 16- or 32-bit weights: got a checkpoint quantized with "
            f"{method!r}; use the original one, it is quantized to NF4 while it loads"
        )
    if (activation := values.get("hidden_act") or "silu") != "silu":
        raise ValueError(f"{path}: hidden_act must be 'silu': got {activation!r}")
    if (dropout := values.get("attention_dropout")) not in (None, 0):
        raise ValueError(
            f"{path}: attention_dropout must be 0: got {dropout!r}; "
            "set it to 0 to fine-tune without, the weights do not depend on it"
        )


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
    fields = _read_fields(path)
    _check_function(fields)
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if fields.values.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(
            f"{path}: hidden_size must be a multiple of num_attention_heads where head_dim is not "
            f"given: got {hidden_size} and {num_heads}"
        )
    generation_path = folder / GENERATION_CONFIG_NAME
    eos_token_ids = None
    if generation_path.is_file():
        eos_token_ids = _eos_token_ids(_read_fields(generation_path))
    if eos_token_ids is None:
        eos_token_ids = _eos_token_ids(fields)
    rope_theta, rope_scaling = _rope(fields)
    config = LlamaConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden_size // num_heads),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=fields.boolean("attention_bias", False),
        mlp_bias=fields.boolean("mlp_bias", False),
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
    return config
