"""benchmarks/packed_step.py: what is laid out and counted, and a run over a tiny model."""

from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch

from benchmarks import packed_step
from benchmarks.packed_step import cases, draw_lengths, limit_row, measure_all
from benchmarks.random_model import LLAMA_3_8B, random_model
from benchmarks.tables import packed_step_table

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
    windows=(None,),
)


def test_lengths_are_distributed_as_gsm8k_s_are() -> None:
    lengths = draw_lengths(7473)
    assert fmean(lengths) == pytest.approx(168.6, rel=0.02)
    assert stdev(lengths) == pytest.approx(57.6, rel=0.03)


def test_all_kinds_have_about_as_many_tokens_and_packed_rows_are_nearly_full() -> None:
    epochs = cases(400, 1024, vocab_size=96)
    assert epochs["packed"].num_tokens == epochs["padded"].num_tokens
    assert 0 <= epochs["packed"].num_tokens - epochs["full"].num_tokens < 1024
    assert epochs["packed"].num_tokens / (epochs["packed"].num_rows * 1024) > 0.95
    (rows,) = epochs["packed"].micro_batches(0)
    batch = epochs["packed"].batch(rows)
    assert batch.input_ids.shape == (4, 1024)
    assert batch.positions is not None
    assert int((batch.positions == 0).sum()) > 8


def test_a_run_measures_every_kind() -> None:
    model = random_model(TINY, torch.device("cpu"), torch.float32)
    rows = measure_all(model, cases(12, 512, TINY.vocab_size))
    assert [row["mode"] for row in rows] == ["full", "packed", "padded"]
    padding = [row["share_of_padding"] for row in rows]
    assert 0 == padding[0] <= padding[1] < padding[2]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["s_min"], rel=0.9)
    header, lines = packed_step_table(rows)
    assert all(len(line) == len(header) for line in lines)
    assert lines[0][-1] == "1.00"


def test_the_limit_of_full_rows_stands_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [{"policy": policy, "tokens_per_second": n} for policy, n in (("keep", 40.0), ("", 9))]
    monkeypatch.setattr(packed_step, "rows_of", lambda *given: limits)
    limit = limit_row(TINY, "4x2048", torch.device("cpu"))
    full = {"mode": "full", "samples": 8, "steps": 2, "share_of_padding": 0.25}
    _, lines = packed_step_table([limit, full | {"tokens_per_second": 20.0}])
    assert lines == [
        ["limit", "-", "-", "-", "40", "2.00"],
        ["full", "8", "2", "25.0%", "20", "1.00"],
    ]
