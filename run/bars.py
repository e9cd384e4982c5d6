"""The progress bars of all doors, each one line that a terminal of 80 columns can hold.

    loading |##########          | 123/291 tensors, 00:07 left
    training |##          | 38/468, 02:20 left, loss 1.2345  18,021 tok/s  3.00 GiB

A narrower terminal has a shorter bar. Where stderr is no terminal there is none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

from tqdm import tqdm

# tqdm writes a comma in front of the figures
_WITH_END = "{desc} |{bar}| {n_fmt}/{total_fmt}{unit}, {remaining} left{postfix}"
_WITHOUT_END = "{desc} {n:,}{unit}, {rate_fmt}"
# errors of print: a closed terminal, a full disk, a character that the terminal does not have
UNHEARD = (OSError, ValueError)

# is given how much is done, and of how much
Report: TypeAlias = Callable[[int, int], None]


class Bar(tqdm):
    """tqdm's bar; a terminal that is gone does not stop the work behind it."""

    def display(self, *args: Any, **kwargs: Any) -> None:
        with suppress(*UNHEARD):
            super().display(*args, **kwargs)

    def close(self) -> None:
        with suppress(*UNHEARD):
            super().close()


def progress_bar(
    what: str,
    units: str = "",
    total: int | None = None,
    *,
    done: int = 0,
    is_shown: bool = True,
    stays: bool = False,
) -> Bar:
    """Draw a bar on stderr, if that is a terminal.

    Args:
        what: is being done.
        units: of the numbers, in the plural.
        total: None where the end is not known: there is a count and a speed in place of the bar.
        done: how much of the total was done before.
        is_shown: False on all ranks but the first.
        stays: whether the bar is left on the screen at its end.
    """
    return Bar(
        desc=what,
        total=total,
        initial=done,
        unit=f" {units}" if units else "",
        bar_format=_WITHOUT_END if total is None else _WITH_END,
        dynamic_ncols=True,
        leave=stays,
        disable=None if is_shown else True,
    )


@contextmanager
def reporting(what: str, units: str, *, is_shown: bool = True) -> Iterator[Report]:
    """Yield a function that draws a bar as soon as it is told how much there is to do."""
    with progress_bar(what, units, total=0, is_shown=is_shown) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
