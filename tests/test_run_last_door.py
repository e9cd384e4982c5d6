"""run/last_door.py: what the machine refuses is a message, a fault of the code is a traceback."""

import pwd
import runpy
import sys
from collections.abc import Callable

import pytest
import torch
from support.train_process import ROOT

from run.last_door import LastDoor


def take_too_much() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def take_too_much_in_python() -> None:
    bytearray(1 << 60)


@pytest.mark.parametrize("take", [take_too_much, take_too_much_in_python])
def test_memory_that_ends_is_a_message(take: Callable[[], None]) -> None:
    with pytest.raises(OSError, match="the machine's memory must suffice"), LastDoor():
        take()


@pytest.mark.parametrize("error", [RecursionError("r"), TypeError("t"), RuntimeError("other")])
def test_a_fault_of_ours_passes_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, LastDoor():
        raise error
    assert raised.value is error


FLAGS = {
    "train": "",
    "merge": "--model bundled/model --adapter bundled/model --output ~/b",
    "quantize": "--model bundled/model --output ~/b",
}


@pytest.mark.parametrize("door", FLAGS)
def test_every_door_says_that_there_is_no_home_folder(
    door: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"{door}.py", *FLAGS[door].split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(f"{door}.py", run_name="__main__")
    said = capsys.readouterr().err if door == "train" else str(ended.value.code)
    assert said.startswith("error: there must be a home folder: HOME is not set")
