"""foreign/guest.py: a guest's result comes back, and a guest that takes too much is ended."""

import gc
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from foreign import guest
from foreign.guest import in_guest

# a machine that others use as well gives a process a part of its processors
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(guest, "SECONDS", 0.5)
    monkeypatch.setattr(guest, "NUM_BYTES", 256 << 20)
    start = time.monotonic()
    yield
    assert time.monotonic() - start < PATIENCE_S


def children() -> set[str]:
    """The processes that this one has started and that have not ended."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_result_comes_back_and_no_process_stays() -> None:
    before = children()
    secret = {"a": [1, 2, (3, None)]}
    assert in_guest(lambda: secret | {"pid": os.getpid() == os.getppid()}, "x") == {
        **secret,
        "pid": False,
    }
    assert in_guest(lambda: "y" * 10_000_000, "x") == "y" * 10_000_000
    assert children() == before


def test_a_guest_collects_nothing_that_it_inherited() -> None:
    assert in_guest(gc.get_freeze_count, "x") > len(gc.get_objects()) // 2


def spin() -> None:
    while True:
        pass


def stay_in_c() -> None:
    assert 10 ** (10**9)


def backtrack() -> None:
    re.match("(a+)+$", "a" * 50 + "b")


def ignore_signals_and_spin() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    spin()


@pytest.mark.parametrize("work", [spin, stay_in_c, backtrack, ignore_signals_and_spin])
def test_work_without_end_is_ended(work: Callable[[], None]) -> None:
    before = children()
    message = "^the pattern must come to an end: it used 0.5 seconds of processor time$"
    with pytest.raises(ValueError, match=message):
        in_guest(work, "the pattern")
    assert children() == before


def take_it_at_once() -> None:
    bytearray(1 << 40)


def double() -> None:
    text = "a"
    while True:
        text += text


@pytest.mark.parametrize("work", [take_it_at_once, double])
def test_work_without_bounds_is_ended(work: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match=r"^x must come to an end: it used 256 MiB of memory$"):
        in_guest(work, "x")


def test_a_system_that_does_not_tell_its_memory_gets_no_limit_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_limit(kind: int, limits: tuple[int, int]) -> None:
        # as macOS does where the limit is below what the process has
        if kind == resource.RLIMIT_AS:
            raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(guest, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    assert in_guest(lambda: 3, "x") == 3


def test_what_is_wrong_with_the_work_comes_back() -> None:
    def refuse() -> None:
        raise ValueError("the prompt must be short")

    with pytest.raises(ValueError, match=r"^the prompt must be short$"):
        in_guest(refuse, "x")
    # a fault of ours is none of the work's
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError"):
        in_guest(lambda: 1 // 0, "x")
    with pytest.raises(ValueError, match="its process ended with exit code 5"):
        in_guest(lambda: os._exit(5), "x")


def test_a_long_text_has_more_time_and_room() -> None:
    def work() -> int:
        guest.allow(num_characters=400_000_000)
        end = time.process_time() + 1.5
        while time.process_time() < end:
            pass
        return len(bytearray(1 << 30))

    assert in_guest(work, "x") == 1 << 30


def test_a_library_says_nothing_of_its_own_end_on_the_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def panic() -> None:
        os.write(2, b"thread '<unnamed>' panicked at src/lib.rs:1:1")
        os._exit(5)

    with pytest.raises(ValueError, match="its process ended with exit code 5"):
        in_guest(panic, "x")
    assert capfd.readouterr().err == ""
    os.write(2, b"the parent's own")
    assert capfd.readouterr().err == "the parent's own"


def test_a_guest_ends_where_its_parent_is_interrupted() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGALRM, interrupt)
    before = children()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            in_guest(lambda: time.sleep(PATIENCE_S), "x")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert children() == before


def test_a_guest_does_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "guest").write_text(str(os.getpid()))
        spin()

    parent = multiprocessing.get_context("fork").Process(target=in_guest, args=(work, "x"))
    parent.start()
    place = tmp_path / "guest"
    wait_until(lambda: place.is_file() and place.read_text() != "")
    assert parent.pid is not None
    # stopped first, so that it cannot end its guest
    os.kill(parent.pid, signal.SIGSTOP)
    parent.kill()
    parent.join()
    wait_until(lambda: has_ended(int(place.read_text())))


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    # whoever takes orphans in may leave it unread
    return state == "Z"


def test_every_call_has_its_own_time() -> None:
    def work() -> str:
        for _ in range(4):
            guest.allow()
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass
        return "done"

    assert in_guest(work, "x") == "done"


def test_nothing_is_limited_outside() -> None:
    guest.allow()
    guest.allow(10**9)
    end = time.process_time() + 1
    while time.process_time() < end:
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
def test_a_guest_ends_with_its_parent(number: signal.Signals) -> None:
    code = """
import re, threading
from foreign.guest import in_guest
threading.Timer(1, print, ("started",), {"flush": True}).start()
in_guest(lambda: re.match("(a+)+$", "a" * 50 + "b"), "x")
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        os.kill(parent.pid, number)
        parent.wait()
    # long before the seconds that it may take
    for _ in range(200):
        try:
            os.killpg(parent.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(parent.pid, signal.SIGKILL)
    pytest.fail("the guest outlived its parent by 10 s")
