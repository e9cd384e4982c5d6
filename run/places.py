"""The data sets that --data names, each with how often an epoch has its samples.

    a.jsonl                      each sample once
    a.jsonl,b.jsonl=0.5          half of the samples of b.jsonl in an epoch, the others in the next
    owner/name=2,a.jsonl         each sample of the data set owner/name twice

A path that is there is never taken apart, whatever commas and equals signs it has.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# an epoch's order has an entry each time that a sample comes
_MOST = 1000.0


class Place(NamedTuple):
    """A path or a hub id, and how often an epoch has each of its samples."""

    name: str
    weight: float = 1.0

    @property
    def public(self) -> str:
        """The place without the folders of this disk."""
        name = Path(self.name).name
        return name if self.weight == 1 else f"{name}={self.weight:g}"


def read_places(text: str) -> list[Place]:
    """Read the places of a text.

    Raises:
        ValueError: no place between commas, a weight out of range, or a place twice.
    """
    places = [_place(piece) for piece in _pieces(text)]
    if text and not places:
        raise ValueError(f"--data must name a data set: got {text!r}")
    for name, weight in places:
        # not a number is not in the range
        if not 0 < weight <= _MOST:
            raise ValueError(
                f"a weight of --data must be above 0 and at most {_MOST:g}: got {weight:g} of "
                f"{name}"
            )
    names = [place.name for place in places]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"--data must name each data set once: got {twice} twice; {twice}=2 reads it twice, "
            "and --split a+b two splits of it"
        )
    return places


def _pieces(text: str) -> Iterator[str]:
    """Divide a text at its commas, but for those of paths that are there."""
    pieces = text.split(",")
    while pieces:
        # the longest path first
        lengths = range(len(pieces), 1, -1)
        length = next((n for n in lengths if _is_there(_place(",".join(pieces[:n])).name)), 1)
        if piece := ",".join(pieces[:length]).strip():
            yield piece
        del pieces[:length]


def _place(text: str) -> Place:
    name, equals, weight = text.rpartition("=")
    if not equals or _is_there(text):
        return Place(text)
    try:
        number = float(weight)
    except ValueError:
        return Place(text)
    return Place(name, number)


def _is_there(text: str) -> bool:
    return os.path.exists(os.path.expanduser(text))
