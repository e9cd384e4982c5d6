"""What the names of files say about the parts of a data set: subsets, splits and their kinds.

data/train_sft-00000-of-00003.parquet     the split train_sft, which is to be learned from
main/validation.jsonl                     the subset main, to be evaluated on
"""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

_KIND_OF_WORD = {
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
_WORD = re.compile(r"[a-z]+")
# train-00000-of-00002.parquet, as datasets.push_to_hub names them
SHARD = re.compile(r"-(\d{3,})-of-(\d{3,})\b")


class Part(NamedTuple):
    """A split of a subset, with the names of its files in the order in which they are read.

    Attributes:
        is_default: the subset is the one to take where none is named.
    """

    subset: str
    split: str
    names: tuple[str, ...]
    is_default: bool = False


def kind_of(split: str) -> str:
    """Whether a split is one of train, validation or test, by the words of its name; "" if not."""
    words = (_KIND_OF_WORD.get(word[0]) for word in _WORD.finditer(split.lower()))
    return next((kind for kind in words if kind), "")


def family_of(split: str) -> str:
    """The name of a split without the word of its kind: train_sft and test_sft are of one
    family."""
    for word in _WORD.finditer(split.lower()):
        if word[0] in _KIND_OF_WORD:
            return split[: word.start()] + split[word.end() :]
    return split


def split_of(name: str) -> str:
    """The split of a file by its name, or else by the nearest folder's; "" if neither says one."""
    *folders, file = PurePosixPath(name).parts
    stem = PurePosixPath(SHARD.sub("", file).removesuffix(".gz")).stem
    if kind_of(stem):
        return stem.rstrip("0123456789_-.")
    folder = next((each for each in reversed(folders) if kind_of(each)), "")
    # each split that push_to_hub writes is in files of its name
    return folder or (stem if SHARD.search(file) else "")


def subset_of(name: str) -> str:
    """The folders of a file, without those that name a split; "." for a file in none."""
    folders = PurePosixPath(name).parts[:-1]
    return "/".join(each for each in folders if not kind_of(each)) or "."


def parts_by_name(names: Iterable[str]) -> list[Part]:
    """The parts of a data set by the names of its files alone."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        found.setdefault((subset_of(name), split_of(name)), []).append(name)
    return [Part(subset, split, tuple(some)) for (subset, split), some in found.items()]
