"""Tokenized samples on disk, made once for the same files, tokenizer and settings.

    ~/.cache/quatrain/tokens/KEY/     or under XDG_CACHE_HOME
        input_ids.bin  labels.bin     int32, little-endian: all samples end to end
        rows.bin                      a row for each sample: its length, its targets, a hash
        index.json                    format, counts, the SHA-256 of the files above

KEY is a hash of everything that decides the content: the bytes of the data files, the tokenizer and
its templates, the settings, and the source code of data/, so that no version number can be
forgotten. Files that change while they are read are refused: the next run would take their tokens
for those of the earlier content. Samples are read from the files as they are asked for; their rows
and where they start are in memory, 26 bytes a sample. A folder appears when it is whole. A folder
that does not agree with its index is made again. While one process makes a folder the others wait,
so that of the ranks of a run only one does the work.

Where datasets.map leaves a fingerprinted Arrow file beside every script that ran, removing this
folder removes everything that is stored.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.reading.files import data_suffix
from data.tokenizer import Tokenizer
from data.tokens.pieces import ROW, Counts, Piece
from data.tokens.recipe import Recipe
from data.tokens.stored_samples import StoredSamples, TokenFile
from data.tokens.tokenization import tokenize_files
from foreign.json_text import read_object

_INDEX_FILE = "index.json"
_IDS_FILE, _LABELS_FILE, _ROWS_FILE = "input_ids.bin", "labels.bin", "rows.bin"
_FILES = (_IDS_FILE, _LABELS_FILE, _ROWS_FILE)
_READ_BYTES = 1 << 20
# data/, whose source code decides the tokens
_ROOM = Path(__file__).parent.parent


@dataclass(frozen=True)
class Tokens:
    """What a folder of the cache holds.

    Attributes:
        sha256: of the samples, wherever and whenever they were made.
        is_cached: they were there already.
    """

    samples: StoredSamples
    format: str
    counts: Counts
    sha256: str
    is_cached: bool


def cache_folder() -> Path:
    """The folder of tokenized data, by the XDG Base Directory Specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "quatrain" / "tokens"


def cached_tokens(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    recipe: Recipe,
    num_processes: int,
    report: Callable[[int], None],
) -> Tokens:
    """Open the tokens of data files, making them first if they are not there or not whole.

    Args:
        num_processes: as tokenize_files.
        report: is given the number of records done so far.

    Raises:
        FileNotFoundError, ValueError: as tokenize_files.
        OSError: the cache cannot be written, or a file changed while it was read.
    """
    times = [_time(path) for path in files]
    key = _key(files, tokenizer, recipe)
    cache = cache_folder()
    folder = cache / key
    with _exclusive(cache / f"{key}.lock"):
        found = _open(folder, is_cached=True)
        if found is not None:
            return found
        # left by a killed process, or a folder that does not agree with its index
        partial = folder.with_name(f"{key}.partial")
        for leftover in (partial, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        name, pieces = tokenize_files(files, tokenizer, recipe, num_processes)
        try:
            _write(partial, name, pieces, report)
            _check_unchanged(files, times, key == _key(files, tokenizer, recipe))
            with _writing_to(cache):
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        made = _open(folder, is_cached=False)
        if made is None:
            raise OSError(f"the tokenized data must be in {folder}: what was written is not there")
        return made


def _time(path: Path) -> tuple[int, int]:
    """The size of a file and the time of its last change; zeros where it is not there."""
    if not path.is_file():
        return 0, 0
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _check_unchanged(
    files: Sequence[Path], times: Sequence[tuple[int, int]], is_same_key: bool
) -> None:
    """Refuse tokens of files that were written to while they were read.

    The hash alone would miss content that was there only for a while, the time alone a program that
    sets it back.
    """
    changed = [path for path, time in zip(files, times, strict=True) if _time(path) != time]
    if changed or not is_same_key:
        raise OSError(
            f"a data file must stay as it is while it is read: {(changed or list(files))[0]} has "
            "changed since; start again when nothing writes to it any more"
        )


def _key(files: Sequence[Path], tokenizer: Tokenizer, recipe: Recipe) -> str:
    settings = {k: v for k, v in asdict(recipe).items() if k != "now"}
    parts: list[Any] = [settings, tokenizer.fingerprint(recipe.now), np.version.version]
    for path in (*files, *sorted(_ROOM.rglob("*.py"))):
        if path.is_file():
            with path.open("rb") as file:
                parts.append([data_suffix(path.name), path.suffix.lower(), _sha256(file)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _sha256(file: BinaryIO) -> str:
    # not through a map, whose pages would count as this process's memory
    digest = hashlib.sha256()
    while content := file.read(_READ_BYTES):
        digest.update(content)
    return digest.hexdigest()


@contextlib.contextmanager
def _writing_to(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"tokenized data must be written to {cache}: got {error}; make room, or name another "
            "folder with the variable XDG_CACHE_HOME"
        ) from error


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock, which ends with the process at the latest."""
    with contextlib.ExitStack() as stack:
        with _writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(folder: Path, name: str, pieces: Iterator[Piece], report: Callable[[int], None]) -> None:
    counts, cache = Counts(), folder.parent
    with contextlib.ExitStack() as stack:
        with _writing_to(cache):
            # whoever may read the data, this user may
            folder.mkdir(mode=0o700)
            files = [stack.enter_context((folder / f).open("w+b")) for f in _FILES]
        for piece in pieces:
            arrays = (piece.input_ids, piece.labels, piece.rows)
            with _writing_to(cache):
                for file, array in zip(files, arrays, strict=True):
                    file.write(array.tobytes())
            counts.add(piece.counts)
            report(counts.num_records)
        hashes = {}
        with _writing_to(cache):
            for file, file_name in zip(files, _FILES, strict=True):
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                hashes[file_name] = _sha256(file)
    index = {"format": name, "counts": asdict(counts), "sha256": hashes}
    with _writing_to(cache):
        (folder / _INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _open(folder: Path, is_cached: bool) -> Tokens | None:
    """Open a folder of the cache, None if it is not there or not what its index says."""
    try:
        index = read_object(folder / _INDEX_FILE)
        hashes = {}
        for name in _FILES:
            with (folder / name).open("rb") as file:
                hashes[name] = _sha256(file)
        if hashes != index["sha256"]:
            return None
        counts = Counts(**index["counts"])
        data_format = str(index["format"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    rows = np.fromfile(folder / _ROWS_FILE, ROW)
    digest = hashlib.sha256("".join(hashes[name] for name in _FILES).encode()).hexdigest()
    return Tokens(
        StoredSamples(TokenFile(folder / _IDS_FILE), TokenFile(folder / _LABELS_FILE), rows),
        data_format,
        counts,
        digest,
        is_cached,
    )
