"""The content of a data file, which may be compressed, as lines or as text.

Lines are bytes, because lines of text would also end at separators that are legal inside JSON
strings. Left out: Zstandard, which Python can read from 3.14 on, and anything that is not UTF-8.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


def open_content(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, with their numbers from 1."""
    number = 0
    try:
        with open_content(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except GZIP_ERRORS as error:
        raise broken_gzip(path, number + 1, error) from error


def broken_gzip(path: Path, line: int, error: Exception) -> ValueError:
    return ValueError(
        f"{path}:{line}: the file must be whole and compressed with gzip: got {error}; "
        "download or compress it again"
    )


def decode(content: bytes, path: Path, first_line: int = 1) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise not_utf8(path, line, error) from error
    # a byte order mark, as Windows editors write it
    return text.removeprefix("\ufeff") if first_line == 1 else text


def not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{path}:{line}: the file must be UTF-8: got the byte 0x{error.object[error.start]:02x} "
        f"({error.reason}); save it as UTF-8"
    )


def shortened(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
