"""benchmarks/nf4_matmul.py: its byte model, its crossover, and a run over tiny layers."""

from types import SimpleNamespace

import pytest
import torch
from support.stand_in_gpu import install
from torch import Tensor

from benchmarks import nf4_matmul as module
from benchmarks.command import Machine, row_of
from benchmarks.measure import Quantiles
from benchmarks.nf4_matmul import between, check_agreement, crossover, matmul_bytes, work_of
from kernels.nf4_matmul import nf4_matmul_reference
from nf4.weight import NF4Weight

MACHINE = Machine(torch.device("cpu"), copy_gbps=3000, matmul_tflops=800, peer=None)


def test_bytes_are_those_of_weight_input_and_output() -> None:
    assert matmul_bytes(3, 64, 256, 2, weight_bytes=10) == 10 + 3 * 64 * 2 + 3 * 256 * 2
    work = work_of("llama-3-8b.gate_proj", "forward", 1)
    weight = 14336 * 4096 * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert work.num_bytes == weight + (14336 + 4096) * 2
    assert work.num_flops == 2 * 14336 * 4096


def test_the_crossover_is_the_first_loss() -> None:
    times = {1: (1.0, 5.0), 64: (3.0, 5.0), 128: (6.0, 5.0), 256: (4.0, 5.0)}
    assert crossover(times) == (64, 128)
    assert crossover({1: (2.0, 1.0)}) == (0, 1)
    assert crossover({1: (1.0, 1.0), 512: (1.0, 2.0)}) == (512, None)
    assert crossover({}) == (0, None)


def test_the_crossover_is_narrowed_down_to_a_step() -> None:
    won, lost, measured = 64, 128, []
    while (m := between(won, lost)) is not None:
        measured.append(m)
        won, lost = (m, lost) if m <= 100 else (won, m)
    assert measured == [96, 112]
    assert (won, lost) == (96, 112)


@pytest.mark.parametrize(("won", "lost"), [(512, None), (0, 1), (8, 16), (16, 32), (64, 80)])
def test_a_crossover_that_is_known_is_left_alone(won: int, lost: int | None) -> None:
    assert between(won, lost) is None


def test_a_provider_that_computes_something_else_is_not_timed() -> None:
    expected = torch.randn(4, 8)
    check_agreement("ours", expected * (1 + 2**-8), expected)
    for wrong in (expected * 1.1, torch.full_like(expected, float("nan"))):
        with pytest.raises(RuntimeError, match="ours must agree with cuBLAS"):
            check_agreement("ours", wrong, expected)


PROVIDERS = ("limit", "ours", "ours-fused", "ours-warpgroup", "ours-expand", "torch")


@pytest.fixture
def _tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(x: Tensor, weight: NF4Weight, path: str | None = None) -> Tensor:
        assert path in (None, "fused", "warpgroup", "expand")
        return nf4_matmul_reference(x, weight)

    install(monkeypatch)
    monkeypatch.setattr(module, "nf4_matmul", multiply)
    monkeypatch.setattr(module, "matmul_path", lambda *_: SimpleNamespace(name="fused"))
    monkeypatch.setattr(module, "LAYERS", {"tiny.q_proj": (128, 64), "tiny.down_proj": (64, 192)})
    monkeypatch.setattr(module, "NUM_ROWS", (1, 16, 64))
    monkeypatch.setattr(module, "path_obstacle", lambda *_: "")
    monkeypatch.setattr(module, "DECODING_MOST_ROWS", 16)


@pytest.mark.usefixtures("_tiny_run")
def test_a_run_measures_every_provider_in_both_modes() -> None:
    result = module.run(MACHINE)
    found = {(row["layer"], row["mode"], row["m"], row["provider"]) for row in result.rows}
    assert found == {
        (layer, mode, m, provider)
        for layer in ("tiny.q_proj", "tiny.down_proj")
        for mode in ("forward", "transposed")
        for m in (1, 16, 64)
        for provider in PROVIDERS
        if m <= 16 or provider not in ("ours-fused", "ours-warpgroup")
        if mode == "forward" or not provider.startswith("ours-")
    }
    assert len(found) == len(result.rows)
    assert len({tuple(row) for row in result.rows}) == 1
    ours = [row for row in result.rows if row["provider"] == "ours"]
    assert {(row["mode"], row["path"]) for row in ours} == {
        ("forward", "fused"),
        ("transposed", "expand"),
    }
    # the stand-in takes equally long for every path
    crossovers = result.more["crossovers"]
    assert [(c["path"], c["next"], c["up_to"]) for c in crossovers] == 2 * [
        ("ours-fused", "ours-warpgroup", 16),
        ("ours-warpgroup", "ours-expand", 16),
    ]
    assert "q_proj forward: ours-fused before ours-warpgroup: M = 16" in result.text


@pytest.mark.usefixtures("_tiny_run")
def test_a_run_looks_for_the_crossover_between_the_listed_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows(candidates, machine):
        # fused costs as much as 40 rows at once
        times = [
            candidate.work.m / 40 if candidate.provider == "ours-fused" else 1.0
            for candidate in candidates
        ]
        return [
            row_of(work, provider, "graph", Quantiles(ms, ms, ms), 0, machine)
            for (work, provider, _), ms in zip(candidates, times, strict=True)
        ]

    monkeypatch.setattr(module, "measured_rows", rows)
    monkeypatch.setattr(module, "DECODING_MOST_ROWS", 64)
    result = module.run(MACHINE)
    # of a path as fast as the next the largest number measured
    expected = {"ours-fused": 32, "ours-warpgroup": 64}
    assert all(c["up_to"] == expected[c["path"]] for c in result.more["crossovers"])
    found = {
        (row["mode"], row["provider"], row["m"])
        for row in result.rows
        if row["m"] not in (1, 16, 64)
    }
    assert found == {
        ("forward", path, m) for path in ("ours-fused", "ours-warpgroup") for m in (32, 48)
    }
    # a layer's and mode's rows come in the order of M
    assert [row["m"] for row in result.rows[:2]] == [1, 1]
    assert "48" not in result.text
