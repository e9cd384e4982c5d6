"""Samples end to end in arrays, as in the files of the cache, and the counts of their records."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from data.samples import NO_LOSS, Sample
from data.tokenizer import Tokenizer

TOKEN = np.dtype("<i4")
# the facts of a sample without its tokens; packed, so that memory and file have the same bytes
ROW = np.dtype(
    [
        ("length", "<i4"),
        ("num_targets", "<i4"),
        ("content_hash", "<u8"),
        ("is_truncated", "?"),
        ("is_closed", "?"),
    ]
)
# how many faults are quoted
_NUM_QUOTED = 3


@dataclass
class Counts:
    """The numbers of records, by what became of them.

    Attributes:
        num_records: all records of the files.
        num_bad: records left out by --skip-bad-lines; `bad` quotes the errors of the first.
        num_without_target: records left out because they have no token to learn.
        num_cut_before_target: records left out because their first token to learn is beyond
            max_length tokens.
        num_truncated: records cut to max_length; includes num_cut_before_target.
        num_rendered: records written by the chat template.
        num_rendered_with_tools: those of them with tools.
        num_with_empty_answer: records with an empty answer to learn (data/tokens/doubts.py).
        num_empty: those of them all of whose answers are.
        num_with_control_token: records with a message that spells out a control token.
        num_without_reasoning: records with an answer whose reasoning the chat template leaves out.
        first_empty_answer, first_control_token, first_without_reasoning: the place of the first.
    """

    num_records: int = 0
    num_bad: int = 0
    num_without_target: int = 0
    num_cut_before_target: int = 0
    num_truncated: int = 0
    num_rendered: int = 0
    num_rendered_with_tools: int = 0
    num_with_empty_answer: int = 0
    num_empty: int = 0
    num_with_control_token: int = 0
    num_without_reasoning: int = 0
    first_empty_answer: str = ""
    first_control_token: str = ""
    first_without_reasoning: str = ""
    bad: list[str] = field(default_factory=list)

    @property
    def num_dropped(self) -> int:
        return self.num_without_target + self.num_cut_before_target

    def add(self, other: "Counts") -> None:
        for f in fields(self):
            ours, theirs = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, ours or theirs if isinstance(ours, str) else ours + theirs)
        del self.bad[_NUM_QUOTED:]

    def refuse(self, error: ValueError) -> None:
        """Count a record that is left out."""
        self.num_records += 1
        self.num_bad += 1
        self.bad = [*self.bad, str(error)][:_NUM_QUOTED]


@dataclass(frozen=True)
class Piece:
    """Samples end to end, a row for each, and the counts of the records that they were made of."""

    input_ids: np.ndarray  # (num_tokens,) int32
    labels: np.ndarray  # (num_tokens,) int32, -100 where there is no loss
    rows: np.ndarray  # (num_samples,) ROW
    counts: Counts


def piece_of(samples: Sequence[Sample], rows: Sequence[tuple], counts: Counts) -> Piece:
    return Piece(
        np.array([i for sample in samples for i in sample.input_ids], TOKEN),
        np.array([i for sample in samples for i in sample.labels], TOKEN),
        np.array(rows, ROW),
        counts,
    )


def row_of(sample: Sample, is_truncated: bool, tokenizer: Tokenizer) -> tuple:
    # the hash leaves out the labels: a text must not be on both sides of a split with two masks
    content = np.array(sample.input_ids, TOKEN).tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return (
        len(sample.input_ids),
        sample.num_target_tokens,
        int.from_bytes(digest, "little"),
        is_truncated,
        is_closed(sample, tokenizer),
    )


def is_closed(sample: Sample, tokenizer: Tokenizer) -> bool:
    """Whether the last learned token that is not whitespace is EOS or a token that ends a turn."""
    for label in reversed(sample.labels[1:]):
        if label in tokenizer.closing_ids:
            return True
        if label != NO_LOSS and not tokenizer.is_blank(label):
            return False
    return False
