"""benchmarks/__main__.py: the list, the benchmark that is run, and what needs a GPU."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as module
from benchmarks.__main__ import FOLDER, WITHOUT_A_GPU, benchmarks, listed, main

ROOT = FOLDER.parent


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def is_started_by_another(path: Path) -> bool:
    """Whether a file is one of the processes of a benchmark: that one says so."""
    mention = f'"{path.name}"', f'"benchmarks.{path.stem}"'
    return any(word in other.read_text() for other in FOLDER.glob("*.py") for word in mention)


def test_every_file_with_a_door_is_listed_or_started_by_another() -> None:
    doors = {path.stem for path in FOLDER.glob("*.py") if '"__main__":' in path.read_text()}
    unlisted = doors - {"__main__"} - benchmarks().keys()
    assert all(is_started_by_another(FOLDER / f"{name}.py") for name in unlisted), unlisted


def test_every_benchmark_has_a_door() -> None:
    found = benchmarks()
    assert set(WITHOUT_A_GPU) <= found.keys()
    for name, what in found.items():
        assert 'if __name__ == "__main__":' in (FOLDER / f"{name}.py").read_text(), name
        assert what.endswith((".", ":")), name


@pytest.mark.usefixtures("_no_gpu")
def test_the_list_says_what_works_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out
    assert printed == listed() + "\n"
    assert "  adamw " in printed
    assert printed.endswith(
        "\nThis machine has no CUDA GPU: fits, fp8_curves, fp8_error and report work here.\n"
    )


def test_the_list_of_a_machine_with_a_gpu_says_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "no CUDA GPU" not in listed()


@pytest.mark.usefixtures("_no_gpu")
def test_without_a_gpu_a_benchmark_that_needs_one_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"adamw needs a CUDA GPU.*fits, fp8_curves, fp8_error and report work without",
    ):
        main(["adamw", "--json", "x.json"])


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="got 'adam'; did you mean adamw"):
        main(["adam"])
    with pytest.raises(ValueError, match="got 'xyz'; python -m benchmarks lists them"):
        main(["xyz"])


@pytest.mark.parametrize("gpu", [False, True])
def test_a_benchmark_is_run_with_its_flags(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(sys, "argv", ["before"])
    monkeypatch.setattr(
        module.runpy, "run_module", lambda name, run_name: ran.append([name, run_name, *sys.argv])
    )
    main(["adamw", "--json", "x.json"] if gpu else ["report", "--write"])
    name, flags = ("adamw", ["--json", "x.json"]) if gpu else ("report", ["--write"])
    assert ran == [[f"benchmarks.{name}", "__main__", f"python -m benchmarks {name}", *flags]]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["report", "--help"], 0, "usage: python -m benchmarks report"),
        (["adamw", "--help"], 0, "usage: python -m benchmarks adamw"),
        (["no-such"], 1, "error: NAME must be one of"),
        # argparse repeats what it does not know as it came
        (["report", "no\x1bsuch"], 2, "usage: python -m benchmarks report"),
    ],
    ids=["report", "adamw", "unknown", "hostile"],
)
def test_the_command_ends_in_help_or_in_a_line(arguments: list[str], code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code
    text = done.stdout + done.stderr
    assert text.startswith(said)
    assert "\x1b" not in text


def test_the_tests_that_a_benchmark_runs_first_are_there() -> None:
    num_found = 0
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id in ("main", "run_tests") and node.args:
                operation = node.args[0]
                rooms = [k.value for k in node.keywords if k.arg == "room"]
                if isinstance(operation, ast.Constant):
                    room = ast.literal_eval(rooms[0]) if rooms else "kernels"
                    test = f"tests/test_{room}_{operation.value}.py"
                    assert (ROOT / test).is_file(), f"{path.name}: {test}"
                    num_found += 1
    assert num_found >= 10
