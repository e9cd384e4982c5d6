"""Tables that kernels read, made once for a device and kept as long as the process.

Every pass reads the tables, so no table may lie in the memory of one pass: captured graphs write
that memory again, and torch's allocator takes it for free. So the code that puts a model on a
device makes every table before the first pass; making a table during a pass is an error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

_tables: dict[tuple[object, ...], object] = {}
_passes_running = 0


def constant(make: Callable[P, T]) -> Callable[P, T]:
    """Keep a function's result for its arguments, which must be positional.

    Raises:
        RuntimeError: a result that was not made yet is asked for while a pass runs.
    """

    @wraps(make)
    def find(*args: P.args, **kwargs: P.kwargs) -> T:
        assert not kwargs
        key = (make, *args)
        if key not in _tables:
            if _passes_running:
                raise RuntimeError(
                    "tables of kernels must be made before a pass, whose memory is written again: "
                    f"{make.__module__}.{make.__name__}{args} was not; make it where the model is "
                    "put on its device"
                )
            _tables[key] = make(*args, **kwargs)
        return cast(T, _tables[key])

    return find


@contextmanager
def no_new_constants() -> Iterator[None]:
    """Let a pass run, which reads tables and makes none."""
    global _passes_running
    _passes_running += 1
    try:
        yield
    finally:
        _passes_running -= 1
