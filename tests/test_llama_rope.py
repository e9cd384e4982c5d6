"""llama/rope.py: frequencies as transformers has them, and as they were published."""

import json
import math
from pathlib import Path

import pytest
import torch
from support.llama_peers import tiny_peer
from support.tiny_llama import FIELDS, VARIANTS

from llama.config import LlamaConfig, read_config
from llama.rope import rope_frequencies
from llama.rope_scaling import Llama3RopeScaling

EPS = torch.finfo(torch.float32).eps


def published_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Llama 3.1's rule by cases, as Meta published it, in float64."""
    frequencies = []
    for pair in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * pair / config.head_dim)
        if (scaling := config.rope_scaling) is not None:
            assert isinstance(scaling, Llama3RopeScaling)
            wavelength = 2 * math.pi / frequency
            original = scaling.original_max_position_embeddings
            if wavelength > original / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength >= original / scaling.high_freq_factor:
                smooth = original / wavelength - scaling.low_freq_factor
                smooth /= scaling.high_freq_factor - scaling.low_freq_factor
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    return torch.tensor(frequencies, dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_frequencies_equal_transformers_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, variant: str
) -> None:
    peer = tiny_peer(tmp_path_factory, variant)
    # they have computed a long sequence
    actual = rope_frequencies(read_config(peer.checkpoint), is_long=True)
    assert torch.equal(actual, peer.outputs["inv_freq"])


@pytest.mark.parametrize(
    "name", ["Llama-2-7b-hf", "Meta-Llama-3-8B", "Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.2-1B"]
)
def test_frequencies_of_real_configs_follow_the_published_rule(assets: Path, name: str) -> None:
    config = read_config(assets / "configs" / name)
    actual = rope_frequencies(config)
    expected = published_frequencies(config)
    assert actual.shape == expected.shape == (config.head_dim // 2,)
    assert actual.isfinite().all()
    # a power, a quotient and at most six operations of the interpolation, each rounded; the power's
    # exponent is itself rounded, which log(theta) magnifies
    tolerance = (8 + math.log(config.rope_theta)) * EPS
    assert ((actual.double() - expected).abs() <= tolerance * expected).all()


def test_scaling_keeps_the_fast_and_divides_the_slow_frequencies(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS | VARIANTS["llama3-rope"]))
    config = read_config(tmp_path)
    plain = 1.0 / config.rope_theta ** (torch.arange(0, 12, 2).float() / 12)
    scaled = rope_frequencies(config)
    wavelengths = 2 * math.pi / plain
    slow, fast = wavelengths > 16, wavelengths < 4
    assert slow.any()
    assert (~slow).any()
    assert torch.equal(scaled[slow], plain[slow] / 8)
    assert torch.equal(scaled[fast], plain[fast])
