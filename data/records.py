"""Records of a data file, each with the place it came from.

Where datasets.load_dataset infers a schema over all rows and reports a bad one by its Arrow type,
these readers hand on what the file says, record by record, so that every later complaint can name
file and line. Every fault of the file is a ValueError that names them too. A fault of one record
goes to the caller, who may count it and go on; one that leaves the rest in doubt (an open quote, a
file that was cut off) ends the reading.

Nulls of JSON stay. A field of parquet that is null is one that the record has not.

Files are read piece by piece; a text, which is one document, is a record for each. Left out:
Zstandard, which Python can read from 3.14 on, and anything that is not UTF-8.
"""

import codecs
import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from foreign.json_text import check_value

# what to do about a record that is not what it must be: raise, or count it
Refuse: TypeAlias = Callable[[ValueError], None]

_BLANK = re.compile(r"[ \t\r\n]*")
_READ_BYTES = 1 << 20
_TEXT_CHARACTERS = 1 << 16
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Record:
    """One example as the file has it.

    Attributes:
        location: file:line, or file[index] for an element of a JSON list or a row of a parquet
            file.
        part: the number of a part of a text file, None for any other record. Those of one file
            follow each other, and are one document when put together.
    """

    location: str
    fields: dict[str, object]
    part: int | None = None

    @property
    def is_document(self) -> bool:
        return self.part is not None


def raise_it(error: ValueError) -> NoReturn:
    raise error


def read_records(path: Path, refuse: Refuse = raise_it) -> Iterator[Record]:
    """Yield the records of a data file, in its order.

    By the end of its name: .jsonl, .json, .csv, .parquet, .txt, .text or .md; all but parquet may
    be compressed, as .jsonl.gz. A text file is records {"text": a part of it}. A .json file that
    holds JSON lines is read as such.

    Args:
        refuse: is given the error of each record that cannot be read; if it returns, the record is
            left out.

    Raises:
        FileNotFoundError: no such file; the message lists the nearest names.
        ValueError: unknown extension, no records, content that is not what the extension says, or
            parquet without pyarrow.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the data file must exist: got {path}; {_nearest(path)}")
    reader = _READERS.get(data_suffix(path.name))
    if reader is None:
        raise ValueError(
            f"the data file must end in {', '.join(_READERS)}: got {path}; convert or rename it"
        )
    is_empty = True

    def refuse_and_note(error: ValueError) -> None:
        nonlocal is_empty
        is_empty = False
        refuse(error)

    for record in reader(path, refuse_and_note):
        is_empty = False
        yield record
    if is_empty:
        raise ValueError(
            f"{path} must hold at least one record: got none; check how it was written"
        )


def data_suffix(name: str) -> str:
    """The end of a file's name that says how it is read, "" where none does."""
    path = Path(name.lower())
    inner = Path(path.stem).suffix
    if path.suffix == ".gz":
        return inner if inner in _READERS and inner != ".parquet" else ""
    return path.suffix if path.suffix in _READERS else ""


def is_structured(name: str) -> bool:
    """Whether the file holds records with fields, rather than one text."""
    return data_suffix(name) != "" and _READERS[data_suffix(name)] is not _read_text


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    names = [p.name for p in path.parent.iterdir() if data_suffix(p.name)]
    nearest = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4) or sorted(names)[:3]
    return (
        f"did you mean {' or '.join(nearest)}?" if nearest else f"{path.parent} has no data files"
    )


