"""What all tests share: seeds, poisoned memory, and what to do without a GPU or the assets."""

import gc
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.compiled_kernels import resource_table
from support.compiled_record import RECORD, WRITE, Record
from support.lagging_streams import stand_in_streams
from support.poison import poisoned_memory

ROOT = Path(__file__).resolve().parent.parent
# what several tests use, and the scripts that they start
SUPPORT = ROOT / "tests" / "support"
# real checkpoints, tokenizers and data; they lie beside the repository and are no part of it
ASSETS = ROOT.parent / "shared" / "assets"

# small tensors gain nothing from more and lose much where cores are shared; and so sums add up in
# one order on every machine
torch.set_num_threads(1)

# a shell starts what runs in its background with Ctrl-C ignored, and so would every process be that
# a test starts; a test that sends one would wait for ever
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` on a machine without one; nowhere else is that decided."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Take what was imported and collected, all of which stays, out of the garbage collector's
    sight: to look through it takes half a second, each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let Python end as ever."""
    gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `tests/compiled` be written."""
    parser.addoption(WRITE, action="store_true", help="compile all kernels, write tests/compiled")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to write the record of some tests of a file: it would lose the others' launches."""
    RECORD.is_written = bool(config.getoption(WRITE))
    names = [name for name in config.args if "::" in name]
    if RECORD.is_written and (names or config.option.keyword or config.option.markexpr):
        raise pytest.UsageError(f"{WRITE} must be given whole files: got -k, -m or a test's name")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write what was compiled, or hand it to the process that does."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["launches"] = RECORD.launches()  # pyright: ignore
    elif RECORD.is_written and exitstatus == pytest.ExitCode.OK:
        RECORD.write()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a process of pytest-xdist compiled, where it did not crash."""
    RECORD.add(getattr(node, "workeroutput", {}).get("launches", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the compiled kernels take of a GPU: a spill is a column that is not zero."""
    lines = list(resource_table())
    if lines:
        terminalreporter.section("compiled kernels, the most of each over its configurations")
        for line in lines:
            terminalreporter.write_line(line)
    if RECORD.summary():
        terminalreporter.write_line(RECORD.summary())


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator before every test; the value is for tests that make their own."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _empty_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run's loss.png be empty, but for tests marked `draws`: drawing takes longer than the
    few steps that most runs have."""
    if "run.log" in sys.modules and "draws" not in request.keywords:
        monkeypatch.setattr("run.log.draw_losses", lambda rows, path, best_step: path.touch())


@pytest.fixture
def unrecorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every launch of a test be compiled, because the compiler is what it tests."""
    monkeypatch.setattr("support.ahead_of_time.RECORD", Record(tmp_path))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests' tokenized data, and that of processes they start, out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device_with_streams(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A GPU, or what stands in for its streams anywhere."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    with stand_in_streams():
        yield torch.device("cpu")


@pytest.fixture(scope="session")
def assets() -> Path:
    """Find the folder of real checkpoints, tokenizers and data, or skip the test."""
    if not ASSETS.is_dir():
        pytest.skip(f"needs the assets beside the repository: {ASSETS} is no folder")
    return ASSETS
