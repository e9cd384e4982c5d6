"""export/gguf_architecture.py: what llama.cpp computes otherwise is refused by name, or said."""

from pathlib import Path
from typing import Any

import pytest
from support.gguf_cases import write_model
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint

from checkpoint.opening import open_checkpoint
from export.gguf_architecture import (
    ARCHITECTURES,
    architecture_of,
    has_architecture,
    remarks_of,
)
from llama.families import FAMILIES
from llama.towers import TOWERS

CAPS = "caps scores and logits always"


@pytest.mark.parametrize(
    ("variant", "changes", "reason"),
    [
        ("grouped-query", {"hidden_act": "gelu_pytorch_tanh"}, "activation silu, not gelu_tanh"),
        ("qwen2", {"head_dim": 12}, "qwen2 has heads of 32 numbers together, not 48"),
        ("qwen3", {"attention_bias": True}, "qwen3 has no biases of qkv and o;"),
        ("phi3", {"head_dim": 8, "hidden_size": 48}, "phi3 has heads of 48 numbers together"),
        (
            "phi3",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "does not scale rotary positions by LinearRopeScaling",
        ),
        (
            "qwen2",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            "qwen2 does not scale rotary positions by Llama3RopeScaling",
        ),
        ("yarn", {}, "llama does not scale rotary positions by YarnRopeScaling"),
        ("gemma2", {"query_pre_attn_scalar": 6}, "divides scores by the root of 12, not of 6"),
        ("gemma2", {"attn_logit_softcapping": None}, CAPS),
        ("gemma2", {"final_logit_softcapping": None}, CAPS),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "windows in every other layer"),
        ("gemma2", {"tie_word_embeddings": False}, "ties the head to the embeddings"),
        ("gemma2", {"hidden_activation": "silu"}, "activation gelu_tanh, not silu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    tmp_path: Path, variant: str, changes: dict[str, Any], reason: str
) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "model", variant, **changes))
    with pytest.raises(ValueError, match=f"--gguf must compute what .*{reason}.* leave --gguf out"):
        architecture_of(checkpoint)
    assert not has_architecture(checkpoint)


def test_the_largest_gemma_divides_its_scores_by_another_root(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 46, "intermediate_size": 8}
    folder = write_model(tmp_path / "a", "gemma2", query_pre_attn_scalar=8, **changes)
    assert architecture_of(open_checkpoint(folder)).name == "gemma2"
    assert has_architecture(open_checkpoint(folder))
    folder = write_model(tmp_path / "b", "gemma2", query_pre_attn_scalar=12, **changes)
    with pytest.raises(ValueError, match="root of 8, not of 12"):
        architecture_of(open_checkpoint(folder))


def test_a_tower_whose_queries_are_scaled_is_refused(tmp_path: Path) -> None:
    text = FIELDS | VARIANTS["ministral3"]
    rope = {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}
    tower = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text | {"rope_parameters": rope},
    }
    tensors = {f"language_model.{name}": t for name, t in random_tensors(text).items()}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "tower", tower, tensors))
    with pytest.raises(ValueError, match="llama does not scale queries by their positions;"):
        architecture_of(checkpoint)


def test_every_family_has_an_architecture_or_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ARCHITECTURES.keys() <= FAMILIES.keys() | TOWERS.keys()
    checkpoint = open_checkpoint(write_model(tmp_path / "model", "mistral"))
    assert architecture_of(checkpoint).name == "llama"
    monkeypatch.delitem(ARCHITECTURES, "MistralForCausalLM")
    with pytest.raises(ValueError, match="got MistralForCausalLM, which GGUF has no architecture"):
        architecture_of(checkpoint)


def test_windows_and_long_rope_are_said(tmp_path: Path) -> None:
    def remarks(variant: str, **changes: Any) -> str:
        checkpoint = open_checkpoint(write_model(tmp_path / variant, variant, **changes))
        return "\n".join(remarks_of(checkpoint, architecture_of(checkpoint)))

    assert "no sliding windows: its answers are the model's up to 8 tokens" in remarks("mistral")
    assert remarks("mistral", sliding_window=128) == ""
    assert "up to 8 tokens" in remarks("qwen2")
    assert remarks("gemma2") == remarks("grouped-query") == ""
    assert "texts of up to 16 tokens with a context of at most that" in remarks("phi3")
