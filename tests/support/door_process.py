"""A door in a process of its own, forked from this one, which has imported all that it needs.

tests/support/train_process.py forks from a server, because pytest has threads; here there is one.
"""

import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# what torch imports where a module is made on the meta device, and the doors
import torch._dynamo  # noqa: F401

import merge  # noqa: F401
import quantize  # noqa: F401
import train  # noqa: F401
from tests.support.file_events import FileEvents

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: its exit code, or the negative number of a signal.
        events: names of what it did to its folder, unless it was killed.
        times: of each event, in seconds.
    """

    code: int
    said: str
    events: list[str]
    times: list[float]

    def span(self, folder: Path) -> tuple[float, float]:
        """When a process first and last did something in a folder."""
        both = zip(self.events, self.times, strict=True)
        times = [time for event, time in both if f"{folder}/" in event]
        return times[0], times[-1]

    def check_message(self) -> None:
        """See that a process that has failed says why, in a line."""
        assert self.code in (0, 1), f"code {self.code}: {self.said}"
        assert "Traceback" not in self.said, self.said
        if self.code:
            assert "error: " in self.said.strip().splitlines()[-1], self.said


class Process:
    """A door at work in a folder."""

    def __init__(
        self,
        door: str,
        arguments: Sequence[str],
        folder: Path,
        begin: Callable[[FileEvents], None] = FileEvents.watch,
        *,
        last: int = 0,
        loses_power: bool = False,
    ) -> None:
        """Args:
        begin: what the process does first.
        last, loses_power: as FileEvents.
        """
        self._said = Path(tempfile.mkstemp()[1])
        read, write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(read)
            events = FileEvents(folder, last, loses_power=loses_power)
            self._be(door, arguments, folder, begin, events, write)
        os.close(write)
        self._events = os.fdopen(read)

    def _be(
        self,
        door: str,
        arguments: Sequence[str],
        folder: Path,
        begin: Callable[[FileEvents], None],
        events: FileEvents,
        report: int,
    ) -> NoReturn:
        code = 1
        try:
            said = os.open(self._said, os.O_WRONLY | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
            os.chdir(folder)
            sys.argv = [f"{door}.py", *arguments]
            begin(events)
            runpy.run_path(str(ROOT / f"{door}.py"), run_name="__main__")
            code = 0
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(report, "w") as file:
            json.dump([events.names, events.times], file)
        os._exit(code)

    def finish(self) -> Ended:
        """Wait for the end; one that does not come is made."""
        signal.signal(signal.SIGALRM, lambda number, frame: os.kill(self._pid, signal.SIGKILL))
        signal.alarm(DEADLINE_S)
        with self._events as file:
            report = file.read()
        _, status = os.waitpid(self._pid, 0)
        signal.alarm(0)
        said = self._said.read_text(errors="replace")
        self._said.unlink()
        events, times = json.loads(report or "[[], []]")
        return Ended(os.waitstatus_to_exitcode(status), said, events, times)
