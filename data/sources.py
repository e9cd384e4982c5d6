"""Records of a data file, each with the place it came from.

Where datasets.load_dataset infers a schema over all rows and reports a bad one by its Arrow type,
these readers hand on what the file says, record by record, so that every later complaint can name
file and line. Every fault of the file is a ValueError that names them too.

Left out: parquet, compressed files, and anything that is not UTF-8.
"""

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from hub.fetch import find_folder, parse_hub_id

# the escapes of U+D800 to U+DFFF: text only in pairs, but JSON lets one stand alone
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Record:
    """One example as the file has it.

    Attributes:
        location: file:line, or file[index] for an element of a JSON list.
        is_document: the record is a whole text file, to be cut into pieces rather than truncated.
    """

    location: str
    fields: dict[str, object]
    is_document: bool = False


def find_data(place: str, what: str) -> Path:
    """Find a data file: a local one, or that of a hub data set, `owner/name` or `owner/name@rev`.

    Of several the one with "train" in its name is taken.

    Args:
        what: such as "--data", for messages.

    Raises:
        FileNotFoundError: the id is no data set, nor is it the path of a file.
        PermissionError, ConnectionError: as `hub.fetch.find_folder`.
        ValueError: the data set has no file that can be read, or several.
    """
    path = Path(place)
    if path.exists() or path.suffix.lower() in _READERS or parse_hub_id(place) is None:
        return path
    chosen: list[str] = []

    def choose(names: Collection[str], get: Callable[[str], Path]) -> list[str]:
        readable = sorted(name for name in names if Path(name).suffix.lower() in _READERS)
        # a card says what is in the others, and is a text itself
        readable = [name for name in readable if Path(name).name.lower() != "readme.md"]
        chosen[:] = [name for name in readable if "train" in name.lower()] or readable
        if len(chosen) != 1:
            raise ValueError(
                f"{what} must be a data set with one {', '.join(_READERS)} file, or with one that "
                f"has train in its name: {place} has {len(chosen)} "
                f"({', '.join(chosen[:5]) or 'others: ' + ', '.join(sorted(names)[:5])}); "
                "download the file that you want and give its path"
            )
        return chosen

    folder = find_folder(place, what, "dataset", choose)
    return folder / chosen[0]


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a .jsonl, .json, .csv, .txt, .text or .md file, in its order.

    A text file is one record {"text": all of it}. A .json file that holds JSON lines is read as
    such.

    Raises:
        FileNotFoundError: no such file; the message lists the nearest names.
        ValueError: unknown extension, no records, or content that is not what the extension says.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in _READERS)
        raise ValueError(
            f"the data must be one file: got the folder {path}; name one of its files: "
            f"{', '.join(names) or 'it has none that can be read'}"
        )
    if not path.exists():
        raise FileNotFoundError(f"the data file must exist: got {path}; {_nearest(path)}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"the data file must end in {', '.join(_READERS)}: got {path}; convert or rename it"
        )
    is_empty = True
    for record in reader(path):
        is_empty = False
        yield record
    if is_empty:
        raise ValueError(
            f"{path} must hold at least one record: got none; check how it was written"
        )


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    names = [p.name for p in path.parent.iterdir() if p.suffix.lower() in _READERS]
    nearest = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4) or sorted(names)[:3]
    return (
        f"did you mean {' or '.join(nearest)}?" if nearest else f"{path.parent} has no data files"
    )


def _read_json_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        # bytes, because text lines would also end at separators that are legal inside JSON strings
        for number, line in enumerate(file, start=1):
            location = f"{path}:{number}"
            text = _decode(line, path, first_line=number).strip()
            if not text:
                continue
            try:
                fields = json.loads(text)
            # RecursionError: nested too deep; ValueError without a position: an integer too long
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{location}: each line must be one JSON object: got {_excerpt(text)}, "
                    f"{error}; correct or delete the line"
                ) from error
            is_suspect = _SURROGATE_ESCAPE.search(text) is not None
            yield _json_record(fields, location, "each line", is_suspect)


def _read_json(path: Path) -> Iterator[Record]:
    text = _decode(path.read_bytes(), path)
    if not text.strip():
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        # a complete value and then another one: JSON lines under another name
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _read_json_lines(path)
            return
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise ValueError(
            f"{path}:{line}: the file must be a JSON list of objects: got {error}; "
            "correct it, or write it again if it was cut off"
        ) from error
    if not isinstance(records, list):
        keys = f" with the keys {', '.join(list(records)[:8])}" if isinstance(records, dict) else ""
        raise ValueError(
            f"{path}:1: the file must be a JSON list of objects: got one {_kind(records)}{keys}; "
            "put the list of records at the top, or use JSON lines"
        )
    is_suspect = _SURROGATE_ESCAPE.search(text) is not None
    for index, fields in enumerate(records):
        yield _json_record(fields, f"{path}[{index}]", "each element", is_suspect)


def _read_csv(path: Path) -> Iterator[Record]:
    text = _decode(path.read_bytes(), path)
    # the default, 131072 characters, is less than a long document; 2^31 - 1 fits any C long
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    while True:
        location = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(
                f"{location}: each row must be comma-separated values: got {error}; "
                "quote values that hold commas, quotes or line breaks, and double the quotes in "
                'them ("")'
            ) from error
        if row is None:
            return
        if not row:
            continue
        if names is None:
            names = _header(row, location)
        elif len(row) != len(names):
            raise ValueError(
                f"{location}: each row must have {len(names)} values, as the header: got "
                f"{len(row)}; quote values that hold commas, quotes or line breaks"
            )
        else:
            yield Record(location, dict(zip(names, row, strict=True)))


def _header(row: list[str], location: str) -> list[str]:
    names = [name.strip() for name in row]
    if "" in names or len(set(names)) != len(names):
        raise ValueError(
            f"{location}: the first row must name each column once: got "
            f"{', '.join(map(repr, names))}; write a header with different names"
        )
    return names


def _read_text(path: Path) -> Iterator[Record]:
    text = _decode(path.read_bytes(), path)
    if text.strip():
        yield Record(f"{path}:1", {"text": text}, is_document=True)


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".text": _read_text,
    ".md": _read_text,
}


def _decode(content: bytes, path: Path, first_line: int = 1) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}:{line}: the file must be UTF-8: got the byte 0x{content[error.start]:02x} "
            f"({error.reason}); save it as UTF-8"
        ) from error
    # a byte order mark, as Windows editors write it
    return text.removeprefix("\ufeff") if first_line == 1 else text


def _json_record(value: object, location: str, what: str, is_suspect: bool) -> Record:
    if not isinstance(value, dict):
        raise ValueError(
            f"{location}: {what} must be a JSON object: got {_kind(value)} "
            f"{_excerpt(repr(value))}; "
            'write {"field": value, ...}'
        )
    if is_suspect:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{location}: text must be valid Unicode: got half of a surrogate pair, "
                f"U+{ord(error.object[error.start]):04X}; correct or delete the record"
            ) from error
    return Record(location, value)


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _excerpt(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
