"""The four doors: --help and a mistyped flag are answered before a heavy library is imported."""

import subprocess
import sys

import pytest
from conftest import ROOT

HEAVY = {"huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "tqdm", "triton"}
# run a door as a program, and say what was imported by the time that it ends
AS_PROGRAM = """
import runpy, sys
door, *flags = sys.argv[1:]
sys.argv = [door, *flags]
try:
    runpy.run_path(door, run_name="__main__")
finally:
    print("imported", *sys.modules)
"""


@pytest.mark.parametrize("door", ["train.py", "generate.py", "merge.py", "quantize.py"])
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--ouptut", 2)])
def test_a_door_answers_before_it_imports_what_takes_seconds(
    door: str, flag: str, code: int
) -> None:
    command = [sys.executable, "-c", AS_PROGRAM, door, flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    answer, _, imported = done.stdout.rpartition("imported ")
    assert "foreign.command_line" in imported.split()
    assert HEAVY.isdisjoint(imported.split())
    if code:
        assert done.stderr.startswith("error: ")
        assert f"{door} --help lists all flags" in done.stderr
    else:
        assert door in answer.splitlines()[0]
        # a door reads its own command line, not another's
        assert "--output" in answer