class _Json:
    """Python's JSON decoder, which also tells of keys that an object has twice: all but the last
    value would be lost."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._twice: list[str] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            self._twice += [key for key in value if counts[key] > 1]
        return value

    def decode(self, text: str) -> object:
        self._twice.clear()
        return self._decoder.decode(text)

    def decode_at(self, text: str, start: int) -> tuple[object, int]:
        self._twice.clear()
        return self._decoder.raw_decode(text, start)

    def record(self, value: object, source: str, location: str, what: str) -> Record:
        """Make the value just decoded from a source a record, if it is an object of valid text."""
        if not isinstance(value, dict):
            raise ValueError(
                f"{location}: {what} must be a JSON object: got {_kind(value)} "
                f"{_excerpt(repr(value))}; "
                'write {"field": value, ...}'
            )
        if self._twice:
            raise ValueError(
                f"{location}: {what} must name each field once: got {self._twice[0]!r} twice; "
                "correct or delete the record"
            )
        try:
            check_value(value, source)
        except ValueError as error:
            raise ValueError(f"{location}: {error}; correct or delete the record") from None
        return Record(location, value)


def _read_json_lines(path: Path, refuse: Refuse) -> Iterator[Record]:
    decoder = _Json()
    for number, line in _lines(path):
        location = f"{path}:{number}"
        try:
            text = _decode(line, path, first_line=number).strip()
            if not text:
                continue
            yield _json_line(decoder, text, location)
        except ValueError as error:
            refuse(error)


def _json_line(decoder: _Json, text: str, location: str) -> Record:
    try:
        value = decoder.decode(text)
    # RecursionError: nested too deep; ValueError without a position: an integer too long
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{location}: each line must be one JSON object: got {_excerpt(text)}, "
            f"{error}; correct or delete the line"
        ) from error
    return decoder.record(value, text, location, "each line")


class _Window:
    """A text file read piece by piece: the piece in sight, and the line that it starts in."""

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._read_bytes = _READ_BYTES
        self.text = ""
        self.line = 1
        self.is_whole = False

    def more(self, start: int) -> None:
        """Leave what is before `start` behind and read on, more each time nothing was left."""
        self.line += self.text.count("\n", 0, start)
        self._read_bytes = _READ_BYTES if start else 2 * self._read_bytes
        try:
            piece = self._file.read(self._read_bytes)
        except _GZIP_ERRORS as error:
            line = self.line + self.text.count("\n", start)
            raise _broken_gzip(self._path, line, error) from error
        self.is_whole = not piece
        try:
            self.text = self.text[start:] + self._decoder.decode(piece, final=self.is_whole)
        except UnicodeDecodeError as error:
            content = error.object
            line = self.line + self.text.count("\n", start)
            raise _not_utf8(
                self._path, line + content.count(b"\n", 0, error.start), error
            ) from error

    def line_of(self, position: int) -> int:
        return self.line + self.text.count("\n", 0, position)

    def skip_blanks(self, position: int) -> int:
        """The position of the next character that is no blank, or the end of the file."""
        while True:
            found = _BLANK.match(self.text, position)
            assert found is not None
            if found.end() < len(self.text) or self.is_whole:
                return found.end()
            self.more(found.end())
            position = 0


def _read_json(path: Path, refuse: Refuse) -> Iterator[Record]:
    with _open(path) as file:
        window = _Window(file, path)
        position = window.skip_blanks(0)
        if window.text.startswith("[", position):
            yield from _read_json_list(window, position + 1, path, refuse)
            return
        if position == len(window.text):
            return
    # a complete value and then another one: JSON lines under another name
    lines = (line for _, line in _lines(path) if line.strip())
    try:
        json.loads(next(lines))
    except (ValueError, RecursionError):
        pass
    else:
        if next(lines, None) is not None:
            yield from _read_json_lines(path, refuse)
            return
    text = _decode(b"".join(line for _, line in _lines(path)), path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise _no_json_list(path, line, str(error)) from error
    keys = f" with the keys {', '.join(list(value)[:8])}" if isinstance(value, dict) else ""
    raise ValueError(
        f"{path}:1: the file must be a JSON list of objects: got one {_kind(value)}{keys}; "
        "put the list of records at the top, or use JSON lines"
    )


def _read_json_list(window: _Window, position: int, path: Path, refuse: Refuse) -> Iterator[Record]:
    """Yield the elements of a list whose opening bracket was read."""
    decoder = _Json()
    index = 0
    position = window.skip_blanks(position)
    is_open = not window.text.startswith("]", position)
    while is_open:
        start = position
        try:
            value, end = decoder.decode_at(window.text, start)
        except (ValueError, RecursionError) as error:
            # it may go on in what is not read yet
            if isinstance(error, json.JSONDecodeError) and not window.is_whole:
                window.more(start)
                position = 0
                continue
            at = error.pos if isinstance(error, json.JSONDecodeError) else start
            raise _no_json_list(path, window.line_of(at), str(error)) from error
        try:
            source = window.text[start:end]
            yield decoder.record(value, source, f"{path}[{index}]", "each element")
        except ValueError as error:
            refuse(error)
        index += 1
        position = window.skip_blanks(end)
        is_open = window.text.startswith(",", position)
        if is_open:
            position = window.skip_blanks(position + 1)
        elif not window.text.startswith("]", position):
            raise _no_json_list(
                path,
                window.line_of(position),
                f"{_excerpt(window.text[position:][:40])!r} after element {index - 1}, where a "
                "comma or the closing bracket was due",
            )
    end = window.skip_blanks(position + 1)
    if end < len(window.text):
        raise _no_json_list(
            path, window.line_of(end), f"{_excerpt(window.text[end:][:40])!r} after its end"
        )


def _no_json_list(path: Path, line: int, came: str) -> ValueError:
    return ValueError(
        f"{path}:{line}: the file must be a JSON list of objects: got {came}; "
        "correct it, or write it again if it was cut off"
    )


def _read_csv(path: Path, refuse: Refuse) -> Iterator[Record]:
    # the default, 131072 characters, is less than a long document; 2^31 - 1 fits any C long
    csv.field_size_limit(2**31 - 1)
    lines = (_decode(line, path, number) for number, line in _lines(path))
    rows = csv.reader(lines, strict=True)
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
            refuse(
                ValueError(
                    f"{location}: each row must have {len(names)} values, as the header: got "
                    f"{len(row)}; quote values that hold commas, quotes or line breaks"
                )
            )
        else:
            yield Record(location, dict(zip(names, row, strict=True)))


def _header(row: list[str], location: str) -> list[str]:
    names = [name.strip() for name in row]
    # pandas writes its index so, and gives it this name in parquet
    if names[0] == "" and len(names) > 1:
        names[0] = "__index_level_0__"
    if "" in names or len(set(names)) != len(names):
        raise ValueError(
            f"{location}: the first row must name each column once: got "
            f"{', '.join(map(repr, names))}; write a header with different names"
        )
    return names


def _read_parquet(path: Path, refuse: Refuse) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet must be read with pyarrow, which is not installed; "
            "pip install -e '.[parquet]'"
        ) from None
    index = 0
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise ValueError(
                    f"each column must have a name of its own: got {', '.join(names[:8])}"
                )
            for batch in file.iter_batches(_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    yield Record(f"{path}[{index}]", _without_nulls(fields))
                    index += 1
    # damaged pages are an OSError, text may not be UTF-8, dates may overflow Python's
    except (ValueError, OSError, OverflowError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{path}[{index}]: the file must be parquet that pyarrow {pyarrow.__version__} reads: "
            f"got {_excerpt(str(error), 200)}; download or write it again"
        ) from error


def _without_nulls(value: Any) -> Any:
    """The value without the fields that are null, at any depth.

    A struct of parquet has the fields of every row's struct, and null stands for those that a row
    has not. An element of a list that is null was null before.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _read_text(path: Path, refuse: Refuse) -> Iterator[Record]:
    # a text of blanks is none
    if any(part.strip() for part in _text_parts(path)):
        for number, part in enumerate(_text_parts(path)):
            yield Record(f"{path}:1", {"text": part}, number)


