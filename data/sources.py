"""The files that --data and --eval-data name: one file, or the files of a folder or a hub data set.

A data set has parts: splits, perhaps of several subsets. Its card declares them (data/card.py), or
else the names of its files say them (data/splits.py). Training takes the split whose name has the
word train. Evaluation takes validation, or else test: of the subset that is learned from, and of
its family, as test_sft is of train_sft. Files without such names are all of one split. Where these
rules leave a choice that no flag makes (two subsets, train_sft beside train_gen, two formats), that
is an error: one set that is read twice, or two sets read as one, would go unnoticed. Links inside a
folder are followed; a folder that is reached twice is read once.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from data.card import CARD, read_parts
from data.reading.files import data_suffix, is_structured
from data.splits import SHARD, Part, family_of, kind_of, parts_by_name
from hub.fetch import find_folder, parse_hub_id

Use = Literal["train", "eval"]

_KINDS_OF_USE = {"train": ("train",), "eval": ("validation", "test")}
_FLAG_OF_USE = {"train": "--split", "eval": "--eval-split"}
# files about a data set, which could be read as text but are no data
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|dataset_infos?|dataset_dict|state)\..*", re.I
)


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a data set.

    Attributes:
        what: such as "--data", for messages.
        use: what for.
        subsets, splits: names; a data set takes the one that it has. a+b is two splits as one.
        beside: the part that is learned from, where it is of the same data set.
    """

    what: str
    use: Use = "train"
    subsets: Collection[str] = ()
    splits: Collection[str] = ()
    beside: Part | None = None


@dataclass(frozen=True)
class Found:
    """The files to read.

    Attributes:
        part: the part of the data set that they are; None for a path of a file.
        parts: all parts of the data set.
    """

    files: list[Path]
    part: Part | None = None
    parts: tuple[Part, ...] = ()

    def describe(self) -> str:
        """Say which part is read and which files: how many, and the first of them."""
        said = []
        if self.part and len({part.subset for part in self.parts}) > 1:
            said.append(f"subset {self.part.subset}, ")
        if self.part and self.part.split and len(self.parts) > 1:
            said.append(f"split {self.part.split}, ")
        names = _some([str(file) for file in self.files])
        number = "" if len(self.files) == 1 else f"{len(self.files):,} files: "
        return f"{''.join(said)}reading {number}{names}"


def find_data(place: str, wanted: Wanted) -> Found:
    """Find the files of a place: a path, or a hub data set, `owner/name` or `owner/name@revision`.

    Raises:
        FileNotFoundError: the id is no data set, nor is it a path.
        PermissionError, ConnectionError: as `hub.fetch.find_folder`.
        ValueError: a folder or data set that has no files to read, or leaves a choice.
    """
    path = Path(os.path.expanduser(place))
    is_hub_id = not path.exists() and not data_suffix(place) and parse_hub_id(place)
    if not path.is_dir() and not is_hub_id:
        return Found([path])
    chosen: list[tuple[Part, list[Part]]] = []

    def choose(names: Collection[str], get: Callable[[str], Path]) -> tuple[str, ...]:
        parts = parts_of(names, place, wanted, get)
        chosen[:] = [(choose_part(parts, place, wanted), parts)]
        return chosen[0][0].names

    if is_hub_id:
        path = find_folder(place, wanted.what, "dataset", choose)
    else:
        choose(_files_below(path), path.joinpath)
    ((part, parts),) = chosen
    return Found([path / name for name in part.names], part, tuple(parts))


def check_names(flag: str, names: Collection[str], found: Sequence[Found]) -> None:
    """Refuse the name of a subset or a split that no data set has.

    Args:
        flag: one of --subset, --split and --eval-split.
        found: where the name may be.
    """
    kind = "subset" if flag == "--subset" else "split"
    taken = {name for each in found if each.part for name in _names_of(each.part, kind)}
    there = dict.fromkeys(getattr(part, kind) for each in found for part in each.parts)
    for name in names:
        if name not in taken:
            raise ValueError(
                f"{flag} must name a {kind} of the data: got {name!r}, and there "
                f"{'is' if len(there) < 2 else 'are'} {_some([each for each in there if each])}"
            )


def _names_of(part: Part, kind: str) -> tuple[str, ...]:
    return (part.subset,) if kind == "subset" else (part.split, kind_of(part.split))


def _files_below(folder: Path) -> list[str]:
    """The names of a folder's files, those of linked folders included.

    Real folders come before linked ones, so that a folder reached both ways has its own name.
    """
    names: list[str] = []
    seen: set[tuple[int, int]] = set()
    linked = [folder]
    while linked:
        for root, folders, files in os.walk(linked.pop(0)):
            status = os.stat(root)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            here = Path(root)
            linked += [here / name for name in sorted(folders) if (here / name).is_symlink()]
            found = [here / name for name in files if (here / name).is_file()]
            names += [each.relative_to(folder).as_posix() for each in found]
    return names


