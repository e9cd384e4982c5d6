"""benchmarks/fp8_8b.py: its data, what it records, and runs over a tiny model."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fp8_8b
from benchmarks.fp8_8b import chain_ids, measure_all, parser, row_of, run
from benchmarks.random_model import LLAMA_3_8B
from benchmarks.tables import fp8_8b_table

CPU = torch.device("cpu")
TINY = replace(
    LLAMA_3_8B,
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    rotary_dim=32,
    ropes=LLAMA_3_8B.ropes[:1],
    windows=(None,),
)


def followers(*batches: torch.Tensor) -> dict[int, set[int]]:
    """List which tokens follow which."""
    found: dict[int, set[int]] = {}
    for ids in batches:
        for before, after in zip(ids[:, :-1].flatten(), ids[:, 1:].flatten(), strict=True):
            found.setdefault(int(before), set()).add(int(after))
    return found


def test_a_token_of_the_chain_is_followed_by_one_of_two_in_every_step() -> None:
    first, second = (chain_ids((4, 512), 2000, index) for index in (0, 1))
    assert first.shape == (4, 512)
    assert not torch.equal(first, second)
    assert torch.equal(first, chain_ids((4, 512), 2000, 0))
    # another chain in the second step would give many a token four
    found = followers(first, second)
    assert max(map(len, found.values())) == 2
    # spread over the vocabulary
    assert 200 < len(found) <= 512
    assert min(found) < 50
    assert max(found) > 1950


def test_fp8_has_the_weights_and_tokens_of_bf16_and_another_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fp8_8b, "LEARNING_RATE", 5e-3)
    rows = [
        run(TINY, data, kind, 30, (2, 48), CPU) for data in fp8_8b.DATA for kind in ("bf16", "fp8")
    ]
    for bf16, fp8 in (rows[:2], rows[2:]):
        # E4M3 keeps 4 bits of a product's operands; other weights or tokens change more
        assert fp8["first_loss"] == pytest.approx(bf16["first_loss"], rel=2e-3)
        assert fp8["losses"] != bf16["losses"]
        assert fp8["losses"] == pytest.approx(bf16["losses"], rel=0.03)
        assert fp8["num_skipped"] == bf16["num_skipped"] == 0
    random, chain = rows[::2]
    assert min(random["losses"]) > math.log(TINY.vocab_size) - 0.1
    assert chain["losses"][-1] < chain["first_loss"] - 0.3


def test_ten_steps_are_a_point_and_a_step_that_is_not_finite_is_counted() -> None:
    losses = [*[4.0] * 10, 2.0, *[1.0] * 9, 9.0]
    norms = [1.0, 3.0, *[2.0] * 8, math.nan, *[1.0] * 10]
    assert row_of("chain", "fp8", losses, norms, 1234.56) == {
        "data": "chain",
        "base_compute": "fp8",
        "first_loss": 4.0,
        "steps": [10, 20],
        "losses": [4.0, 1.1],
        "grad_norms": [3.0, math.inf],
        "num_skipped": 1,
        "tokens_per_second": 1234.6,
    }


def test_the_file_is_written_after_every_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, sizes = tmp_path / "record.json", []

    def record(_: object, data: str, base_compute: str, *given: object) -> dict[str, Any]:
        sizes.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        assert given == (20, (1, 64), CPU)
        return {"data": data, "base_compute": base_compute}

    monkeypatch.setattr(fp8_8b, "run", record)
    flags = ["--steps", "20", "--shape", "1x64", "--commit", "abc", "--json", str(path)]
    rows = measure_all(TINY, parser().parse_args(flags), CPU)
    assert sizes == [*range(6)]
    found = json.loads(path.read_text())
    assert found["rows"] == rows
    assert (found["benchmark"], found["commit"], found["shape"]) == ("fp8_8b", "abc", "1x64")
    assert [(row["data"], row["base_compute"]) for row in rows] == [
        (data, kind) for data in ("random", "chain") for kind in ("bf16", "int8", "fp8")
    ]


def test_fewer_steps_than_a_point_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fp8_8b", "--steps", "9", "--json", "x.json"])
    with pytest.raises(ValueError, match="--steps must be at least 10: got 9"):
        fp8_8b.main()


def test_fp8_stands_beside_bf16_of_the_same_data() -> None:
    row: dict[str, Any] = {"steps": [10, 20], "grad_norms": [0.5, 0.25], "num_skipped": 0}
    row |= {"first_loss": 12.5, "tokens_per_second": 17000.4}
    rows = [
        row | {"data": "random", "base_compute": "bf16", "losses": [12.0, 11.0]},
        row | {"data": "chain", "base_compute": "bf16", "losses": [8.0, 4.0]},
        row | {"data": "chain", "base_compute": "fp8", "losses": [7.2, 4.1], "num_skipped": 2},
    ]
    header, lines = fp8_8b_table(rows)
    assert lines[0][3:8] == ["12.5000", "11.0000", "-", "-", "0.500"]
    assert dict(zip(header, lines[2], strict=True)) == {
        "data": "chain",
        "products": "FP8",
        "steps": "20",
        "first loss": "12.5000",
        "last loss": "4.1000",
        "against bf16": "+2.50%",
        "farthest from bf16": "-10.00%",
        "largest gradient": "0.500",
        "steps skipped": "2",
        "tokens/s": "17,000",
    }
