"""benchmarks/fits.py: a run's memory, and the smallest GPU that has as much."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import fits as module
from benchmarks.fits import CASES, MODELS, cells, smallest_gpu
from step.memory_plan import GIB


def test_the_smallest_gpu_has_room_for_others() -> None:
    assert smallest_gpu(int(22.7 * GIB)) == "24 GB"
    assert smallest_gpu(int(22.9 * GIB)) == "32 GB"
    assert smallest_gpu(200 * GIB) == "over 141 GB"


def test_more_tokens_and_kept_activations_take_more() -> None:
    tiny = replace(MODELS["Llama-3.2-1B"], num_hidden_layers=2, windows=(None,) * 2)
    sizes = [float(cell.partition(" GiB")[0]) for cell in cells(tiny)]
    assert len(sizes) == len(CASES)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_the_table_is_written_between_its_markers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- fits -->\nold\n<!-- /fits -->\nafter\n")
    monkeypatch.setattr(module, "README", page)
    monkeypatch.setattr(module, "MODELS", {})
    monkeypatch.setattr(sys, "argv", ["fits"])
    assert module.main() == 0
    assert "old" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["fits", "--write"])
    assert module.main() == 0
    head = "| model | " + " | ".join(CASES) + " |\n| --- | ---: | ---: | ---: |"
    assert page.read_text() == f"before\n<!-- fits -->\n{head}\n<!-- /fits -->\nafter\n"
