"""benchmarks/grouped_matmul.py: what it counts and draws, and a run over few rows."""

import pytest
import torch
from support.equality import assert_equal
from support.stand_in_gpu import install

from benchmarks import grouped_matmul
from benchmarks.command import Machine
from benchmarks.tables import grouped_matmul_table

MACHINE = Machine(torch.device("cpu"), copy_gbps=3000, matmul_tflops=800, peer=None)


def test_bytes_and_flops_are_those_of_the_matrices() -> None:
    sizes, n, k = (3, 0, 4), 16, 32
    x, y, W = (torch.empty(shape).half() for shape in ((7, k), (7, n), (2, n, k)))
    work = grouped_matmul.grouped_matmul_work("forward", "a.layer", sizes, n, k, torch.float16)
    # the expert without rows is not read
    assert work.num_bytes == x.nbytes + y.nbytes + W.nbytes
    assert work.num_flops == sum(2 * size * n * k for size in sizes)


def test_the_drawn_rows_are_uneven_and_the_same_each_time() -> None:
    sizes = grouped_matmul.expert_sizes(4096, 8)
    assert sizes == grouped_matmul.expert_sizes(4096, 8)
    assert (len(sizes), sum(sizes)) == (8, 4096)
    assert max(sizes) > 2 * min(sizes) > 0


def test_the_loop_multiplies_as_ours_does() -> None:
    x, W = torch.randint(-2, 3, (5, 6)).float(), torch.randint(-2, 3, (3, 4, 6)).float()
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    found = grouped_matmul.by_loop(x, W.mT, (2, 0, 3))
    assert_equal(found, grouped_matmul.grouped_matmul(x, W, offsets))


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_run_measures_every_provider(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    clock = install(monkeypatch)
    clock.tick_ms = 8.0
    rows = grouped_matmul.measure_grouped_matmul(mode, "a.layer", (3, 0, 5), 32, 16, MACHINE)
    assert [row["provider"] for row in rows] == ["limit", "ours", "torch", "loop", "dense"]
    assert [row["timing"] for row in rows[1:]] == ["graph", "eager", "graph", "graph"]
    header, lines = grouped_matmul_table(rows)
    assert header == ["layer", "mode", "M", "limit", "dense", "ours", "torch", "loop"]
    assert len(lines) == 1
    assert lines[0][:3] == ["layer", mode, "8"]
