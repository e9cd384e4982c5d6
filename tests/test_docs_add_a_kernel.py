"""docs/add-a-kernel.md: the files that the page shows work as they stand there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from support.hosts import run_python

PAGE = (ROOT / "docs" / "add-a-kernel.md").read_text()
# a heading that is a file's name, and the first block of code below it
FILES = dict(re.findall(r"^### `(\S+)`\n.*?^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
TESTS = [name for name in FILES if name.startswith("tests/test_")]
# what the files import or read
COPIED = ("benchmarks", "foreign", "kernels", "nf4", "tests", "pyproject.toml")


def test_the_page_lists_the_files_that_it_shows() -> None:
    listed = re.findall(r"^\| \d \| `(\S+)` \|", PAGE, re.MULTILINE)
    assert listed == list(FILES)
    assert len(listed) == 6


def run_the_files(
    folder: Path, files: dict[str, str], *options: str
) -> subprocess.CompletedProcess[str]:
    """Run the page's tests in a copy of the repository that has its files."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    for name, text in files.items():
        assert not (folder / name).exists(), name
        (folder / name).write_text(text)
    # without the measuring process's own settings
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *TESTS]
    return run_python(arguments, environment | {"PYTHONPATH": str(folder)}, folder)


def test_the_files_run_interpreted_and_compiled_ahead_of_time(tmp_path: Path) -> None:
    done = run_the_files(tmp_path, FILES)
    assert done.returncode == 0, done.stdout
    # with the table of what was compiled
    assert re.search(r"^_squared_relu_kernel +sm_90 ", done.stdout, re.MULTILINE)
    assert re.search(r"\b\d{2} passed", done.stdout), done.stdout


@pytest.mark.parametrize(
    ("line", "mutation"),
    [
        ("    y = positive * positive\n", "    y = positive\n"),
        ("element_ty), mask=offs < D)", "element_ty), mask=offs < D - 1)"),
        ("x_ptr + row * stride_xm + offs", "x_ptr + row * D + offs"),
    ],
    ids=["arithmetic", "mask", "stride"],
)
def test_the_pages_tests_see_a_kernel_that_is_wrong(
    tmp_path: Path, line: str, mutation: str
) -> None:
    name, test = "kernels/squared_relu.py", "test_interpreted_kernel_equals_the_reference"
    assert FILES[name].count(line) == 1
    files = FILES | {name: FILES[name].replace(line, mutation)}
    done = run_the_files(tmp_path, files, "-x", "-k", test)
    assert done.returncode == 1, done.stdout
    assert re.search(rf"^FAILED .*{test}", done.stdout, re.MULTILINE)
