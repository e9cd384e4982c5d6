"""Loads data files in a process that has imported little.

Every load forks confined processes. A process of pytest has imported all that is tested and holds
what many tests keep: to fork it takes longer than all else that is done with a tiny file.
"""

import atexit
import multiprocessing
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class _Failed(NamedTuple):
    traceback: str


def _serve(calls: Connection) -> None:
    while True:
        try:
            function, arguments, options = calls.recv()
        except EOFError:
            return
        try:
            outcome = function(*arguments, **options)
        except ValueError as error:
            outcome = error
        except BaseException:
            outcome = _Failed(traceback.format_exc())
        calls.send(outcome)


@cache
def _connection() -> Connection:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,)).start()
    theirs.close()
    # which ends it, before Python waits for its end
    atexit.register(ours.close)
    return ours


def in_small_process(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call a function of a module that imports little.

    Raises:
        ValueError: the function raised it.
        RuntimeError: it raised another error.
    """
    _connection().send((function, arguments, options))
    outcome = _connection().recv()
    if isinstance(outcome, ValueError):
        raise outcome
    if isinstance(outcome, _Failed):
        raise RuntimeError(outcome.traceback)
    return outcome
