"""kernels/language.py: without triton everything is imported, and a CPU computes the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from support.short_model import short_model
from test_house import product_files
from test_train import assert_same_adapter, rows_of, small_data, timeless

import train

# Python runs it as it starts a process: triton is not found, as where it is not installed
HIDE_TRITON = 'import sys\nsys.modules["triton"] = None\n'
LAUNCH = """
import torch
from kernels.launch import launch
from kernels.glu import _glu_kernel
launch(_glu_kernel, (1,), x_ptr=torch.empty(1, device="meta"))
launch(_glu_kernel, (1,), x_ptr=torch.empty(1))
"""
FEW_STEPS = (
    "--device cpu --max-steps 3 --batch-size 2 --gradient-accumulation-steps 2 --lora-dropout 0.1 "
    "--neftune-noise-alpha 5"
)


@pytest.fixture
def without(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that has no triton."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE_TRITON)
    # sums add up in the order of this process
    return dict(os.environ) | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_every_file_of_the_product_is_imported(without: dict[str, str]) -> None:
    names = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in product_files()
    ]
    assert "kernels.language" in names
    lines = [f"import {name}" for name in names]
    loaded = "assert [name for name in sys.modules if name.startswith('triton')] == ['triton']"
    done = run(without, "-c", "\n".join(["import sys", *lines, loaded]))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    ["train.py --help", "merge.py --help", "quantize.py --help", "-m benchmarks"],
)
def test_a_command_says_what_it_does(arguments: str, without: dict[str, str]) -> None:
    said = run(without, *arguments.split())
    assert said.returncode == 0, said.stderr
    assert said.stdout == run(dict(os.environ), *arguments.split()).stdout


def test_a_run_on_the_cpu_is_the_same_bit_for_bit(tmp_path: Path, without: dict[str, str]) -> None:
    data = small_data(tmp_path)
    flags = f"--model {short_model()} --data {data} {FEW_STEPS} --output".split()
    train.main([*flags, str(tmp_path / "with")])
    done = run(without, "train.py", *flags, str(tmp_path / "without"))
    assert done.returncode == 0, done.stderr
    rows, others = (timeless(rows_of(tmp_path / name)) for name in ("with", "without"))
    assert len(rows) == 3
    assert rows == others
    assert_same_adapter(tmp_path / "with", tmp_path / "without")


def test_a_launch_says_that_triton_is_missing(without: dict[str, str]) -> None:
    done = run(without, "-c", LAUNCH)
    assert done.stderr.splitlines()[-1].startswith(
        "OSError: triton must be installed to launch _glu_kernel: this Python has none"
    )
