"""benchmarks/gpu_tests.py: which files run beside which, on which GPU, and what is recorded."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_tests as module

SOURCES = {
    "test_a.py": "@pytest.mark.gpu",
    "test_b.py": "@pytest.mark.gpu @pytest.mark.slow",
    "test_c.py": "@pytest.mark.gpu @pytest.mark.slow",
    "test_d.py": "@pytest.mark.gpu @pytest.mark.slow",
    "test_e.py": "@pytest.mark.gpu @pytest.mark.slow @pytest.mark.alone",
    "test_f.py": "@pytest.mark.gpu @pytest.mark.slow @pytest.mark.alone",
    "test_none.py": "",
}
SIDE_BY_SIDE = "gpu and not slow and not alone"
SLOW = "gpu and slow and not alone"
ALONE = "gpu and alone"
REPORT = """<testsuites><testsuite tests="2" failures="{failures}" errors="0" skipped="0">
<testcase classname="tests.{file}" name="one" time="1.2"/>
<testcase classname="tests.{file}" name="two" time="0.5">{failure}</testcase>
</testsuite></testsuites>"""


@dataclass
class Process:
    """A pytest that stands in for one on a GPU."""

    file: str
    markers: str
    gpu: str
    beside: list["Process"]


class Machine:
    """Two GPUs, and the processes that run there."""

    def __init__(self) -> None:
        self.running: list[Process] = []
        self.started: list[Process] = []
        self.failing = ""
        self.ending_the_command = ""
        self._lock = threading.Lock()

    def run(self, command: list[str], env: dict[str, str], **options: Any) -> Any:
        markers, report, file = command[4], command[6].partition("=")[2], Path(command[7]).stem
        process = Process(file, markers, env["CUDA_VISIBLE_DEVICES"][0], [])
        if file == self.ending_the_command:
            raise KeyboardInterrupt
        with self._lock:
            process.beside += self.running
            for other in self.running:
                other.beside.append(process)
            self.running.append(process)
            self.started.append(process)
        # files that may run side by side do
        time.sleep(0.05)
        fails = int(file == self.failing)
        said = REPORT.format(file=file, failures=fails, failure="<failure/>" * fails)
        Path(report).write_text(said)
        with self._lock:
            self.running.remove(process)
        return SimpleNamespace(returncode=fails, stdout="what failed", stderr="")

    def of(self, markers: str) -> list[Process]:
        return [process for process in self.started if process.markers == markers]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    (tmp_path / "tests").mkdir()
    for name, text in SOURCES.items():
        (tmp_path / "tests" / name).write_text(text)
    machine = Machine()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "head", lambda benchmark, commit: {"benchmark": benchmark})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(subprocess, "run", machine.run)
    return machine


def record_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    """Run the command, and read what it recorded."""
    path = folder / "record.json"
    monkeypatch.setattr(sys, "argv", ["gpu_tests", "--json", str(path), "--jobs", "4"])
    code = module.main()
    return code, json.loads(path.read_text())


def test_slow_files_have_a_gpu_each_and_the_last_ones_all(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, record = record_of(tmp_path, monkeypatch)
    assert code == 0
    names = [[p.file for p in machine.of(markers)] for markers in (SIDE_BY_SIDE, SLOW, ALONE)]
    some = ["test_b", "test_c", "test_d", "test_e", "test_f"]
    assert [sorted(each) for each in names] == [["test_a", *some], some, ["test_e", "test_f"]]
    assert max(len(p.beside) for p in machine.of(SIDE_BY_SIDE)) >= 3
    assert {p.gpu for p in machine.of(SIDE_BY_SIDE)} == {"0", "1"}
    for process in machine.of(SLOW):
        assert [p.markers for p in process.beside if p.markers != SLOW] == []
        assert process.gpu not in [p.gpu for p in process.beside if process in p.beside]
    assert all(not p.beside for p in machine.of(ALONE))
    assert (record["tests"], record["failures"], record["unfinished"]) == (26, 0, [])
    assert record["per_file"] == {"test_a": 2} | dict.fromkeys(some[:3], 4) | dict.fromkeys(
        some[3:], 6
    )
    assert record["seconds_per_file"]["test_a"] == 1.7


def test_a_failing_test_fails_the_command_and_is_named(
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine.failing = "test_a"
    code, record = record_of(tmp_path, monkeypatch)
    assert code == 1
    assert record["failed"] == ["test_a::two"]
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"tests/test_a.py ({SIDE_BY_SIDE}): 2 tests, 1 f") for line in said)
    assert "what failed" in said


def test_a_command_that_is_cut_leaves_a_record_of_what_ended(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests" / "test_g.py").write_text(SOURCES["test_a.py"])
    machine.ending_the_command = "test_g"
    with pytest.raises(KeyboardInterrupt):
        record_of(tmp_path, monkeypatch)
    record = json.loads((tmp_path / "record.json").read_text())
    assert f"tests/test_g.py ({SIDE_BY_SIDE})" in record["unfinished"]
    assert f"tests/test_e.py ({ALONE})" in record["unfinished"]
    assert record["per_file"]["test_a"] == 2


def test_files_that_took_long_begin_first(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {"test_a": 3, "test_b": 1, "test_c": 9, "test_d": 2, "test_e": 4}
    (tmp_path / "record.json").write_text(json.dumps({"seconds_per_file": before}))
    files = [f"tests/{name}" for name in SOURCES if name != "test_none.py"]
    ordered = module.longest_first(files, tmp_path / "record.json")
    assert [Path(file).stem[-1] for file in ordered] == ["f", "c", "e", "a", "d", "b"]
    assert module.longest_first(files, tmp_path / "none.json") == files
