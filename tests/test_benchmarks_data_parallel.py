"""benchmarks/data_parallel.py: a run of one rank over a tiny model, and the table of several."""

import pytest
import torch
from test_benchmarks_packed_step import TINY

from benchmarks import data_parallel
from benchmarks.random_model import random_model
from benchmarks.tables import data_parallel_table
from run.ranks import Ranks


def test_one_rank_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel, "NUM_SUMS", 2)
    model = random_model(TINY, torch.device("cpu"), torch.float32)
    optimizer = data_parallel.learner(model)
    row = data_parallel.measure(Ranks(), model, optimizer, (2, 8), 3, num_steps=2)
    assert (row["ranks"], row["shape"], row["micro_batches"]) == (1, "2x8", 3)
    assert row["ms_min"] <= row["ms_p50"] <= row["ms_max"]
    assert row["tokens_per_second"] == pytest.approx(2 * 8 * 3 / row["ms_p50"] * 1e3, rel=1e-3)
    assert row["sum_bytes"] == optimizer.gradients.values.nbytes


def test_the_limit_is_one_gpus_speed_times_their_number() -> None:
    shared = {"shape": "1x2048", "micro_batches": 4, "sum_ms_p50": 1.25}
    alone = shared | {"ranks": 1, "ms_p50": 500.0, "tokens_per_second": 16000.0}
    both = shared | {"ranks": 2, "ms_p50": 510.0, "tokens_per_second": 31000.0}
    header, lines = data_parallel_table([alone, both])
    assert dict(zip(header, lines[0], strict=True))["of limit"] == "100.0%"
    assert dict(zip(header, lines[1], strict=True))["of limit"] == "96.9%"
    assert [line[-1] for line in lines] == ["-", "1.25"]
