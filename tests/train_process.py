"""train.py in processes of its own, to be killed: forked from one that has imported it already."""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# a test that waits longer than this has missed what it waits for
DEADLINE_S = 120

_CONTEXT = multiprocessing.get_context("forkserver")
# the second is what torch imports when a module is made on the meta device, in a second or more
_CONTEXT.set_forkserver_preload(["train", "torch._dynamo"])


def _train(arguments: list[str], pipe: Path) -> None:
    descriptor = os.open(pipe, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    runpy.run_path("train.py", run_name="__main__")


class TrainProcess:
    """A run of train.py, as if from the command line."""

    def __init__(self, output: Path, *arguments: str) -> None:
        # a pipe takes what it is told however full the disk is
        pipe = output.with_suffix(".pipe")
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        self._pipe = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._said = b""
        arguments = ("--output", str(output), *arguments)
        self._process: BaseProcess = _CONTEXT.Process(target=_train, args=(list(arguments), pipe))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def said(self) -> str:
        """All that was printed up to now."""
        while chunk := self._read():
            self._said += chunk
        return self._said.decode()

    def _read(self) -> bytes:
        try:
            return os.read(self._pipe, 1 << 16)
        except BlockingIOError:
            return b""

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            assert self._process.is_alive(), f"the run ended before:\n{self.said()}"
            assert time.monotonic() < deadline, f"what was waited for never came:\n{self.said()}"
            time.sleep(0.001)

    def wait(self, seconds: float) -> None:
        self._process.join(seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def finish(self) -> tuple[int | None, str]:
        """Wait for the end: the exit code, and what was printed."""
        self._process.join(DEADLINE_S)
        return self._process.exitcode, self.said()
