"""benchmarks/random_model.py: the shapes that have a name, and that their models can be trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.real_sizes import REAL

from benchmarks.random_model import CONFIGS, FAMILY_FIELDS, random_model
from benchmarks.train_step_ours import make_step
from foreign.json_fields import JsonFields
from llama.config import LlamaConfig, check_config
from llama.model import projections
from lora.config import LoRAConfig
from optim.adamw import AdamW
from optim.arena import GradientArena
from run.config import TrainConfig

CPU = torch.device("cpu")
PUBLISHED = {
    "gemma-3-12b": "Gemma-3-12B",
    "phi-4-mini": "Phi-4-mini",
    "smollm3-3b": "SmolLM3-3B",
    "gpt-oss-20b": "gpt-oss-20b",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "llama-3.2-1b": "Llama-3.2-1B",
}


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "tie_word_embeddings"),
)


def sizes(config: LlamaConfig) -> list[int]:
    experts = config.experts
    found = [getattr(config, field) for field in SIZES]
    if experts:
        found += [experts.num_experts, experts.num_chosen, experts.width]
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_shape_is_the_published_one(name: str) -> None:
    published = check_config(JsonFields(Path(name), REAL[PUBLISHED[name]]))
    assert sizes(CONFIGS[name]) == sizes(published)


def test_families_have_their_own_layers() -> None:
    gemma, phi, smol, oss = (CONFIGS[name] for name in FAMILY_FIELDS)
    # five of six see a window, shorter than a row of the benchmarks
    assert gemma.windows[:6] == (1024,) * 5 + (None,)
    assert gemma.qk_norm
    assert (phi.rotary_dim, phi.head_dim, phi.is_fused) == (96, 128, True)
    assert [rope is None for rope in smol.ropes[:4]] == [False, False, False, True]
    assert oss.windows[:2] == (128, None)
    assert oss.has_sinks


def tiny(config: LlamaConfig) -> LlamaConfig:
    """Make a shape small, of which each kind of layer stays."""
    experts = config.experts
    if experts:
        experts = replace(experts, num_experts=4, num_chosen=2, width=64, has_experts=(True,) * 6)
    return replace(
        config,
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rotary_dim=32 * config.rotary_dim // config.head_dim,
        ropes=config.ropes[:6],
        windows=tuple(window and 4 for window in config.windows[:6]),
        experts=experts,
    )


@pytest.mark.parametrize("name", [*FAMILY_FIELDS, "qwen2.5-3b"])
def test_a_model_of_a_shape_has_all_values_and_can_be_trained(name: str) -> None:
    torch.manual_seed(0)
    config = tiny(CONFIGS[name])
    model = random_model(config, CPU, torch.float32)
    for tensor in model.frozen_tensors():
        assert tensor.device == CPU
        assert torch.isfinite(tensor.float()).all()
    for _, group in model.frozen_groups():
        if group.bias is not None:
            assert 0.01 < group.bias.std() < 0.03
    model.attach_lora(LoRAConfig(4, 8.0, 0.0, projections(config)), 0)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamW(GradientArena(parameters), weight_decay=0.0)
    step = make_step(model, TrainConfig(learning_rate=1e-2), ["keep"] * 6, optimizer)
    ids = torch.randint(96, (2, 16))
    losses = [float(step(ids)) for _ in range(8)]
    assert losses[-1] < losses[0] < 8
