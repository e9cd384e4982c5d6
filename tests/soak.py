"""The soak: each door killed at every event on the disk, started twice, and given too small a disk.

    python -m tests.soak                  all of it
    python -m tests.soak --every 40       every 40th event, one pair and two sizes of a kind
    unshare -rm python -m tests.soak      where only root may mount a disk of a given size

A door that was killed is started again, and must end with the bytes of a run that nobody disturbed.
Of two processes with one output, one is refused and the other does not notice; a run that another
has ended may be resumed again. On a disk that is
too small a run ends in a message, and what it has saved goes on elsewhere. Each process is forked
from this one, which has imported everything, so that a trial takes a second.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

import run.log
import training.answers
from run.checkpoint import list_checkpoints
from run.lock import LOCK_FILE
from tests.support.door_process import ROOT, Process
from tests.support.file_events import FileEvents

MODEL = ROOT / "bundled" / "model"
NUM_PAIRS, DELAY_S = 12, 0.1
NUM_SIZES = 28
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# of a row of metrics: what depends on the machine
CLOCK = ("tokens_per_second", "peak_memory_bytes")
# with the time of the first start, its hash, the speed, and whether the run was resumed
UNLIKE = ("state.json", "sha256.json", "README.md", "run.json")
TRAIN = (
    f"--model {MODEL} --data data.jsonl --device cpu --max-steps 5 --save-steps 2 --batch-size 1 "
    "--gradient-accumulation-steps 1 --learning-rate 1e-2 --lora-r 2 --lora-dropout 0.1 "
    "--target-modules q_proj,down_proj --save-total-limit 1 --sample-prompt hello --sample-steps 2"
).split()


@dataclass(frozen=True)
class Case:
    """A command, and the folder that it is started in.

    Attributes:
        start: what the folder holds before.
        again: what a process is started with after one that was killed.
    """

    name: str
    door: str
    start: Path
    arguments: list[str]
    again: list[str]


@dataclass
class Tally:
    """What was tried, and what did not hold.

    Attributes:
        num_whole: of trials with a disk too small, those in which the door ended well all the same.
    """

    what: str
    num_tried: int = 0
    num_whole: int | None = None
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def trial(self, name: str) -> Iterator[None]:
        self.num_tried += 1
        try:
            yield
        except (AssertionError, OSError) as error:
            self.failures.append(f"{self.what}, {name}: {error}")

    def __str__(self) -> str:
        whole = "" if self.num_whole is None else f", {self.num_whole} with all results"
        return f"{self.what:50} {self.num_tried:4} tried, {len(self.failures)} failed{whole}"


def contents(folder: Path) -> dict[str, bytes]:
    """What a door has left in a folder, but for what depends on the time."""
    files = {
        path.relative_to(folder).as_posix(): b"" if path.name in UNLIKE else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    for name in files.keys() & {"metrics.jsonl"}:
        rows = [json.loads(line) for line in files[name].splitlines()]
        kept = [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]
        files[name] = json.dumps(kept).encode()
    return files


def check_same(folder: Path, whole: Path, without: str = "/") -> None:
    """Hold a folder's files against those of an undisturbed run.

    Args:
        without: what begins the names of files that are not looked at.
    """
    found, expected = (
        {name: content for name, content in contents(each).items() if not name.startswith(without)}
        for each in (folder, whole)
    )
    differing = [n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)]
    assert not differing, f"other bytes than an undisturbed run: {', '.join(sorted(differing))}"


def last_step(output: Path) -> int:
    found = list_checkpoints(output) if output.is_dir() else []
    return int(found[-1].name.rpartition("-")[2]) if found else 0


class Soak:
    """The trials, each in a folder of its own."""

    def __init__(self, folder: Path, every: int, say: Callable[[str], None]) -> None:
        self._folder, self._every, self._say = folder, every, say
        self._num_folders = 0
        self.tallies: list[Tally] = []
        begun, stopped = folder / "begun", folder / "stopped"
        self._begun = begun
        begun.mkdir()
        lines = (ROOT / "bundled" / "data.jsonl").read_text().splitlines()
        (begun / "data.jsonl").write_text("\n".join(lines[:70:10]) + "\n")
        to_out = [*TRAIN, "--output", "out"]
        fresh = Case("train", "train", begun, to_out, [*to_out, "--resume"])
        whole, events = self._undisturbed(fresh)
        # in the middle of a row, after a checkpoint
        saved = next(
            i for i, name in enumerate(events) if "rename" in name and "checkpoint-2" in name
        )
        row = next(i for i in range(saved, len(events)) if events[i].startswith("write"))
        shutil.copytree(begun, stopped)
        Process("train", to_out, stopped, last=row + 1).finish()
        assert last_step(stopped / "out") == 2
        resumed = Case("train --resume", "train", stopped, fresh.again, fresh.again)
        merging = f"--model {MODEL} --adapter {whole} --output out".split()
        quantizing = f"--model {MODEL} --output out".split()
        self._cases = [fresh, resumed]
        self._cases += [Case("merge", "merge", begun, merging, merging)]
        self._cases += [Case("quantize", "quantize", begun, quantizing, quantizing)]
        self._wholes = {case.name: self._undisturbed(case) for case in self._cases}
        self._fresh = [case for case in self._cases if case.start == self._begun]

    def run(self) -> None:
        for case in self._cases:
            self._kill(case, loses_power=False)
            self._kill(case, loses_power=True)
        for case in self._cases:
            self._start_twice(case)
        self._start_twice_without_output()
        if not can_mount(self._folder):
            self._say("disk sizes are not tried: no disk can be mounted here")
            return
        for case in self._fresh:
            self._fill_disk(case, is_told=True)
            self._fill_disk(case, is_told=False)

    def _begin(self, case: Case) -> Path:
        self._num_folders += 1
        return shutil.copytree(case.start, self._folder / str(self._num_folders))

    def _undisturbed(self, case: Case) -> tuple[Path, list[str]]:
        folder = self._begin(case)
        ended = Process(case.door, case.arguments, folder).finish()
        assert ended.code == 0, ended.said
        return folder / "out", ended.events

    def _tally(self, what: str) -> Tally:
        self.tallies.append(Tally(what))
        return self.tallies[-1]

    def _kill(self, case: Case, loses_power: bool) -> None:
        """Kill a door at each event, and start it again."""
        tally = self._tally(
            f"{case.name}, {'power lost' if loses_power else 'SIGKILL'} at an event"
        )
        whole, events = self._wholes[case.name]
        for number in range(1 + loses_power, len(events) + 1, self._every):
            with tally.trial(f"at event {number}, {events[number - 1]}"):
                folder = self._begin(case)
                before = last_step(folder / "out")
                killed = Process(
                    case.door, case.arguments, folder, last=number, loses_power=loses_power
                ).finish()
                assert killed.code == -signal.SIGKILL, f"code {killed.code}: {killed.said}"
                assert last_step(folder / "out") >= before, "a checkpoint is gone"
                if case.door == "train" or not (folder / "out").exists():
                    again = Process(case.door, case.again, folder).finish()
                    assert again.code == 0, again.said
                    # of a finished run, which nobody opens again
                    (folder / "out" / LOCK_FILE).unlink(missing_ok=True)
                else:
                    # a copy that has its name is whole; a lock that nobody holds stops nobody
                    (folder / "out.quatrain.lock").unlink(missing_ok=True)
                check_same(folder / "out", whole)
                assert_nothing_left(folder)
                shutil.rmtree(folder)
        self._say(str(tally))

    def _start_twice(self, case: Case) -> None:
        """Start a door twice at about the same time."""
        tally = self._tally(f"{case.name}, two processes with one output")
        whole, _ = self._wholes[case.name]
        for number in range(0, NUM_PAIRS, self._every):
            with tally.trial(f"pair {number}"):
                folder = self._begin(case)
                first = Process(case.door, case.arguments, folder)
                time.sleep(DELAY_S * number)
                second = Process(case.door, case.arguments, folder)
                pair = [first.finish(), second.finish()]
                for ended in pair:
                    ended.check_message()
                if [ended.code for ended in pair] == [0, 0]:
                    # one after the other, of which the second found a run to resume
                    (_, end), (begin, _) = (ended.span(folder / "out") for ended in pair)
                    assert case.start != self._begun, "both have begun the same run"
                    assert end < begin, f"both at once: {[p.said for p in pair]}"
                else:
                    assert sorted(ended.code for ended in pair) == [0, 1], [p.said for p in pair]
                check_same(folder / "out", whole)
                assert_nothing_left(folder)
                shutil.rmtree(folder)
        self._say(str(tally))

    def _start_twice_without_output(self) -> None:
        tally = self._tally("train, two processes without --output")
        case = self._cases[0]
        whole, _ = self._wholes[case.name]
        for number in range(0, NUM_PAIRS, self._every):
            with tally.trial(f"pair {number}"):
                folder = self._begin(case)
                pair = [Process(case.door, TRAIN, folder) for _ in range(2)]
                assert [process.finish().code for process in pair] == [0, 0]
                for name in ("run-1", "run-2"):
                    for file in ("adapter_model.safetensors", "metrics.jsonl", "samples.jsonl"):
                        found, expected = contents(folder / "out" / name), contents(whole)
                        assert found[file] == expected[file], f"{name}/{file}"
                shutil.rmtree(folder)
        self._say(str(tally))

    def _fill_disk(self, case: Case, is_told: bool) -> None:
        """Give a door disks from one that is much too small to one that is large enough.

        Args:
            is_told: how much is free; otherwise another program takes the room after the start.
        """
        when = "at the start" if is_told else "while it runs"
        tally = self._tally(f"{case.name}, a disk too small {when}")
        tally.num_whole = 0
        whole, _ = self._wholes[case.name]
        enough = 2 * sum(path.stat().st_blocks * 512 for path in whole.rglob("*"))

        def begin(events: FileEvents) -> None:
            if not is_told:
                usage = shutil.disk_usage(folder)
                shutil.disk_usage = lambda path: usage  # pyright: ignore[reportAttributeAccessIssue]

        arguments = ["disk/out" if each == "out" else each for each in case.arguments]
        for number in range(1, NUM_SIZES + 1, min(self._every, NUM_SIZES // 2)):
            size = enough * number // NUM_SIZES
            with tally.trial(f"{size:,} bytes"):
                folder = self._begin(case)
                with mounted(folder / "disk", size) as disk:
                    ended = Process(case.door, arguments, folder, begin).finish()
                    left = sorted(path.name for path in disk.iterdir())
                    if left == ["out"]:
                        shutil.copytree(disk / "out", folder / "out")
                ended.check_message()
                assert left in ([], ["out"]), f"left over: {left}"
                if case.door == "train":
                    for name in ADAPTER if ended.code == 0 else ():
                        assert (folder / "out" / name).read_bytes() == (whole / name).read_bytes()
                    again = Process(case.door, case.again, folder).finish()
                    assert again.code == 0, again.said
                if ended.code == 0:
                    # a run that ended where a checkpoint had no room is not trained again
                    check_same(folder / "out", whole, without="checkpoint-")
                elif case.door == "train":
                    check_same(folder / "out", whole)
                else:
                    assert not left, "a copy that is not whole"
                tally.num_whole += ended.code == 0
                shutil.rmtree(folder)
        self._say(str(tally))


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Path]:
    """A disk of a size in bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "soak", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def can_mount(folder: Path) -> bool:
    try:
        with mounted(folder / "disk", 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        (folder / "disk").rmdir()


def assert_nothing_left(folder: Path) -> None:
    """See that nothing is there but what was, the output and the cache."""
    left = {path.name for path in folder.iterdir()} - {"data.jsonl", "out", "cache"}
    assert not left, f"left over: {left}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", allow_abbrev=False)
    parser.add_argument(
        "--every", type=int, default=1, help="try each n-th event, pair and size alone"
    )
    every = parser.parse_args(arguments).every
    # a process that is forked has one thread
    torch.set_num_threads(1)
    # an answer of any length is written at once, and the chart is nothing that a run goes on from
    training.answers.SAMPLE_TOKENS = 4
    run.log.can_draw = lambda: False
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder).resolve(), every, lambda text: print(text, flush=True))
        soak.run()
    failures = [failure for tally in soak.tallies for failure in tally.failures]
    print(*failures, sep="\n")
    num_tried = sum(tally.num_tried for tally in soak.tallies)
    print(f"{num_tried:,} tried, {len(failures):,} failed, {time.monotonic() - start:,.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