def _text_parts(path: Path) -> Iterator[str]:
    """The text of a file in parts of a fixed length or more, but for the last."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    pieces: list[str] = []
    with _open(path) as file:
        while True:
            try:
                # one read of the file or of its compressed stream: what precedes a fault counts
                content = file.read1(_TEXT_CHARACTERS)
            except _GZIP_ERRORS as error:
                raise _broken_gzip(path, line, error) from error
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                lines = error.object.count(b"\n", 0, error.start)
                raise _not_utf8(path, line + lines, error) from error
            line += text.count("\n")
            pieces.append(text)
            is_whole = not content
            if any(pieces) and (is_whole or sum(map(len, pieces)) >= _TEXT_CHARACTERS):
                yield "".join(pieces)
                pieces.clear()
            if is_whole:
                return


_READERS: dict[str, Callable[[Path, Refuse], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".text": _read_text,
    ".md": _read_text,
}
_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number the lines of a file that may be compressed.

    As bytes, because lines of text would also end at separators that are legal inside JSON strings.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except _GZIP_ERRORS as error:
        raise _broken_gzip(path, number + 1, error) from error


def _broken_gzip(path: Path, line: int, error: Exception) -> ValueError:
    return ValueError(
        f"{path}:{line}: the file must be whole and compressed with gzip: got {error}; "
        "download or compress it again"
    )


def _decode(content: bytes, path: Path, first_line: int = 1) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise _not_utf8(path, line, error) from error
    # a byte order mark, as Windows editors write it
    return text.removeprefix("\ufeff") if first_line == 1 else text


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{path}:{line}: the file must be UTF-8: got the byte 0x{error.object[error.start]:02x} "
        f"({error.reason}); save it as UTF-8"
    )


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _excerpt(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
