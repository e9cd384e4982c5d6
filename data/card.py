"""The subsets of a data set and their splits as its card declares them, in README.md.

    configs:
    - config_name: main
      default: true
      data_files:
      - split: train
        path: main/train-*

A path is a pattern of the names of the data set's files: * and ? stay inside a folder, ** is any
number of folders. So no path leaves the folder: it chooses among the names that are there. As
load_dataset reads them; left out are addresses, and settings of builders such as `sep`.
"""

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from data.splits import Part, parts_by_name
from foreign.yaml_head import read_field

CARD = "README.md"
_FIELD = "configs"
_DEFAULT = "default"


def read_parts(card: Path, names: Sequence[str]) -> list[Part]:
    """Read the parts that a card declares, each with its files among `names`; none if it has no
    `configs`.

    Raises:
        ValueError: `configs` is not what it must be.
    """
    configs = _listed(read_field(card, _FIELD))
    return [part for config in configs for part in _parts_of(config, card, names, len(configs))]


def _parts_of(config: Any, card: Path, names: Sequence[str], num_configs: int) -> Iterator[Part]:
    if not isinstance(config, dict):
        raise ValueError(f"{card} must have mappings in {_FIELD}: got {config!r:.80}")
    subset = _text(config.get("config_name", _DEFAULT), card)
    says_so = _text(config.get("default", ""), card).lower() == "true"
    is_default = says_so or subset == _DEFAULT or num_configs == 1
    folder = _text(config.get("data_dir", ""), card).removeprefix("./").strip("/")
    prefix = f"{folder}/" if folder else ""
    below = {name[len(prefix) :]: name for name in names if name.startswith(prefix)}
    if "data_files" not in config:
        for part in parts_by_name(below):
            chosen = tuple(below[inner] for inner in part.names)
            yield Part(subset, part.split, chosen, is_default)
        return
    for split, patterns in _patterns(config["data_files"], card).items():
        found = (inner for pattern in patterns for inner in matching(below, pattern))
        chosen = tuple(below[inner] for inner in dict.fromkeys(found))
        yield Part(subset, split, chosen, is_default)


def _patterns(data_files: Any, card: Path) -> dict[str, list[str]]:
    """The patterns of each split, of `data_files` in any of its forms."""
    found: dict[str, list[str]] = {}
    if isinstance(data_files, dict) and "path" not in data_files:
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    for each in _listed(data_files):
        entry = each if isinstance(each, dict) else {"path": each}
        split = _text(entry.get("split", "train"), card)
        paths = [_text(path, card) for path in _listed(entry.get("path"))]
        found.setdefault(split, []).extend(paths)
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _text(value: Any, card: Path) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{card} must have names and paths in {_FIELD}: got {value!r:.80}")
    return value


def matching(names: Collection[str], pattern: str) -> list[str]:
    """The names that a pattern matches, in their order."""
    wanted = tuple(pattern.removeprefix("./").split("/"))

    def matches(name: str) -> bool:
        parts = name.split("/")

        # each pair of places is looked at once, however many ** there are
        @cache
        def from_there(i: int, j: int) -> bool:
            if j == len(wanted):
                return i == len(parts)
            if wanted[j] == "**":
                return from_there(i, j + 1) or (i < len(parts) and from_there(i + 1, j))
            return i < len(parts) and fnmatchcase(parts[i], wanted[j]) and from_there(i + 1, j + 1)

        return from_there(0, 0)

    return sorted(name for name in names if matches(name))
