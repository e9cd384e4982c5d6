"""llama/layer_windows.py: how many tokens each layer sees, by its family's rule or by a list."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_llama import FIELDS, VARIANTS

from llama.config import LlamaConfig, read_config
from llama.rope_scaling import Rope, YarnRopeScaling

EXAONE4, OLMO3 = VARIANTS["exaone4"], VARIANTS["olmo3"]


def read(folder: Path, fields: dict[str, Any], *left_out: str) -> LlamaConfig:
    given = {name: value for name, value in (FIELDS | fields).items() if name not in left_out}
    (folder / "config.json").write_text(json.dumps(given))
    return read_config(folder)


def test_all_layers_but_every_fourth_see_a_window(tmp_path: Path) -> None:
    for fields in (EXAONE4, OLMO3):
        more = fields | {"num_hidden_layers": 5}
        bare = read(tmp_path, more, "layer_types", "sliding_window", "sliding_window_pattern")
        assert bare.windows == (4096, 4096, 4096, None, 4096)
    other = EXAONE4 | {"num_hidden_layers": 3, "sliding_window_pattern": 2}
    assert read(tmp_path, other, "layer_types").windows == (8, None, 8)
    # a pattern of letters is not read where the layers are listed
    kinds = ["full_attention", "sliding_attention"]
    assert read(tmp_path, EXAONE4 | {"layer_types": kinds}).windows == (None, 8)
    with pytest.raises(ValueError, match="sliding_window_pattern must be a positive integer"):
        read(tmp_path, EXAONE4, "layer_types")


@pytest.mark.parametrize("variant", ["qwen2", "qwen3"])
def test_layers_from_the_29th_on_see_a_window_where_nothing_is_said(
    tmp_path: Path, variant: str
) -> None:
    switched = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 30}
    config = read(tmp_path, VARIANTS[variant] | switched, "max_window_layers")
    assert config.windows == (None,) * 28 + (8, 8)


@pytest.mark.parametrize(
    "variant", ["ministral", "olmo3", "command-r7b", "gemma2", "gemma3", "gemma4", "gpt-oss"]
)
def test_families_that_have_windows_need_their_size_whatever_the_layers_see(
    tmp_path: Path, variant: str
) -> None:
    full = VARIANTS[variant] | {"layer_types": ["full_attention"] * 2}
    assert read(tmp_path, full).windows == (None, None)
    for fields in (full, VARIANTS[variant]):
        with pytest.raises(ValueError, match=r"sliding_window must be the tokens .*: got null, w"):
            read(tmp_path, fields | {"sliding_window": None})


def test_layers_without_a_window_are_not_rotated_in_exaone_4(tmp_path: Path) -> None:
    rope = Rope(10000.0)
    assert read(tmp_path, EXAONE4).ropes == (rope, None)
    # its small model has no windows at all, and rotates everywhere
    small = {"sliding_window": None, "sliding_window_pattern": None}
    config = read(tmp_path, EXAONE4 | small, "layer_types")
    assert (config.windows, config.ropes) == ((None, None), (rope, rope))
    full = {"layer_types": ["full_attention"] * 2}
    assert read(tmp_path, EXAONE4 | small | full).ropes == (rope, rope)
    # windows that no layer has
    assert read(tmp_path, EXAONE4 | full).ropes == (None, None)


def test_rope_theta_is_of_the_layers_without_a_window_in_olmo_3(tmp_path: Path) -> None:
    assert read(tmp_path, OLMO3, "rope_scaling").ropes == (Rope(5e5), Rope(10000.0))
    assert read(tmp_path, OLMO3, "rope_scaling", "rope_theta").ropes == (Rope(5e5), Rope(5e5))
    # and so is the scaling
    scaled = read(tmp_path, OLMO3).ropes[1]
    assert scaled is not None
    assert isinstance(scaled.scaling, YarnRopeScaling)
