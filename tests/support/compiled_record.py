"""A record of what the compiler made of each launch: a launch that is in it is not compiled again.

The same source, options, Triton and ptxas make the same code, and to make it for all GPUs takes
minutes. So what the tests ask of the code stands in tests/compiled: a file for each file of tests,
a line for each launch, named by its key. A kernel that was changed has another key, is not found,
and is compiled; so is a launch of which a test asks what is not in its line.

A record may be wrong, as a file that is edited or merged may. So every run compiles a share of what
it finds, and compares. The share is another one every day: in `DAYS` days each launch has its turn.

    python -m pytest --write-compiled tests/test_kernels_rope.py

compiles every launch of the named files of tests and writes their records anew.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

WRITE = "--write-compiled"
DAYS = 20

Answers = dict[str, Any]


@dataclass
class Launch:
    """One launch that a file of tests compiles, and what it knows of the code."""

    tests: str  # kernels_rope of tests/test_kernels_rope.py
    kernel: str
    capability: int
    configuration: str
    key: str
    answers: Answers = field(default_factory=dict)
    is_recorded: bool = False  # with all that was asked
    is_compiled: bool = False

    @property
    def line(self) -> str:
        """Name the launch in its record."""
        return f"{self.kernel} sm_{self.capability} {self.key}"

    def ask(self, question: str, compiler: Callable[[str], Any]) -> Any:
        """Give the known answer, or else the compiler's."""
        if question not in self.answers:
            self.is_recorded, self.is_compiled = False, True
            self.answers[question] = compiler(question)
        return self.answers[question]

    def check(self, compiler: Callable[[str], Any]) -> None:
        """Compare every known answer with the compiler's."""
        self.is_compiled = True
        for question, known in self.answers.items():
            found = compiler(question)
            assert found == known, (
                f"tests/compiled/{self.tests}.json must say what the compiler does: line "
                f"{self.line!r} answers {question!r} by {known}, the compiler by {found}; write it "
                f"anew with python -m pytest {WRITE} tests/test_{self.tests}.py"
            )


class Record:
    """The launches of a run, looked up in the files of a folder."""

    def __init__(self, folder: Path, is_written: bool = False, today: date | None = None) -> None:
        self.folder = folder
        self.is_written = is_written
        self._day = (today or date.today()).toordinal()
        self._lines: dict[str, dict[str, Answers]] = {}
        self._launches: dict[tuple[str, str], Launch] = {}

    def look_up(self, launch: Launch, compiler: Callable[[str], Any]) -> Launch:
        """Find what is known of a launch, and compile it all the same on its day."""
        known = self._launches.get((launch.tests, launch.key))
        if known:
            return known
        answers = self._lines_of(launch.tests).get(launch.line)
        if answers is not None:
            launch.answers, launch.is_recorded = dict(answers), True
            if (int(launch.key, 16) + self._day) % DAYS == 0:
                launch.check(compiler)
        self._launches[launch.tests, launch.key] = launch
        return launch

    def _lines_of(self, tests: str) -> dict[str, Answers]:
        if tests not in self._lines:
            path = self.folder / f"{tests}.json"
            is_read = path.exists() and not self.is_written
            self._lines[tests] = json.loads(path.read_text()) if is_read else {}
        return self._lines[tests]

    def launches(self) -> list[dict[str, Any]]:
        """Give all launches as plain values, for another process."""
        return [asdict(launch) for launch in self._launches.values()]

    def add(self, launches: Iterable[dict[str, Any]]) -> None:
        """Take the launches of another process."""
        for values in launches:
            launch = Launch(**values)
            known = self._launches.setdefault((launch.tests, launch.key), launch)
            known.answers |= launch.answers
            known.is_recorded &= launch.is_recorded
            known.is_compiled |= launch.is_compiled

    def write(self) -> None:
        """Write the record of each file of tests that compiled something in this run."""
        files: dict[str, list[Launch]] = {}
        for launch in self._launches.values():
            files.setdefault(launch.tests, []).append(launch)
        for tests, launches in files.items():
            # an order that no key decides, so that one changed kernel changes its own lines
            launches.sort(key=lambda one: (one.kernel, one.capability, one.configuration, one.key))
            lines = (
                f"{json.dumps(one.line)}: {json.dumps(one.answers, sort_keys=True)}"
                for one in launches
            )
            self.folder.mkdir(exist_ok=True)
            (self.folder / f"{tests}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def summary(self) -> str:
        """Say how many launches were compiled, and how many were known: empty without any."""
        if not self._launches:
            return ""
        count = Counter((one.is_recorded, one.is_compiled) for one in self._launches.values())
        return (
            f"launches: {count[True, False]} looked up in tests/compiled, {count[True, True]} "
            f"found there and compiled to check it, {count[False, True]} not found and compiled"
        )


RECORD = Record(Path(__file__).resolve().parent.parent / "compiled")


def running_tests() -> str:
    """Name the file of the test that runs."""
    path, *_ = os.environ["PYTEST_CURRENT_TEST"].partition("::")
    return Path(path).stem.removeprefix("test_")
