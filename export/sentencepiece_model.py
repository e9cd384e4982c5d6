"""tokenizer.model, a SentencePiece model: its pieces with their scores and kinds.

The file is a protocol buffer (sentencepiece_model.proto); of its fields only the pieces are read:

    ModelProto       1: SentencePiece, once for each piece, in the order of their ids
    SentencePiece    1: text      2: score, a float      3: kind, 1 if absent
"""

import math
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from foreign.reading import Reading

SENTENCEPIECE_FILE = "tokenizer.model"
# the largest known is 8 MB
MOST_BYTES = 64 << 20
# wire types
_VARINT, _EIGHT_BYTES, _COUNTED, _FOUR_BYTES = 0, 1, 2, 5
_WIDTHS = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}
_MOST_VARINT_BYTES = 10


class Kind(IntEnum):
    """The kinds of a piece; GGUF has the same numbers for tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A piece of text in a SentencePiece model."""

    text: str
    score: float
    kind: Kind


def read_pieces(path: Path) -> list[Piece]:
    """Read the pieces of a SentencePiece model; a piece's id is its index.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no SentencePiece model.
    """
    if (num_bytes := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} must have at most {MOST_BYTES:,} bytes: got {num_bytes:,}")
    advice = "download it again"
    with Reading(path, advice):
        try:
            content = memoryview(path.read_bytes())
            pieces = [_piece(_counted(value)) for field, value in _fields(content) if field == 1]
        except (ValueError, struct.error) as error:
            raise ValueError(
                f"{path} must be a SentencePiece model: got {error}; {advice}"
            ) from None
    if not pieces:
        raise ValueError(f"{path} must be a SentencePiece model: got no pieces; {advice}")
    return pieces


def _piece(content: memoryview) -> Piece:
    fields = dict(_fields(content))
    (score,) = struct.unpack("<f", _counted(fields.get(2, memoryview(bytes(4)))))
    if not math.isfinite(score):
        raise ValueError(f"the score {score}")
    return Piece(bytes(_counted(fields[1])).decode(), score, Kind(fields.get(3, Kind.NORMAL)))


def _counted(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise ValueError(f"the integer {value:,} where bytes belong")
    return value


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield the fields of a message: its number, and its bytes or its integer."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        field, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, position = _varint(content, position)
            yield field, value
            continue
        if kind == _COUNTED:
            length, position = _varint(content, position)
        elif kind in _WIDTHS:
            length = _WIDTHS[kind]
        else:
            raise ValueError(f"the wire type {kind} at byte {position:,}")
        end = position + length
        if end > len(content):
            raise ValueError(f"{len(content):,} bytes, where a field ends at {end:,}")
        yield field, content[position:end]
        position = end


def _varint(content: memoryview, position: int) -> tuple[int, int]:
    """Read an integer of seven bits a byte, lowest first; and the position behind it."""
    value = 0
    for i in range(_MOST_VARINT_BYTES):
        if position + i >= len(content):
            raise ValueError(f"{len(content):,} bytes, where an integer goes on")
        byte = content[position + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise ValueError(f"an integer of more than {_MOST_VARINT_BYTES} bytes at byte {position:,}")
