"""export/sentencepiece_model.py: the pieces of tokenizer.model, and damaged files."""

from pathlib import Path

import pytest
from support.gguf_cases import PIECES, field, sentencepiece_model

from export.sentencepiece_model import MOST_BYTES, Kind, Piece, read_pieces


def test_pieces_are_read_in_the_order_of_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    assert read_pieces(path) == [Piece(text, score, Kind(kind)) for text, score, kind in PIECES]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no pieces"),
        (b'{"model": {}}', "the wire type 3"),
        (field(2, b"\x08\x01"), "no pieces"),
        (field(1, b"\x15\x00\x00\x00\x00"), "KeyError"),
        (b"\x08\x05", "the integer 5 where bytes belong"),
        (field(1, b"\x08\x05"), "the integer 5 where bytes belong"),
        (field(1, field(1, b"\xff")), "invalid start byte"),
        (field(1, field(1, b"a") + b"\x18\x09"), "9 is not a valid Kind"),
        (field(1, field(1, b"a") + b"\x15\x00\x00\xc0\x7f"), "the score nan"),
        (b"\xff" * 12, "an integer of more than 10 bytes"),
    ],
    ids=[
        "empty",
        "JSON",
        "no pieces",
        "no text",
        "a number for a piece",
        "a number for a text",
        "no UTF-8",
        "kind",
        "NaN",
        "integer",
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){path}.*{reason}.*download it again"):
        read_pieces(path)


def test_a_file_cut_inside_a_piece_is_refused(tmp_path: Path) -> None:
    whole = sentencepiece_model(PIECES[:4])
    path = tmp_path / "tokenizer.model"
    path.write_bytes(whole)
    num_pieces = len(read_pieces(path))
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        try:
            pieces = read_pieces(path)
        except ValueError:
            continue
        # cut where a field ends
        assert pieces == [Piece(t, s, Kind(k)) for t, s, k in PIECES[: len(pieces)]]
        assert len(pieces) <= num_pieces


def test_a_file_beyond_any_model_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match="must have at most 67,108,864 bytes: got 67,108,865"):
        read_pieces(path)
