"""A door in a process that has a terminal of its own, at which a test types."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# a test that waits longer than this has missed what it waits for
DEADLINE_S = 120
PATIENCE_S = 10

CTRL_C, CTRL_D = "\x03", "\x04"

# the process takes the terminal, so that its keys become signals; what a test lets it do first
# comes before the door
_BEGIN = """\
import fcntl, runpy, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.path.insert(0, "")
sys.argv = sys.argv[1:]
{before}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Terminal:
    """A door at work on a terminal.

    Attributes:
        shown: all that came on the screen up to now.
    """

    def __init__(self, door: str, arguments: Sequence[str], before: str = "") -> None:
        """Args:
        before: a program that the process runs first.
        """
        self._ours, theirs = os.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN.format(before=before), door, *arguments],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # readline then writes what a program would, and no colours
            env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"},
        )
        os.close(theirs)
        self._bytes = b""

    @property
    def shown(self) -> str:
        return self._bytes.decode(errors="replace").replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str, after: int = 0) -> int:
        """Wait until a text is on the screen, behind a place, and return the place behind it."""
        deadline = time.monotonic() + DEADLINE_S
        while (found := self.shown.find(text, after)) < 0:
            assert time.monotonic() < deadline, f"{text!r} never came:\n{self.shown}"
            assert self._read(), f"the process ended before {text!r} came:\n{self.shown}"
        return found + len(text)

    def _read(self) -> bool:
        """Read what is there; False at the end."""
        if not select.select([self._ours], [], [], 0.1)[0]:
            return self._process.poll() is None
        try:
            chunk = os.read(self._ours, 1 << 16)
        # Linux's way to say that nobody has the terminal any more
        except OSError:
            return False
        self._bytes += chunk
        return bool(chunk)

    def finish(self, key: str = "") -> int:
        """Wait for the end, and return the exit code.

        Args:
            key: is pressed, and again where that has no effect: Python misses a key that comes
                between readline's prompt and its wait for keys.
        """
        start = pressed = time.monotonic()
        self.type(key)
        while self._read():
            now = time.monotonic()
            assert now < start + DEADLINE_S, f"the process never ended:\n{self.shown}"
            if now > pressed + PATIENCE_S:
                self.type(key)
                pressed = now
        code = self._process.wait(DEADLINE_S)
        os.close(self._ours)
        return code

    def kill(self) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
