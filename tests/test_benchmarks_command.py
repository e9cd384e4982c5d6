"""benchmarks/command.py: rows, limits, and no numbers where a test is red."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import command as module
from benchmarks.command import Machine, Result, Work, is_memory_bound, limit_ms, limit_row, row_of
from benchmarks.measure import Quantiles
from benchmarks.record import text_of

MACHINE = Machine(torch.device("cpu"), copy_gbps=3000, matmul_tflops=800, peer=None)


def work(num_bytes: float, num_flops: float) -> Work:
    return Work("forward", "tiny.q_proj", 1, 64, 32, torch.bfloat16, num_bytes, num_flops)


def test_the_limit_is_the_longer_of_bytes_and_arithmetic() -> None:
    assert limit_ms(work(3e9, 0), MACHINE) == pytest.approx(1)
    assert limit_ms(work(3e9, 1600e9), MACHINE) == pytest.approx(2)
    assert is_memory_bound(work(3e9, 0), MACHINE)
    assert not is_memory_bound(work(3e9, 1600e9), MACHINE)


def test_a_row_has_the_rates_of_its_median() -> None:
    times = Quantiles(1.0, 2.0, 4.0)
    row = row_of(work(3e9, 400e9), "ours", "graph", times, 7, MACHINE)
    assert row == {
        "provider": "ours",
        "mode": "forward",
        "layer": "tiny.q_proj",
        "m": 1,
        "n": 64,
        "k": 32,
        "dtype": "bfloat16",
        "timing": "graph",
        "ms_p20": 1.0,
        "ms_p50": 2.0,
        "ms_p80": 4.0,
        "gbps": 1500.0,
        "tflops": 200.0,
        "percent_of_copy": 50.0,
        "peak_bytes": 7,
    }


def test_arithmetic_has_no_share_of_the_copy() -> None:
    assert limit_row(work(3e9, 0), MACHINE)["percent_of_copy"] == 100
    assert limit_row(work(3e9, 0), MACHINE)["tflops"] is None
    assert limit_row(work(3e9, 1600e9), MACHINE)["percent_of_copy"] is None
    assert limit_row(work(3e9, 1600e9), MACHINE)["tflops"] == 800


def run_main(monkeypatch: pytest.MonkeyPatch, exit_code: int, *flags: str) -> list[list[str]]:
    """Run the command on a stand-in GPU whose tests end with an exit code; returns its children."""
    started = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(returncode=exit_code)

    head = {"benchmark": "tiny", "device": "a GPU", "torch": "2", "triton": "3"}
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "bitsandbytes", lambda: None)
    monkeypatch.setattr(module, "copy_gbps", lambda _: 3000.04)
    monkeypatch.setattr(module, "matmul_tflops", lambda _: 800.04)
    monkeypatch.setattr(module, "head", lambda operation, commit: head | {"commit": commit})
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
    row = limit_row(work(3e9, 0), MACHINE)
    assert module.main("tiny", lambda _: Result([row, row], {"more": 1}, "the table")) == 0
    return started


def test_a_red_test_gives_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"tests/test_kernels_tiny\.py must pass .* is 1"):
        run_main(monkeypatch, 1)


def test_no_gpu_gives_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(RuntimeError, match="needs a CUDA GPU"):
        module.main("tiny", lambda _: Result([], {}, ""))


def test_a_green_run_writes_a_row_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "tiny.json"
    started = run_main(monkeypatch, 0, "--json", str(path), "--commit", "abc")
    assert [command[1:] for command in started] == [
        ["-m", "pytest", "-q", "-m", "gpu and not slow", "tests/test_kernels_tiny.py"]
    ]
    text = path.read_text()
    assert sum("tiny.q_proj" in line for line in text.splitlines()) == 2
    assert '\n "commit": "abc",\n "bitsandbytes": null,\n "copy_gbps": 3000.0,\n' in text
    printed = capsys.readouterr().out
    assert "bitsandbytes is not installed" in printed
    assert "copy 3,000 GB/s, product 800 TFLOP/s" in printed
    assert "the table" in printed


def test_a_record_without_rows_is_json_too() -> None:
    assert text_of({"a": 1}) == '{\n "a": 1\n}\n'
    assert text_of({"rows": [{"b": 2}], "a": [1]}) == (
        '{\n "a": [\n  1\n ],\n "rows": [\n  {"b": 2}\n ]\n}\n'
    )
