"""llama/layer_heads.py: which heads each layer has, and what of Gemma-4 is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_llama import FIELDS, VARIANTS

from llama.config import LlamaConfig, read_config
from llama.layer_heads import Heads
from llama.rope_scaling import ProportionalRopeScaling, Rope

GEMMA4 = VARIANTS["gemma4"]
GLOBAL = ("global_head_dim", "num_global_key_value_heads")
WINDOWED, FULL = "sliding_attention", "full_attention"


def read(folder: Path, fields: dict[str, Any]) -> LlamaConfig:
    kept = {key: value for key, value in (FIELDS | fields).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return read_config(folder)


def test_layers_without_a_window_have_heads_of_their_own(tmp_path: Path) -> None:
    config = read(tmp_path, GEMMA4)
    own = (Heads(2, 12, 12), Heads(1, 16, 16, has_values=False))
    assert (config.own_heads, config.windows) == (own, (8, None))
    assert [config.qk_norm_widths(layer) for layer in range(2)] == [(12, 12), (16, 16)]
    # transformers 5 writes the layers, and pads their numbers
    listed = {"01": {"head_dim": 16, "num_key_value_heads": 1}}
    new = GEMMA4 | dict.fromkeys(GLOBAL, ...) | {"per_layer_config": listed}
    assert read(tmp_path, new) == config
    # the count is that of all layers, unless keys are values
    config = read(tmp_path, GEMMA4 | {"attention_k_eq_v": False})
    assert config.heads(1) == Heads(2, 16, 16)
    config = read(tmp_path, GEMMA4 | {"per_layer_config": {}})
    assert config.heads(1) == Heads(2, 12, 12, has_values=False)


def test_other_families_have_the_same_heads_everywhere(tmp_path: Path) -> None:
    config = read(tmp_path, VARIANTS["gemma3"])
    assert config.own_heads == ()
    assert [config.heads(layer) for layer in range(2)] == [Heads(2, 12, 12)] * 2


def test_gemma4_has_transformers_defaults(tmp_path: Path) -> None:
    own = ("architectures", "model_type", "hidden_size_per_layer_input")
    fields = dict.fromkeys((*GEMMA4, "num_key_value_heads", "rope_theta"), ...)
    fields |= {key: GEMMA4[key] for key in own} | {"num_hidden_layers": 8}
    config = read(tmp_path, fields)
    # the last layer sees all tokens, whatever the pattern says
    sees_window = [True] * 5 + [False, True, False]
    assert config.windows == tuple(512 if sees else None for sees in sees_window)
    wide, narrow = Heads(4, 512, 512), Heads(4, 256, 256)
    assert config.own_heads == tuple(narrow if sees else wide for sees in sees_window)
    full = Rope(1e6, ProportionalRopeScaling(0.25, 1.0))
    assert config.ropes == tuple(Rope(1e4) if sees else full for sees in sees_window)
    assert (config.score_scale, config.norm_offset) == (1, 0)
    assert (config.tie_word_embeddings, config.final_logit_softcapping) == (True, None)


def test_the_last_layer_sees_all_tokens(tmp_path: Path) -> None:
    assert read(tmp_path, GEMMA4 | {"layer_types": [WINDOWED] * 2}).windows == (8, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # transformers' default
        (
            {"hidden_size_per_layer_input": ...},
            "hidden_size_per_layer_input must be 0, false or null: got 256; such a model needs a "
            "second table of embeddings",
        ),
        ({"num_kv_shared_layers": 1}, "needs layers that attend to the keys and values of an ear"),
        ({"enable_moe_block": True}, "enable_moe_block must .*: got true; .* experts beside each"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling must be 0, false"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention must be false or"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention must be false or"),
        ({"query_pre_attn_scalar": 16}, "got query_pre_attn_scalar = 16"),
        ({"global_head_dim": 15}, "must be even, .*: got 15 in layer 1"),
        ({"num_global_key_value_heads": 3}, "must be a multiple of .*: got 4 and 3"),
        ({"per_layer_config": [1]}, r"per_layer_config must give head_dim .*: got '': \[1\]"),
        ({"per_layer_config": {"2": {"head_dim": 16}}}, "some of 2 layers .*: got '2'"),
        ({"per_layer_config": {"1": {"sliding_window": 4}}}, "got '1': {'sliding_window': 4}"),
        (
            {"per_layer_config": {"1": {"head_dim": 0}}},
            "per_layer_config 1: head_dim must be a positive integer: got 0",
        ),
        (
            {
                "layer_types": [FULL] * 2,
                "per_layer_config": {"1": {"head_dim": 16}},
            },
            "must give the same heads for all layers that see a window, and for all others",
        ),
        (
            {"rope_parameters": {FULL: {"rope_type": "proportional", "partial_rotary_factor": 2}}},
            "partial_rotary_factor must be at most 1: got 2",
        ),
        (
            {"rope_parameters": {WINDOWED: {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor must be absent or 1: got 0.5",
        ),
    ],
)
def test_what_is_not_computed_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, GEMMA4 | fields)


def test_other_families_have_no_proportional_positions(tmp_path: Path) -> None:
    rope = {"rope_type": "proportional", "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"rope_scaling must be absent, .*: got 'proportional'"):
        read(tmp_path, {"rope_parameters": rope})
