"""Records of JSON lines and of JSON lists, or one object. Nulls of JSON stay."""

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.reading.content import (
    GZIP_ERRORS,
    broken_gzip,
    decode,
    lines_of,
    not_utf8,
    open_content,
    shortened,
)
from data.reading.record import Record, Refuse
from foreign.json_text import check_value

_BLANK = re.compile(r"[ \t\r\n]*")
_READ_BYTES = 1 << 20
# the records of a file are under these in SQuAD's form, {"version": ..., "data": [...]}, and in
# LMFlow's, {"type": ..., "instances": [...]}
_LIST_NAMES = ("data", "instances")
_FACTS_BESIDE = ("version", "type")


class _Decoder:
    """Python's JSON decoder, which also notes keys that an object has twice: all values but the
    last would be lost."""

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
                f"{shortened(repr(value))}; "
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


def read_json_lines(path: Path, refuse: Refuse) -> Iterator[Record]:
    decoder = _Decoder()
    for number, line in lines_of(path):
        location = f"{path}:{number}"
        try:
            text = decode(line, path, first_line=number).strip()
            if not text:
                continue
            yield _json_line(decoder, text, location)
        except ValueError as error:
            refuse(error)


def _json_line(decoder: _Decoder, text: str, location: str) -> Record:
    try:
        value = decoder.decode(text)
    # RecursionError: nested too deep; ValueError without a position: an integer too long
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{location}: each line must be one JSON object: got {shortened(text)}, "
            f"{error}; correct or delete the line"
        ) from error
    return decoder.record(value, text, location, "each line")


class _TextReader:
    """A text file read piece by piece: the current piece, and the line that the piece starts in."""

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._read_bytes = _READ_BYTES
        self.text = ""
        self.line = 1
        self.is_whole = False

    def more(self, start: int) -> None:
        """Drop the text before `start` and read on; twice as much each time nothing was dropped."""
        self.line += self.text.count("\n", 0, start)
        self._read_bytes = _READ_BYTES if start else 2 * self._read_bytes
        try:
            piece = self._file.read(self._read_bytes)
        except GZIP_ERRORS as error:
            line = self.line + self.text.count("\n", start)
            raise broken_gzip(self._path, line, error) from error
        self.is_whole = not piece
        try:
            self.text = self.text[start:] + self._decoder.decode(piece, final=self.is_whole)
        except UnicodeDecodeError as error:
            content = error.object
            line = self.line + self.text.count("\n", start)
            raise not_utf8(
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


def read_json(path: Path, refuse: Refuse) -> Iterator[Record]:
    with open_content(path) as file:
        reader = _TextReader(file, path)
        position = reader.skip_blanks(0)
        if reader.text.startswith("[", position):
            yield from _read_json_list(reader, position + 1, path, refuse)
            return
        if position == len(reader.text):
            return
    # a complete value and then another one: JSON lines under another name
    lines = (line for _, line in lines_of(path) if line.strip())
    try:
        json.loads(next(lines))
    except (ValueError, RecursionError):
        pass
    else:
        if next(lines, None) is not None:
            yield from read_json_lines(path, refuse)
            return
    text = decode(b"".join(line for _, line in lines_of(path)), path)
    decoder = _Decoder()
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise _no_json_list(path, line, str(error)) from error
    try:
        record = decoder.record(value, text, f"{path}:1", "a file that is no JSON list")
    except ValueError as error:
        refuse(error)
        return
    elements = _elements_in(record.fields)
    if elements is None:
        yield record
        return
    for index, element in enumerate(elements):
        try:
            yield decoder.record(element, "", f"{path}[{index}]", "each element")
        except ValueError as error:
            refuse(error)


def _elements_in(fields: dict[str, Any]) -> list[object] | None:
    """The records of an object that is none itself, but has a list of them."""
    for name in _LIST_NAMES:
        value = fields.get(name)
        if isinstance(value, list) and {*fields} <= {name, *_FACTS_BESIDE}:
            return value if any(isinstance(each, dict) for each in value) else None
    return None


def _read_json_list(
    reader: _TextReader, position: int, path: Path, refuse: Refuse
) -> Iterator[Record]:
    """Yield the elements of a list whose opening bracket was read."""
    decoder = _Decoder()
    index = 0
    position = reader.skip_blanks(position)
    is_open = not reader.text.startswith("]", position)
    while is_open:
        start = position
        try:
            value, end = decoder.decode_at(reader.text, start)
        except (ValueError, RecursionError) as error:
            # the value may go on in text that is not read yet
            if isinstance(error, json.JSONDecodeError) and not reader.is_whole:
                reader.more(start)
                position = 0
                continue
            at = error.pos if isinstance(error, json.JSONDecodeError) else start
            raise _no_json_list(path, reader.line_of(at), str(error)) from error
        try:
            source = reader.text[start:end]
            yield decoder.record(value, source, f"{path}[{index}]", "each element")
        except ValueError as error:
            refuse(error)
        index += 1
        position = reader.skip_blanks(end)
        is_open = reader.text.startswith(",", position)
        if is_open:
            position = reader.skip_blanks(position + 1)
        elif not reader.text.startswith("]", position):
            raise _no_json_list(
                path,
                reader.line_of(position),
                f"{shortened(reader.text[position:][:40])!r} after element {index - 1}, where a "
                "comma or the closing bracket was due",
            )
    end = reader.skip_blanks(position + 1)
    if end < len(reader.text):
        raise _no_json_list(
            path, reader.line_of(end), f"{shortened(reader.text[end:][:40])!r} after its end"
        )


def _no_json_list(path: Path, line: int, came: str) -> ValueError:
    return ValueError(
        f"{path}:{line}: the file must be a JSON list of objects: got {came}; "
        "correct it, or write it again if it was cut off"
    )


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
