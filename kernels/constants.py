"""Tables that kernels read, made once for a device and kept as long as the process.

A table outlives the pass that asks for it first. It must not lie in that pass's memory: captured
graphs write there, and to torch's allocator their memory is free. So every table is made before the
first pass, by whoever puts a model on a device, and while a pass runs making one is an error.
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
    """Keep what a function makes on a device for its arguments, which are given by place.

    Raises:
        RuntimeError: it is asked for the first time while a pass runs; on each such call.
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
    """Let a pass run, which takes tables and makes none."""
    global _passes_running
    _passes_running += 1
    try:
        yield
    finally:
        _passes_running -= 1
