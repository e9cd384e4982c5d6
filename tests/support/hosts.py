"""Processes that keep what scripts import: a script starts in milliseconds in place of seconds.

transformers, PEFT and bitsandbytes take ten seconds to import, Triton's interpreter three, and most
scripts that the tests start compute for less than one. A host imports what a script imports, then
forks; no script sees what another one did.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

_SCRIPT = Path(__file__).with_name("import_host.py")
_PYTHON = Path(__file__).with_name("python_process.py")


class Host:
    """A process that runs scripts in forks of itself."""

    def __init__(self, options: Sequence[str], settings: Mapping[str, str]) -> None:
        """Args:
        options: of the interpreter.
        settings: what its environment has beside that of this process.
        """
        self._process = subprocess.Popen(
            [sys.executable, *options, str(_SCRIPT)],
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._process.communicate)

    def run(self, script: Path, arguments: Sequence[str], folder: Path) -> tuple[int, str]:
        """Run a script in a folder: its exit code, and what it printed."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with tempfile.NamedTemporaryFile("r", errors="replace") as said:
            job = {"script": script, "arguments": arguments, "folder": folder, "said": said.name}
            process.stdin.write(json.dumps(job, default=str) + "\n")
            process.stdin.flush()
            code = process.stdout.readline()
            assert code, f"the host of {script.name} has ended"
            return int(code), said.read()


@cache
def host(options: tuple[str, ...], **settings: str) -> Host:
    """The host of such processes, one for the tests of this process."""
    return Host(options, settings)


def run_python(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, as `subprocess.run` does, but for the import of torch.

    What torch, or Python as it starts, reads of the environment is that of this process.
    """
    with tempfile.TemporaryDirectory() as printed:
        streams = [Path(printed, name) for name in ("out", "err")]
        given = [*map(str, streams), json.dumps(dict(environment)), *arguments]
        code, said = host(()).run(_PYTHON, given, folder)
        assert not said, said
        return subprocess.CompletedProcess(arguments, code, *(s.read_text() for s in streams))
