"""What programs make of an adapter's alphas, and how all of them make the same.

    PEFT, Quatrain     alpha / rank of each projection, or alpha / sqrt(rank) with use_rslora
    llama.cpp, Ollama  lora_alpha / rank of each projection: no rsLoRA, no alphas by pattern
    vLLM               lora_alpha / r of all projections, or lora_alpha / sqrt(r): no patterns
    SGLang             lora_alpha / r of all projections: no rsLoRA, no patterns

None of them refuses what it does not know. (Read in their sources in November 2026. Ollama takes
whole alphas only, and refuses others.)
"""

from collections.abc import Mapping
from dataclasses import replace

from lora.config import LoRAConfig, UpdateSize


def alpha_of(size: UpdateSize) -> float:
    """Find the alpha that gives an update its scaling without rsLoRA.

        alpha / rank = scaling

    It gives the scaling again to the last bit where the rank is a power of two or the alpha is a
    whole number; elsewhere it may give the next float64, which is the same in float32.
    """
    alpha = size.scaling * size.rank
    whole = (alpha + 0.5) // 1
    return whole if whole / size.rank == size.scaling else alpha


def plain(config: LoRAConfig, sizes: Mapping[str, UpdateSize]) -> LoRAConfig:
    """Describe the same update without rsLoRA, and without patterns where no projection differs.

    Args:
        sizes: of the updates, by path.
    """
    is_alike = len(set(sizes.values())) == 1
    has_patterns = bool(config.rank_pattern or config.alpha_pattern)
    if not config.use_rslora and not (is_alike and has_patterns):
        return config
    general = UpdateSize(config.r, config.scaling)
    if is_alike:
        general = next(iter(sizes.values()))
    alpha = alpha_of(general)
    alphas = {path: alpha_of(size) for path, size in sizes.items()}
    return replace(
        config,
        r=general.rank,
        lora_alpha=alpha,
        use_rslora=False,
        rank_pattern={} if is_alike else config.rank_pattern,
        alpha_pattern={path: each for path, each in alphas.items() if each != alpha},
    )


def misreaders(config: LoRAConfig, sizes: Mapping[str, UpdateSize]) -> list[str]:
    """Name the programs that compute another update than an adapter without rsLoRA describes."""
    readings = {
        "llama.cpp and Ollama": [config.lora_alpha / size.rank for size in sizes.values()],
        "vLLM and SGLang": [config.lora_alpha / config.r for _ in sizes],
    }
    scalings = [size.scaling for size in sizes.values()]
    return [names for names, reading in readings.items() if reading != scalings]
