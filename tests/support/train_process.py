"""train.py in processes of its own, to be killed: forked from one that has imported it already."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# a test that waits longer than this has missed what it waits for
DEADLINE_S = 120

_CONTEXT = multiprocessing.get_context("forkserver")
# the second is what torch imports when a module is made on the meta device, in a second or more
_CONTEXT.set_forkserver_preload(["train", "torch._dynamo"])


def heed_signals() -> None:
    """Let this process be told to stop, also where the tests were started by nohup or in a shell's
    background: there such signals are ignored, and train.py leaves them so."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _train(
    arguments: list[str],
    pipe: Path,
    environment: Mapping[str, str],
    before: Callable[[], None] | None,
) -> None:
    os.environ.update(environment)
    heed_signals()
    if before:
        before()
    descriptor = os.open(pipe, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    runpy.run_path("train.py", run_name="__main__")


class TrainProcess:
    """A run of train.py, as if from the command line."""

    def __init__(
        self,
        output: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Args:
        before: what the process does first, by its name in a module.
        """
        environment = environment or {}
        # a pipe takes what it is told however full the disk is
        pipe = output.with_suffix(f".pipe{environment.get('RANK', '')}")
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        self._pipe = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._said = b""
        arguments = ("--output", str(output), *arguments)
        given = (list(arguments), pipe, environment, before)
        self._process: BaseProcess = _CONTEXT.Process(target=_train, args=given)
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


def rank_environments(size: int) -> list[dict[str, str]]:
    """What torchrun tells each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def train_ranks(
    output: Path,
    arguments: Sequence[Sequence[str]],
    before: Callable[[], None] | None = None,
) -> list[TrainProcess]:
    """Start a run of several ranks, each of its own arguments."""
    environments = rank_environments(len(arguments))
    return [
        TrainProcess(output, *some, environment=environment, before=before)
        for some, environment in zip(arguments, environments, strict=True)
    ]


def cut_off(output: Path) -> None:
    """Leave a run as if its process had been killed before it wrote its last file."""
    (output / "README.md").unlink()
