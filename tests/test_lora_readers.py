"""lora/readers.py: one update whether a program knows rsLoRA and patterns or not."""

import math
from typing import Any

import numpy as np
import pytest

from lora.config import LoRAConfig, UpdateSize
from lora.readers import alpha_of, misreaders, plain

PATHS = [
    f"model.layers.{layer}.{name}" for layer in (1, 11) for name in ("self_attn.q_proj", "mlp.up")
]
ALPHAS = [*range(1, 129), 0.1, 0.5, 22.627416997969522]


def make(**changes: Any) -> LoRAConfig:
    return LoRAConfig(
        **{"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, **changes},
        target_modules=("q_proj", "up"),
    )


def sizes_of(config: LoRAConfig) -> dict[str, UpdateSize]:
    return {path: size for path in PATHS if (size := config.update_size(path))}


def read_by_llama_cpp(config: LoRAConfig) -> list[float]:
    """lora_alpha over the rank that the tensors have."""
    return [config.lora_alpha / size.rank for size in sizes_of(config).values()]


def read_by_vllm(config: LoRAConfig) -> list[float]:
    return [config.lora_alpha / config.r for _ in sizes_of(config)]


def scalings(config: LoRAConfig) -> list[float]:
    return [size.scaling for size in sizes_of(config).values()]


def test_an_alpha_without_rslora_scales_as_much_as_with_it() -> None:
    for rank in range(1, 513):
        for alpha in ALPHAS:
            scaling = alpha / math.sqrt(rank)
            folded = alpha_of(UpdateSize(rank, scaling))
            again = folded / rank
            if rank.bit_count() == 1:
                assert again == scaling, (rank, alpha)
            # elsewhere one float64 farther at most, the same in the float32 of the computation
            assert abs(again - scaling) <= math.ulp(scaling), (rank, alpha)
            assert np.float32(again) == np.float32(scaling), (rank, alpha)
            if math.isqrt(rank) ** 2 == rank and alpha == int(alpha):
                assert folded == alpha * math.isqrt(rank), (rank, alpha)


def test_an_alpha_out_of_range_is_refused() -> None:
    config = make(lora_alpha=1e308, use_rslora=True)
    with pytest.raises(ValueError, match="--lora-alpha must be positive: got inf"):
        plain(config, sizes_of(config))


ALIKE = {
    "rsLoRA": make(use_rslora=True),
    "rsLoRA by patterns": make(
        r=2, lora_alpha=3, use_rslora=True, rank_pattern={".*": 8}, alpha_pattern={".*": 16}
    ),
    "one rank by patterns": make(r=2, rank_pattern={"q_proj": 8, "up": 8}),
    "one alpha by patterns": make(alpha_pattern={r"layers\.\d+\..*": 4}),
    "patterns that fit nothing": make(rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 2}),
}


@pytest.mark.parametrize("config", ALIKE.values(), ids=ALIKE)
def test_where_projections_are_alike_every_program_reads_the_same(config: LoRAConfig) -> None:
    written = plain(config, sizes_of(config))
    assert sizes_of(written) == sizes_of(config)
    assert read_by_llama_cpp(written) == read_by_vllm(written) == scalings(config)
    assert (written.use_rslora, written.rank_pattern, written.alpha_pattern) == (False, {}, {})
    assert (written.lora_dropout, written.target_modules) == (0.1, ("q_proj", "up"))
    assert misreaders(written, sizes_of(written)) == []


LLAMA_CPP, VLLM = "llama.cpp and Ollama", "vLLM and SGLang"
UNLIKE = {
    "alphas": (make(alpha_pattern={"q_proj": 32}), [LLAMA_CPP, VLLM]),
    "ranks": (make(rank_pattern={"q_proj": 4}), [VLLM]),
    "ranks and alphas": (
        make(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 8}),
        [LLAMA_CPP],
    ),
    "ranks and rsLoRA": (make(use_rslora=True, rank_pattern={"q_proj": 4}), [LLAMA_CPP, VLLM]),
    "alphas and rsLoRA": (
        make(use_rslora=True, alpha_pattern={r"1\.mlp\.up": 1}),
        [LLAMA_CPP, VLLM],
    ),
}


@pytest.mark.parametrize(("config", "names"), UNLIKE.values(), ids=UNLIKE)
def test_where_they_differ_those_who_misread_are_named(
    config: LoRAConfig, names: list[str]
) -> None:
    written = plain(config, sizes_of(config))
    assert not written.use_rslora
    assert sizes_of(written) == sizes_of(config)
    assert misreaders(written, sizes_of(written)) == names
    for name, read in ((LLAMA_CPP, read_by_llama_cpp), (VLLM, read_by_vllm)):
        assert (read(written) != scalings(config)) == (name in names)


def test_patterns_that_are_needed_stay_as_they_came() -> None:
    config = make(rank_pattern={"q_proj": 4}, alpha_pattern={"layers.1.*": 8})
    assert plain(config, sizes_of(config)) is config
    assert plain(make(lora_alpha=10, r=3), sizes_of(make(lora_alpha=10, r=3))) == make(
        lora_alpha=10, r=3
    )
