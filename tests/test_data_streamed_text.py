"""data/streamed_text.py: pieces of whole characters that add up to the text."""

from pathlib import Path

import pytest
from test_data_tokenizer import save_byte_level, save_metaspace

from data.streamed_text import StreamedText
from data.tokenizer import Tokenizer

TEXTS = [
    "Selma is a mouse.",
    " two spaces  and\n\na line\t",
    "Gr\u00fc\u00dfe aus K\u00f6ln",
    "\u732b\u306f\u5bdd\u308b",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
]


@pytest.mark.parametrize("save", [save_byte_level, save_metaspace])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_add_up_to_the_text(
    tmp_path: Path, save, text: str
) -> None:
    tokenizer = Tokenizer.from_folder(save(tmp_path))
    ids = tokenizer.encode(text, add_special_tokens=False)
    streamed = StreamedText(tokenizer)
    pieces = [streamed.add(i) for i in ids]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    # a token that ends a character is not held back
    assert all(pieces) or len(ids) > len(text) / 2
    assert streamed.rest() == ""
    assert streamed.ids == ids


def test_a_character_that_never_ends_comes_with_the_rest(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path))
    ids = tokenizer.encode("a\U0001f600", add_special_tokens=False)
    assert len(ids) > 3
    streamed = StreamedText(tokenizer)
    assert [streamed.add(i) for i in ids[:-1]] == ["a", *[""] * (len(ids) - 2)]
    assert set(streamed.rest()) == {"\ufffd"}
    assert streamed.rest() == ""


def test_a_broken_character_comes_with_the_next_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path))
    broken = tokenizer.encode("\U0001f600", add_special_tokens=False)[:-1]
    ids = [*broken, *tokenizer.encode("bc", add_special_tokens=False)]
    streamed = StreamedText(tokenizer)
    pieces = [streamed.add(i) for i in ids]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[-1].endswith("c")
