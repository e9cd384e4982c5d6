"""What every kernel compiled in a test run takes of a GPU, as one table at the end of the run.

It imports no triton: a run that compiles nothing prints nothing and pays nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor."""

    registers: int  # of a thread
    shared_bytes: int  # of a block
    stack_bytes: int  # of a thread: what did not fit the registers lies there


# by kernel and compute capability, then by configuration: one compiled twice counts once
_COMPILED: dict[tuple[str, int], dict[str, Resources]] = {}

_HEAD = ("kernel", "GPU", "configurations", "registers", "shared bytes", "stack bytes")


def note_compiled(kernel: str, capability: int, configuration: str, resources: Resources) -> None:
    """Add a compiled kernel to the table."""
    _COMPILED.setdefault((kernel, capability), {})[configuration] = resources


def resource_table() -> Iterator[str]:
    """Print one line a kernel and capability: the most that a configuration of it takes."""
    if not _COMPILED:
        return
    rows: list[tuple[str, ...]] = [_HEAD]
    for (kernel, capability), compiled in sorted(_COMPILED.items()):
        most = [
            max(getattr(resources, name) for resources in compiled.values())
            for name in Resources.__annotations__
        ]
        rows.append((kernel, f"sm_{capability}", *(str(n) for n in (len(compiled), *most))))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join((f"{name:<{widths[0]}}", *numbers))
