"""foreign/reading.py: what a file brings down is a message, what is wrong with us is not hidden."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from foreign.reading import Reading


class PanicException(BaseException):
    """As pyo3's, which cannot be made in Python."""


def recurse() -> None:
    recurse()


def divide() -> None:
    _ = 1 // 0


def look_up() -> None:
    _ = {}["a"]


def hash_a_list() -> None:
    key: Any = []
    _ = {key: 1}


def run_out_of_memory() -> None:
    raise MemoryError


def panic() -> None:
    raise PanicException("called `Option::unwrap()` on a `None` value\nnote: more")


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (recurse, r"RecursionError \(maximum recursion depth exceeded.*\)"),
        (divide, r"ZeroDivisionError \(.*\)"),
        (look_up, r"KeyError \('a'\)"),
        (hash_a_list, r"TypeError \(.*unhashable type: 'list'.*\)"),
        (run_out_of_memory, "MemoryError"),
        (panic, r"PanicException \(called `Option::unwrap\(\)` on a `None` value\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_file_brings_down_is_a_message_that_names_it_and_the_line(
    fail: Callable[[], None], message: str
) -> None:
    expected = rf"^x/config.json must be readable: got {message} in test_foreign_reading.py:\d+; "
    with pytest.raises(ValueError, match=expected) as raised, Reading("x/config.json", "advice"):
        fail()
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("error", [ValueError("v"), OSError("o"), AssertionError("a"), SystemExit])
def test_what_says_itself_what_is_wrong_passes_as_it_is(error: BaseException) -> None:
    with pytest.raises(BaseException) as raised, Reading("x"):  # noqa: PT011
        raise error
    assert raised.value is error or isinstance(raised.value, SystemExit)
    assert "must be readable" not in str(raised.value)


def test_nothing_is_kept_of_what_went_well() -> None:
    with Reading("x"):
        pass
    assert sys.exc_info() == (None, None, None)
