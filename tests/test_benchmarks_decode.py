"""benchmarks/decode.py and its processes, on a tiny checkpoint; the limit's arithmetic."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_llama import FIELDS, VARIANTS

from benchmarks import decode, load, train_step
from benchmarks.decode import limit_row, run_provider
from benchmarks.decode_timing import Shape, parse_shape, random_prompts
from benchmarks.random_model import LLAMA_3_8B
from benchmarks.tables import decode_table
from benchmarks.train_step import prepare_checkpoint
from llama.config import read_config

# a peer's kernels want whole blocks
PEER_FIELDS = train_step.FIELDS | FIELDS | {"hidden_size": 64, "intermediate_size": 128}
SHAPES = ["1x5+4", "2x3+1"]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(load, "BLOCK_ELEMENTS", 1000)
    return prepare_checkpoint(tmp_path / "model", PEER_FIELDS)


@pytest.mark.parametrize("provider", ["ours", "hf"])
def test_a_provider_measures_every_shape(checkpoint: Path, provider: str) -> None:
    outcome = run_provider(provider, str(checkpoint), SHAPES, 2, 240)
    assert outcome.error is None
    assert [row["shape"] for row in outcome.rows] == SHAPES
    grown, prompts = outcome.rows
    assert grown["provider"] == provider
    assert grown["prompt_ms"] > 0
    # recorded with one digit behind the point, which is much of what a busy CPU makes
    assert grown["tokens_per_second"] == pytest.approx(1e3 / grown["ms_p50"], rel=1e-2, abs=0.05)
    # prompts alone have no rate of tokens
    assert "tokens_per_second" not in prompts
    assert ("torch" in outcome.versions) == (provider == "hf")


def test_shapes_read_as_they_are_written() -> None:
    assert parse_shape("8x256+128") == Shape(8, 256, 128)
    assert str(Shape(8, 256, 128)) == "8x256+128"
    for text in ("8x256", "8+256x128", "8x256+0", "x256+1", "8x256+128+1"):
        with pytest.raises(ValueError, match="must be PROMPTSxTOKENS"):
            parse_shape(text)


def test_prompts_are_the_same_for_all_and_hold_no_special_tokens() -> None:
    prompts = random_prompts(Shape(3, 7, 1), 50)
    assert prompts.shape == (3, 7)
    assert torch.equal(prompts, random_prompts(Shape(3, 7, 1), 50))
    assert prompts.min() >= 10
    assert prompts.max() < 50


def test_the_limit_is_what_a_token_reads() -> None:
    # 218 million weights a layer, the head in 16 bits, and the cache: 131,072 bytes a token
    weights = 32 * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336)
    expected = weights * 0.515869140625 + 128256 * 4096 * 2 + 8 * 384 * 131072
    row = limit_row(LLAMA_3_8B, Shape(8, 256, 256), 4000)
    assert row["ms_p50"] == pytest.approx(expected / 4e9, abs=1e-3)
    assert row["tokens_per_second"] == pytest.approx(8e3 / row["ms_p50"], rel=1e-3)


def test_the_limit_counts_each_layers_heads(tmp_path: Path) -> None:
    fields = FIELDS | VARIANTS["gemma4"] | {"num_global_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    # heads of 12 with keys and values, then of 16 with keys alone; the cache has both of both
    weights = (
        32 * (4 * 12 + 2 * 2 * 12 + 4 * 12) + 32 * (4 * 16 + 2 * 16 + 4 * 16) + 2 * 3 * 32 * 72
    )
    expected = weights * 0.515869140625 + 96 * 32 * 2 + 3 * 6 * 2 * 2 * 2 * (12 + 16)
    row = limit_row(read_config(tmp_path), Shape(3, 5, 2), 1e-6)
    assert row["ms_p50"] == pytest.approx(expected, abs=1e-3)


def test_the_file_has_all_providers_and_what_went_wrong(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in (("is_available", True), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(decode, "copy_gbps", lambda device: 4000.0)
    monkeypatch.setattr(decode, "head", lambda *names: dict.fromkeys(("device", "torch", "triton")))
    path = tmp_path / "decode.json"
    flags = ["--model", str(checkpoint), "--shapes", "1x5+4", "--rank", "2", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["decode", *flags, "--peers", "unsloth"])
    assert decode.main() == 0
    record = json.loads(path.read_text())
    assert [row["provider"] for row in record["rows"]] == ["limit", "ours", "unsloth"]
    assert "exit code 1" in record["rows"][-1]["error"]
    printed = capsys.readouterr().out
    assert "Quatrain" in printed
    assert "1 x 5 + 4" in printed
    assert len(decode_table(record["rows"])[1]) == 3
