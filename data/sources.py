"""The files that --data and --eval-data name: one file, or the files of a folder or a hub data set.

A folder and a data set are read as load_dataset reads them without a configuration: a file or a
folder in it that is called train, validation (or valid, val, dev, eval) or test is that split, by
the words of its name; the files of a split are read in the order of their names. Training takes
train; evaluation takes validation, or else test. Files without such names are all of one split.
Where these rules leave a choice (two formats, two folders, train_sft beside train_gen, a missing
split) that is an error: one set that is read twice, or two sets read as one, would go unnoticed.
Links inside a folder are followed; a folder that is reached twice is read once.
"""

import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from data.reading.files import data_suffix, is_structured
from hub.fetch import find_folder, parse_hub_id

Use = Literal["train", "eval"]

_SPLIT_OF_WORD = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
_SPLITS_OF_USE = {"train": ("train",), "eval": ("validation", "test")}
# files about a data set, which could be read as text but are no data
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|dataset_infos?|dataset_dict|state)\..*", re.I
)

# train-00000-of-00002.parquet, as datasets.push_to_hub names them
_SHARD = re.compile(r"-(\d{3,})-of-(\d{3,})\b")


def find_data(place: str, what: str, use: Use = "train") -> list[Path]:
    """Find the files of a place: a path, or a hub data set, `owner/name` or `owner/name@revision`.

    Args:
        what: such as "--data", for messages.
        use: decides the split that is taken.

    Raises:
        FileNotFoundError: the id is no data set, nor is it a path.
        PermissionError, ConnectionError: as `hub.fetch.find_folder`.
        ValueError: a folder or data set that has no files to read, or leaves a choice.
    """
    path = Path(os.path.expanduser(place))
    if path.is_dir():
        return [path / name for name in choose_files(_files_below(path), place, what, use)]
    if path.exists() or data_suffix(place) or parse_hub_id(place) is None:
        return [path]
    chosen: list[str] = []

    def choose(names: Collection[str], get: Callable[[str], Path]) -> list[str]:
        chosen[:] = choose_files(names, place, what, use)
        return chosen

    folder = find_folder(place, what, "dataset", choose)
    return [folder / name for name in chosen]


def describe_files(files: Sequence[Path]) -> str:
    """Say which files are read: how many, and the first of them."""
    names = _some([str(file) for file in files])
    return f"reading {names}" if len(files) == 1 else f"reading {len(files):,} files: {names}"


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


def choose_files(names: Collection[str], place: str, what: str, use: Use) -> list[str]:
    """Choose among the names of a folder's files those of the split.

    Raises:
        ValueError: there are none, or what is to be read is not one set of one format.
    """
    visible = [name for name in names if not any(p.startswith(".") for p in name.split("/"))]
    data = [n for n in visible if data_suffix(n) and not _ABOUT.fullmatch(PurePosixPath(n).name)]
    # a text beside records is about them
    data = [name for name in data if is_structured(name)] or data
    if not data:
        raise ValueError(
            f"{what} must have files that can be read: {place} has {_some(sorted(names))}; "
            "convert them to JSON lines"
        )
    of_split: dict[str, list[str]] = {}
    for name in sorted(data):
        of_split.setdefault(split_of(name), []).append(name)
    wanted = next((s for s in (*_SPLITS_OF_USE[use], "") if s in of_split), None)
    # files without a split's name, beside files with one, are not the split asked for
    if wanted is None or (wanted == "" and len(of_split) > 1):
        raise ValueError(
            f"{what} must have files of the split {' or '.join(_SPLITS_OF_USE[use])}: {place} has "
            f"{_some(sorted(data))}; give the path of the file"
            + (", or take a part of --data with --eval-fraction" if use == "eval" else "")
        )
    chosen = of_split[wanted]
    one_of_each = (
        ("format", data_suffix),
        ("folder", lambda name: str(PurePosixPath(name).parent)),
        ("split", _split_name),
    )
    for kind, key in one_of_each:
        kinds = sorted({key(name) for name in chosen} - {""})
        if len(kinds) > 1:
            raise ValueError(
                f"{what} must have files of one {kind}, or sets would be mixed: {place} has "
                f"{_some(kinds)}; download what you want and give its path"
            )
    _check_shards(chosen, place, what)
    return chosen


def _check_shards(names: Sequence[str], place: str, what: str) -> None:
    """Refuse a set of which only some files are there, as a broken download leaves them."""
    found = [m for name in names if (m := _SHARD.search(name))]
    totals = {int(m[2]) for m in found}
    if found and {int(m[1]) for m in found} != set(range(max(totals))):
        raise ValueError(
            f"{what} must have all {max(totals):,} files of its set: {place} has "
            f"{len(found):,}, {_some(names)}; download the others"
        )


def _split_name(name: str) -> str:
    """The split as a file calls it, `train_sft` of train_sft-00000-of-00003.parquet; "" where the
    name does not begin with a split."""
    file = PurePosixPath(name).name.lower()
    stem = _SHARD.sub("", file).partition(".")[0]
    is_split = _SHARD.search(file) or re.split(r"[^a-z]+", stem)[0] in _SPLIT_OF_WORD
    return stem.rstrip("0123456789_-") if is_split else ""


def split_of(name: str) -> str:
    """The split that a file's name says, or else the nearest folder's; "" if none does."""
    for part in reversed(PurePosixPath(name).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"
