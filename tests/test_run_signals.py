"""run/signals.py: Ctrl-C as a request to stop an answer."""

import os
import signal
from collections.abc import Iterator

import pytest

from run.signals import interruptible


@pytest.fixture(autouse=True)
def _python_takes_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_ctrl_c_is_noted_and_the_second_ends_the_block() -> None:
    with interruptible() as is_pressed:
        assert not is_pressed()
        press()
        assert is_pressed()
        with pytest.raises(KeyboardInterrupt):
            press()


def test_behind_the_block_ctrl_c_is_what_it_was() -> None:
    for presses in (False, True):
        with interruptible():
            if presses:
                press()
        with pytest.raises(KeyboardInterrupt):
            press()


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible() as is_pressed:
        press()
        assert not is_pressed()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
