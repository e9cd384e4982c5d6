"""llama/rope.py: frequencies as transformers has them, and as they were published."""

import json
import math
from pathlib import Path

import pytest
import torch
from support.llama_peers import tiny_peer
from support.tiny_llama import FIELDS, VARIANTS

from llama.config import LlamaConfig, read_config
from llama.rope import query_factors, rope_frequencies
from llama.rope_scaling import Llama3RopeScaling, QueryScaling, Rope, YarnRopeScaling

EPS = torch.finfo(torch.float32).eps


def rope_of(config: LlamaConfig) -> Rope:
    """The rotary positions that all layers share."""
    (rope,) = config.distinct_ropes
    assert rope is not None
    return rope


def published_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Llama 3.1's rule by cases, as Meta published it, in float64."""
    frequencies = []
    for pair in range(head_dim // 2):
        frequency = rope.theta ** (-2 * pair / head_dim)
        if (scaling := rope.scaling) is not None:
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
    config = read_config(peer.checkpoint)
    turns = [turn for turn in config.distinct_turns if turn.rope is not None]
    # they have computed a long sequence
    actual = [rope_frequencies(*turn, is_long=True) for turn in turns]
    expected = [t for name, t in peer.outputs.items() if name.endswith("inv_freq")]
    assert len(actual) == len(expected)
    assert all(any(torch.equal(a, e) for e in expected) for a in actual)


@pytest.mark.parametrize(
    "name", ["Llama-2-7b-hf", "Meta-Llama-3-8B", "Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.2-1B"]
)
def test_frequencies_of_real_configs_follow_the_published_rule(assets: Path, name: str) -> None:
    config = read_config(assets / "configs" / name)
    rope = rope_of(config)
    actual = rope_frequencies(rope, config.head_dim)
    expected = published_frequencies(rope, config.head_dim)
    assert actual.shape == expected.shape == (config.head_dim // 2,)
    assert actual.isfinite().all()
    # a power, a quotient and at most six operations of the interpolation, each rounded; the power's
    # exponent is itself rounded, which log(theta) magnifies
    tolerance = (8 + math.log(rope.theta)) * EPS
    assert ((actual.double() - expected).abs() <= tolerance * expected).all()


@pytest.mark.parametrize("truncate", [False, True])
def test_yarn_of_a_real_model_follows_the_published_rule(truncate: bool) -> None:
    # Qwen3 for 131,072 tokens
    scaling = YarnRopeScaling(4.0, 32.0, 1.0, 32768, 1.0, truncate)
    actual = rope_frequencies(Rope(1e6, scaling), 128)
    turns = [32768 / (2 * math.pi * 1e6 ** (pair / 64)) for pair in range(64)]
    # between the pairs that turn 32 times and once, straight over their numbers
    low, high = (math.log(32768 / (2 * math.pi * n), 1e6) * 64 for n in (32, 1))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    for pair, turned in enumerate(turns):
        plain = 1e6 ** (-pair / 64)
        share = min(max((pair - low) / (high - low), 0), 1)
        expected = plain * (1 - share) + plain / 4 * share
        if truncate:
            assert (share == 0) == (pair <= low)
        else:
            assert (share == 0, share == 1) == (turned >= 32, turned <= 1)
        # as above, and the ramp's four operations
        tolerance = (12 + math.log(1e6)) * EPS * expected
        assert abs(float(actual[pair]) - expected) <= tolerance, pair


def test_scaling_keeps_the_fast_and_divides_the_slow_frequencies(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS | VARIANTS["llama3-rope"]))
    rope = rope_of(read_config(tmp_path))
    plain = 1.0 / rope.theta ** (torch.arange(0, 12, 2).float() / 12)
    scaled = rope_frequencies(rope, 12)
    wavelengths = 2 * math.pi / plain
    slow, fast = wavelengths > 16, wavelengths < 4
    assert slow.any()
    assert (~slow).any()
    assert torch.equal(scaled[slow], plain[slow] / 8)
    assert torch.equal(scaled[fast], plain[fast])


def test_a_query_grows_by_the_logarithm_of_the_lengths_before_it() -> None:
    # Ministral-3's, up to its last position
    rope = Rope(1e6, query_scaling=QueryScaling(0.1, 16384))
    positions = [0, 1, 16383, 16384, 32767, 32768, 131072, 262143]
    factors = query_factors(rope, torch.tensor(positions))
    assert factors is not None
    assert factors.dtype == torch.float32
    expected = [1 + 0.1 * math.log(1 + position // 16384) for position in positions]
    # the logarithm, the product and the sum, each rounded
    assert (factors.double() - torch.tensor(expected).double()).abs().max() <= 3 * EPS
    assert factors[:3].tolist() == [1, 1, 1]
    assert query_factors(Rope(1e6), torch.arange(3)) is query_factors(None, torch.arange(3)) is None
