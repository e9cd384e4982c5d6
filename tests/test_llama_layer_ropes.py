"""llama/layer_ropes.py: which rotary positions each layer has, from old and new fields."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.tiny_llama import FIELDS, VARIANTS

from llama.config import LlamaConfig, read_config
from llama.rope_scaling import LinearRopeScaling, QueryScaling, Rope

GEMMA3 = VARIANTS["gemma3"]
SMOLLM3 = VARIANTS["smollm3"] | {"rope_scaling": None}
PHI3, GLM4 = VARIANTS["phi3"], VARIANTS["glm4"]
MINISTRAL3 = VARIANTS["ministral3"]
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}


def read(folder: Path, fields: dict[str, Any]) -> LlamaConfig:
    (folder / "config.json").write_text(json.dumps(FIELDS | fields))
    return read_config(folder)


def test_layers_with_a_window_have_rotary_positions_of_their_own(tmp_path: Path) -> None:
    config = read(tmp_path, GEMMA3)
    windowed, full = Rope(100.0), Rope(10000.0, LinearRopeScaling(4.0))
    assert (config.windows, config.ropes) == ((8, None), (windowed, full))
    assert config.distinct_ropes == [windowed, full]
    # transformers 5 writes them like this
    sets: dict[str, Any] = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    new = {key: value for key, value in GEMMA3.items() if not key.startswith("rope_")}
    del new["sliding_window_pattern"]
    kinds = ["sliding_attention", "full_attention"]
    assert read(tmp_path, new | {"rope_parameters": sets, "layer_types": kinds}) == config
    # the order of the layers is theirs
    config = read(tmp_path, new | {"rope_parameters": sets, "layer_types": kinds[::-1]})
    assert (config.windows, config.ropes) == ((None, 8), (full, windowed))


def test_gemma3_has_transformers_defaults(tmp_path: Path) -> None:
    own = ("architectures", "model_type")
    bare = {key: FIELDS[key] for key in FIELDS if key not in (*GEMMA3, "rope_theta")}
    fields = bare | {key: GEMMA3[key] for key in own} | {"num_hidden_layers": 7}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path)
    windowed = (True,) * 5 + (False, True)
    assert config.windows == tuple(4096 if sees else None for sees in windowed)
    assert config.ropes == tuple(Rope(1e4) if sees else Rope(1e6) for sees in windowed)
    assert (config.head_dim, config.query_pre_attn_scalar) == (256, 256)
    assert (config.final_logit_softcapping, config.tie_word_embeddings) == (None, True)


def test_layers_that_are_listed_do_not_rotate_their_heads(tmp_path: Path) -> None:
    many = {k: v for k, v in SMOLLM3.items() if k != "no_rope_layer_interval"}
    many |= {"num_hidden_layers": 5}
    rope = Rope(10000.0)
    config = read(tmp_path, many)
    assert config.ropes == (rope, rope, rope, None, rope)
    # these see a window, where the family has any
    assert config.windows == (None, None, None, 8, None)
    assert read(tmp_path, many | {"use_sliding_window": False}).windows == (None,) * 5
    listed = many | {"no_rope_layers": [0, 1, 1, 0, 1, 1], "layer_types": ["full_attention"] * 5}
    config = read(tmp_path, listed)
    assert config.ropes == (None, rope, rope, None, rope)
    assert config.windows == (None,) * 5
    assert config.distinct_ropes == [None, rope]


def test_queries_grow_beyond_the_length_of_the_first_training(tmp_path: Path) -> None:
    config = read(tmp_path, MINISTRAL3)
    (rope,) = config.distinct_ropes
    assert rope is not None
    assert rope.query_scaling == QueryScaling(0.7, 8)
    # transformers' class of another family does not read the field
    mistral = MINISTRAL3 | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (rope,) = read(tmp_path, mistral).distinct_ropes
    assert rope is not None
    assert rope.query_scaling is None


def test_one_length_decides_which_sequences_are_long(tmp_path: Path) -> None:
    assert read(tmp_path, GEMMA3).short_length is None
    assert read(tmp_path, SMOLLM3).short_length is None
    long = LONGROPE | {"original_max_position_embeddings": 16}
    config = read(tmp_path, SMOLLM3 | {"no_rope_layers": [0, 1], "rope_scaling": long})
    assert config.short_length == 16
    assert [config.is_long(num_tokens) for num_tokens in (16, 17)] == [False, True]


def test_a_part_of_each_head_turns(tmp_path: Path) -> None:
    def dims(fields: dict[str, Any]) -> tuple[int, int]:
        config = read(tmp_path, fields)
        return config.head_dim, config.rotary_dim

    plain = {k: v for k, v in PHI3.items() if k != "partial_rotary_factor"}
    plain |= {"rope_scaling": None}
    assert dims(plain) == (8, 8)
    assert dims(plain | {"partial_rotary_factor": 0.75}) == (8, 6)
    # transformers 5 writes it inside, and rounds down
    inside = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.6}
    assert dims(plain | {"rope_parameters": inside}) == (8, 4)
    assert dims(plain | {"rope_parameters": inside, "partial_rotary_factor": 0.6}) == (8, 4)
    assert dims(GLM4) == (12, 6)
    assert dims(GLM4 | {"partial_rotary_factor": 1.0}) == (12, 12)
    assert dims(GEMMA3 | {"partial_rotary_factor": 1.0}) == (12, 12)
    assert [read(tmp_path, fields).is_interleaved for fields in (plain, GLM4)] == [False, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            GLM4 | {"partial_rotary_factor": 0.25},
            "head_dim must be even, and so the dimensions that turn, because rotary positions turn "
            "pairs: got 12 and 3",
        ),
        (GLM4 | {"partial_rotary_factor": 0.01}, "positions turn pairs: got 12 and 0"),
        (GLM4 | {"partial_rotary_factor": 1.5}, "partial_rotary_factor must be at most 1: got 1.5"),
        (
            GLM4
            | {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}},
            "partial_rotary_factor must be the same wherever it is given: got [0.5, 1.0]",
        ),
        (
            GEMMA3
            | {
                "rope_scaling": None,
                "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}},
            },
            "partial_rotary_factor must be absent or 1: got 0.5",
        ),
        (
            GEMMA3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            "rope_parameters must hold a set of parameters for each of sliding_attention and full",
        ),
        (GEMMA3 | {"rope_parameters": [1.0]}, "rope_parameters must hold a set of parameters"),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": 1.0}},
            "must be one set of parameters: got 1.0",
        ),
        (
            GEMMA3 | {"rope_parameters": {"full_attention": 2.0}},
            "must be one set of parameters: got 2.0",
        ),
        (GEMMA3 | {"rope_scaling": 8.0}, "must be one set of parameters: got 8.0"),
        (GEMMA3 | {"rope_local_base_freq": -1.0}, "rope_local_base_freq must be a positive number"),
        (GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive integ"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "got attn_logit_softcapping = 50.0"),
        (
            GEMMA3
            | {
                "head_dim": 8,
                "rope_scaling": None,
                "rope_parameters": {
                    "sliding_attention": LONGROPE | {"original_max_position_embeddings": 16},
                    "full_attention": LONGROPE | {"original_max_position_embeddings": 32},
                },
            },
            "original_max_position_embeddings must be the same in all sets of parameters: got [16,",
        ),
        (MINISTRAL3 | {"rope_parameters": None}, "must give llama_4_scaling_beta: the key is miss"),
        (
            MINISTRAL3 | {"partial_rotary_factor": 0.5},
            "partial_rotary_factor must be absent or 1: got 0.5",
        ),
        (SMOLLM3 | {"no_rope_layers": [1]}, "a 0 or a 1 for each of 2 layers: got [1]"),
        (SMOLLM3 | {"no_rope_layers": [1, "0"]}, "no_rope_layers must be a 0 or a 1 for each of"),
        (
            SMOLLM3 | {"no_rope_layer_interval": None},
            "must give no_rope_layer_interval: the key is",
        ),
        (SMOLLM3 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval must be a positive int"),
        ({"no_rope_layers": [1, 0]}, "got no_rope_layers = [1, 0]; remove it"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:40] if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, fields)
