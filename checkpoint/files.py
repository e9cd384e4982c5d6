"""The files of a checkpoint folder: which there are, and the tensors that their headers name.

Everything that can be wrong with them (missing, truncated, renamed, pointing elsewhere) is found
here, before a weight is read. Pickled weights are never read.

A folder may hold two checkpoints: a single file, and an index with shards that another save has
left. The single file is read, as transformers does (`_get_resolved_checkpoint_files` in
modeling_utils.py), and a line says so.
"""

import difflib
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from checkpoint.shard_reader import Shard, read_header
from foreign.json_text import read_object
from hub.fetch import find_folder
from llama.config import CONFIG_NAME, GENERATION_CONFIG_NAME

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# beside config.json and the weights, as patterns: of the tokenizer, which a run copies
TOKENIZER_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# and for programs that read other forms of the tokenizer, or images; llama.cpp refuses some models
# without tokenizer.model
OTHER_COMPANIONS = (
    GENERATION_CONFIG_NAME,
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
COMPANIONS = (*TOKENIZER_COMPANIONS, *OTHER_COMPANIONS)
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth")


def find_checkpoint(model: str, what: str = "--model") -> Path:
    """Find the folder of a checkpoint: a local path, or a hub id whose files are fetched as far as
    needed.

    Args:
        what: names the place, for messages.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `hub.fetch.find_folder`.
        ValueError: the repository has no weights in safetensors.
    """
    return find_folder(model, what, "model", partial(_needed_files, model, what))


def find_description(model: str, *, has_tokenizer: bool) -> Path:
    """Find the folder of a config.json, and of the tokenizer's files if they are asked for.

    Of a hub id these files alone are fetched, and no weights.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `hub.fetch.find_folder`.
        ValueError: the repository has no config.json.
    """
    patterns = (CONFIG_NAME, *(TOKENIZER_COMPANIONS if has_tokenizer else ()))

    def choose(names: Collection[str], get: Callable[[str], Path]) -> set[str]:
        if CONFIG_NAME not in names:
            raise ValueError(f"--model must have {CONFIG_NAME}: {model} has {first_few(names)}")
        return _fitting(names, patterns)

    return find_folder(model, "--model", "model", choose)


def _fitting(names: Collection[str], patterns: Iterable[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _needed_files(
    model: str, what: str, names: Collection[str], get: Callable[[str], Path]
) -> set[str]:
    """Choose from a repository's files those that a checkpoint is read from."""
    needed = _fitting(names, (CONFIG_NAME, *COMPANIONS))
    if SINGLE_NAME in names:
        return needed | {SINGLE_NAME}
    if INDEX_NAME in names:
        return needed | {INDEX_NAME, *_read_index(get(INDEX_NAME)).values()}
    raise ValueError(
        f"{what} must have {SINGLE_NAME} or {INDEX_NAME}: {model} has "
        f"{first_few(names)}{_about_pickled(names)}"
    )


def _about_pickled(names: Iterable[str]) -> str:
    pickled = sorted(name for name in names if name.endswith(_PICKLED_SUFFIXES))
    if not pickled:
        return ""
    return f"; {pickled[0]} is pickled, which is never read: save the model as safetensors"


def _read_index(index: Path) -> dict[str, str]:
    """Read which file of its folder an index gives for each tensor."""
    places = read_object(index, "download it again").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} must have a weight_map of tensor names to file names")
    for file in places.values():
        if Path(file).name != file or file == ".." or "\0" in file:
            raise ValueError(f"{index} must name files of its own folder only: got {file!r}")
    return places


def _shard_paths(folder: Path) -> dict[Path, set[str] | None]:
    """The checkpoint's files, each with the tensors that the index places there (None: no
    index).

    A file may be a symbolic link: the hub's cache keeps its blobs outside the folder.
    """
    if (folder / SINGLE_NAME).is_file():
        return {folder / SINGLE_NAME: None}
    index = folder / INDEX_NAME
    present = sorted(path.name for path in folder.iterdir())
    if not index.is_file():
        advice = _about_pickled(present) or "; download the checkpoint again or restore the name"
        raise FileNotFoundError(
            f"a checkpoint folder must hold {SINGLE_NAME} or {INDEX_NAME}: "
            f"{folder} has {', '.join(present[:20])}{advice}"
        )
    places = _read_index(index)
    shards: dict[Path, set[str] | None] = {}
    for file in sorted(set(places.values())):
        if not (folder / file).is_file():
            candidates = [name for name in present if name.endswith(".safetensors")]
            nearest = difflib.get_close_matches(file, candidates, n=2)
            raise FileNotFoundError(
                f"{index} names the shard {file}, which must be in {folder}: it is missing; "
                f"nearest there: {', '.join(nearest) or 'none'}; "
                "download it again or restore its name"
            )
        shards[folder / file] = {name for name, place in places.items() if place == file}
    return shards


def read_shards(folder: Path) -> list[Shard]:
    """Read the headers of a checkpoint's files, which are sorted by name.

    Raises:
        FileNotFoundError: the index or a shard is missing.
        ValueError: a file is damaged, or the index contradicts it.
    """
    shards = []
    for path, indexed in sorted(_shard_paths(folder).items()):
        # safetensors' own reader finds gaps between tensors, and says what it refuses in words that
        # others know; it does not say where a tensor lies
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} must be a complete safetensors file: {error}; "
                "it is truncated or damaged, download it again"
            ) from None
        if indexed is not None and names != indexed:
            differing = sorted(names ^ indexed)
            raise ValueError(
                f"{path} must hold exactly the tensors that {INDEX_NAME} places there: "
                f"{len(differing)} differ, the first is {differing[0]}; download the folder again"
            )
        shards.append(read_header(path))
    return shards


def first_few(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more
