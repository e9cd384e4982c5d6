"""A text file as one document, tokenized window by window: the token ids of the whole, in pieces.

Encoding a text as a whole takes a hundred times its size in memory, so a document is encoded in
windows, each of which begins with the end of the window before:

    window k      ...........[--- overlap ---]
    window k + 1             [--- overlap ---]...........
                                    ^ seam

A token depends on the text around it. Over the middle half of the overlap, both windows must have
the same tokens at the same places, although the first window lacks the text that follows and the
second lacks the text before. The seam lies there, at a place where no token depends on both sides:

- before a word, where the tokenizer divides a text into words, from left to right and each to be
  encoded by itself: two readings that begin a word at one place go on alike;
- else (SentencePiece's BPE, which merges neighbours) before a space or a line break that follows
  another character: no merge has a space or a line break in its middle.

Where there is no such place (a word as long as the overlap), the two windows are encoded as one, of
twice the length at least, so that a document of a single word is encoded as a whole, as before.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from data.samples import NO_LOSS, Sample
from data.tokenizer import Tokenizer
from foreign.guest import in_guest

_OVERLAP = 2048
_SPACE, _BREAKS = ord(" "), (ord("\n"), ord("\r"))


@dataclass(frozen=True)
class Window:
    """A part of a document behind the end of the part before.

    Attributes:
        document: its number among the documents of a run.
        location: the document's, for errors.
        start: the character of the document that the text begins with.
        overlap: the characters of the part before, none in the first window.
    """

    document: int
    location: str
    text: str
    start: int
    overlap: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Encoded:
    """The tokens of a window, without those that a tokenizer adds to a text."""

    window: Window
    ids: np.ndarray  # (num_tokens,) int32
    starts: np.ndarray  # (num_tokens,) int64, ascending: characters of the document
    can_be_cut: np.ndarray  # (num_tokens,) bool: no token depends on both sides of its start


def first_window(document: int, location: str, part: str) -> Window:
    return Window(document, location, part, start=0, overlap=0)


def next_window(window: Window, part: str) -> Window:
    overlap = min(_OVERLAP, len(window.text))
    text = window.text[len(window.text) - overlap :] + part
    return replace(window, text=text, start=window.end - overlap, overlap=overlap)


def encode_window(window: Window, tokenizer: Tokenizer) -> Encoded:
    ids, starts, words = tokenizer.encode_with_words(window.text)
    places = np.maximum.accumulate(np.array(starts, np.int64))
    if tokenizer.divides_words:
        begins = np.diff(np.array(words, np.int64), prepend=-1) != 0
    else:
        begins = _follows_no_blank(window.text)[places]
    # tokens that share a character stay together
    begins &= np.diff(places, prepend=-1) > 0
    return Encoded(window, np.array(ids, np.int32), window.start + places, begins)


def _follows_no_blank(text: str) -> np.ndarray:  # (num_characters,) bool
    """Whether a character is a space or a line break, and the character before it is neither."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    is_blank = np.isin(codes, (_SPACE, *_BREAKS))
    return is_blank & ~np.concatenate([[True], is_blank[:-1]])


def join(windows: Iterator[Encoded], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The token ids of a document, from its windows in their order."""
    held, begin = next(windows), 0
    for following in windows:
        seam = _seam(held, following)
        if seam is None:
            held, begin = _as_one(held, begin, chain([following], windows), tokenizer)
        else:
            yield held.ids[begin : seam[0]].tolist()
            held, begin = following, seam[1]
    yield held.ids[begin:].tolist()


def _seam(left: Encoded, right: Encoded) -> tuple[int, int] | None:
    """The index of the first token behind the seam, in both windows; None where there is none."""
    start, end = right.window.start, left.window.end
    quarter = (end - start) // 4
    (i, i_end), (j, j_end) = (
        np.searchsorted(each.starts, (start + quarter, end - quarter)) for each in (left, right)
    )
    is_same = np.array_equal(left.ids[i:i_end], right.ids[j:j_end]) and np.array_equal(
        left.starts[i:i_end], right.starts[j:j_end]
    )
    if not is_same:
        return None
    can_be_cut = left.can_be_cut[i:i_end] & right.can_be_cut[j:j_end]
    places = np.flatnonzero(can_be_cut & (left.starts[i:i_end] >= start + 2 * quarter))
    return (int(i + places[0]), int(j + places[0])) if len(places) else None


def _as_one(
    held: Encoded, begin: int, following: Iterator[Encoded], tokenizer: Tokenizer
) -> tuple[Encoded, int]:
    """Encode a window again, confined, together with those that follow, until it is twice as long.

    Args:
        begin: index of the window's first token that is not taken yet.

    Returns:
        The longer window, and the index there.
    """
    texts, length = [held.window.text], 0
    for each in following:
        texts.append(each.window.text[each.window.overlap :])
        length += len(texts[-1])
        if length >= len(texts[0]):
            break
    window = replace(held.window, text="".join(texts))
    what = f"{window.location}: the tokenizer, given {len(window.text):,} characters at once,"
    longer = in_guest(lambda: encode_window(window, tokenizer), what)
    return longer, int(np.searchsorted(longer.starts, held.starts[begin])) if begin else 0


def cut(
    parts: Iterable[list[int]], tokenizer: Tokenizer, max_length: int
) -> Iterator[list[Sample]]:
    """Cut a document, whose token ids come in parts, into pieces of at most max_length tokens.

    The document gets the BOS that the tokenizer begins a text with, and ends in one EOS. Each piece
    starts with the last token of the piece before it, unlabelled. The first token of a sample is
    never predicted, so without that overlap one token per piece would be lost; with it every token
    but the document's first is predicted exactly once.

    Returns:
        The pieces that each part completes; none of a document without a token to learn.
    """
    step = max_length - 1
    rest: list[int] = []
    is_first = True
    for ids in _closed(parts, tokenizer):
        rest += ids
        end = (len(rest) - 1) // step * step
        pieces = [rest[start : start + max_length] for start in range(0, end, step)]
        yield [
            _piece(piece, is_first and i == 0, tokenizer.bos_token_id)
            for i, piece in enumerate(pieces)
        ]
        is_first = is_first and not pieces
        del rest[:end]
    if len(rest) > 1:
        yield [_piece(rest, is_first, tokenizer.bos_token_id)]


def _closed(parts: Iterable[list[int]], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids with one BOS at most at their beginning, and one EOS at their end."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert eos is not None
    prefix, suffix = tokenizer.added_around
    # tokens that may have to go: a BOS at the beginning, and EOS at the end
    begin: list[int] = []
    num_eos = 0
    has_begun = False
    for part in chain([prefix], parts, [suffix]):
        ids = part
        if not has_begun and not num_eos:
            ids = begin + ids
            num_bos = next((n for n, i in enumerate(ids) if i != bos), len(ids))
            begin, ids = ids[: min(num_bos, 1)], ids[num_bos:]
        length = len(ids)
        while length and ids[length - 1] == eos:
            length -= 1
        if length:
            yield begin + [eos] * num_eos + ids[:length]
            begin, num_eos, has_begun = [], 0, True
        num_eos += len(ids) - length
    if has_begun:
        yield [eos]


def _piece(ids: list[int], is_first: bool, bos: int | None) -> Sample:
    is_learned = is_first and ids[0] != bos
    return Sample(ids, [ids[0] if is_learned else NO_LOSS, *ids[1:]])