def parts_of(
    names: Collection[str], place: str, wanted: Wanted, get: Callable[[str], Path]
) -> list[Part]:
    """The parts of the data set whose files have these names."""
    visible = [name for name in names if not any(p.startswith(".") for p in name.split("/"))]
    readable = [name for name in visible if data_suffix(name)]
    if CARD in names and (parts := read_parts(get(CARD), readable)):
        return parts
    data = [name for name in readable if not _ABOUT.fullmatch(PurePosixPath(name).name)]
    # a text beside records is about them
    data = [name for name in data if is_structured(name)] or data
    if not data:
        raise ValueError(
            f"{wanted.what} must have files that can be read: {place} has {_some(sorted(names))}; "
            "convert them to JSON lines"
        )
    return parts_by_name(data)


def choose_part(parts: Sequence[Part], place: str, wanted: Wanted) -> Part:
    """Choose the part that is wanted.

    Raises:
        ValueError: there is none, or what is to be read is not one set of one format.
    """
    what, flag = wanted.what, _FLAG_OF_USE[wanted.use]
    some = _of_subset(parts, wanted)
    found = list(_named(some, wanted.splits)) or _of_use(some, wanted)
    if not found:
        there = dict.fromkeys(part.split or _some(part.names) for part in some)
        raise ValueError(
            f"{what} must have a split for {' or '.join(_KINDS_OF_USE[wanted.use])}: {place} has "
            f"{_some([*there])}; choose with {flag}, or give the path of a file"
            + (", or take a part of --data with --eval-fraction" if wanted.use == "eval" else "")
        )
    for kind, choice, given in (
        ("subset", "--subset", wanted.subsets),
        ("split", flag, wanted.splits),
    ):
        there = [*dict.fromkeys(getattr(part, kind) for part in found)]
        if len(there) > 1:
            lacks = f", and none is called {' or '.join(given)}" if given else ""
            raise ValueError(
                f"{what} must be one {kind} of {place}, or sets would be mixed: there are "
                f"{_some(there)}{lacks}; choose with {choice} {there[0]}"
            )
    (part,) = found
    if not part.names:
        raise ValueError(
            f"{what} must have files that can be read: {place} has none of the split {part.split} "
            f"of {part.subset}, by the paths in {CARD}"
        )
    if len(formats := sorted({data_suffix(name) for name in part.names})) > 1:
        raise ValueError(
            f"{what} must have files of one format, or sets would be mixed: {place} has "
            f"{_some(formats)}; download what you want and give its path"
        )
    _check_shards(part.names, place, what)
    return part


def _of_subset(parts: Sequence[Part], wanted: Wanted) -> list[Part]:
    """The parts of the subset that a flag names, that is learned from, or that is the default."""
    beside = wanted.beside.subset if wanted.beside else None
    return (
        [part for part in parts if part.subset in wanted.subsets]
        or [part for part in parts if part.subset == beside]
        or [part for part in parts if part.is_default]
        or [*parts]
    )


def _named(parts: Sequence[Part], splits: Collection[str]) -> Iterator[Part]:
    """The parts whose splits are named, by their whole names or else by their kinds."""
    for subset in dict.fromkeys(part.subset for part in parts):
        there = {part.split: part for part in parts if part.subset == subset}
        exact = [name for name in splits if there.keys() >= {*name.split("+")}]
        for name in exact:
            files = (file for each in name.split("+") for file in there[each].names)
            yield Part(subset, name, tuple(files))
        if not exact:
            yield from (part for split, part in there.items() if kind_of(split) in splits)


def _of_use(parts: Sequence[Part], wanted: Wanted) -> list[Part]:
    """The parts whose names say that they are for this use; of those of equal right, all."""
    kinds = _KINDS_OF_USE[wanted.use]
    if wanted.beside:
        family = family_of(wanted.beside.split)
        for kind in kinds:
            if same := [
                p for p in parts if kind_of(p.split) == kind and family_of(p.split) == family
            ]:
                return same
    for kind in kinds:
        if found := [part for part in parts if kind_of(part.split) == kind]:
            return found
    # files without a split's name, beside files with one, are not the split asked for
    return [] if any(kind_of(part.split) for part in parts) else [*parts]


def _check_shards(names: Sequence[str], place: str, what: str) -> None:
    """Refuse a set of which only some files are there, as a broken download leaves them."""
    found = [m for name in names if (m := SHARD.search(name))]
    totals = {int(m[2]) for m in found}
    if found and {int(m[1]) for m in found} != set(range(max(totals))):
        raise ValueError(
            f"{what} must have all {max(totals):,} files of its set: {place} has "
            f"{len(found):,}, {_some(names)}; download the others"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"
