"""The parts of a text file, which is one document."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from data.reading.content import GZIP_ERRORS, broken_gzip, not_utf8, open_content
from data.reading.record import Record, Refuse

_TEXT_CHARACTERS = 1 << 16


def read_text(path: Path, refuse: Refuse) -> Iterator[Record]:
    # a text of blanks is none
    if any(part.strip() for part in _text_parts(path)):
        for number, part in enumerate(_text_parts(path)):
            yield Record(f"{path}:1", {"text": part}, number)


def _text_parts(path: Path) -> Iterator[str]:
    """The text of a file in parts of a fixed length or more, but for the last."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    pieces: list[str] = []
    with open_content(path) as file:
        while True:
            try:
                # one read of the file or its compressed stream: the text before a fault is kept
                content = file.read1(_TEXT_CHARACTERS)
            except GZIP_ERRORS as error:
                raise broken_gzip(path, line, error) from error
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                lines = error.object.count(b"\n", 0, error.start)
                raise not_utf8(path, line + lines, error) from error
            line += text.count("\n")
            pieces.append(text)
            is_whole = not content
            if any(pieces) and (is_whole or sum(map(len, pieces)) >= _TEXT_CHARACTERS):
                yield "".join(pieces)
                pieces.clear()
            if is_whole:
                return
