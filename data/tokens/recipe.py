"""The settings that decide, with the tokenizer, which tokens a record becomes."""

from dataclasses import dataclass, field
from datetime import datetime

from data.formats.layouts import FORMATS

TRAIN_ON = ("completions", "all")


@dataclass(frozen=True)
class Recipe:
    """The settings that decide, with the tokenizer, which tokens a record becomes.

    Attributes:
        data_format: one of FORMATS, or "auto" to recognize it in the first record.
        max_length: longest sample, in tokens; a longer one is cut at its end, a text file into
            pieces.
        train_on: "completions", or "all" for every token but BOS.
        vocab_size: rows of the model's embedding.
        now: the time for templates that write the date. A resumed run gives the time of its first
            start and gets the same samples.
        skip_bad_lines: leave out and count a record that is malformed or takes too much; a text
            file is no line.
        ignored_fields: fields of a record and of its messages that are left out.
        field_names: our names of fields that the user named, each with the record's.
        system_prompt: for conversations that have none; other records are refused.

    Raises:
        ValueError: a value out of range.
    """

    data_format: str
    max_length: int
    train_on: str
    vocab_size: int
    now: datetime
    skip_bad_lines: bool
    ignored_fields: tuple[str, ...] = ()
    field_names: dict[str, str] = field(default_factory=dict)
    system_prompt: str = ""

    def __post_init__(self) -> None:
        if self.data_format not in ("auto", *FORMATS):
            raise ValueError(
                f"--data-format must be auto or one of {', '.join(FORMATS)}: got "
                f"{self.data_format!r}"
            )
        if self.train_on not in TRAIN_ON:
            raise ValueError(f"--train-on must be {' or '.join(TRAIN_ON)}: got {self.train_on!r}")
        # the first token of a sample is never predicted
        if self.max_length < 2:
            raise ValueError(f"--max-length must be at least 2 tokens: got {self.max_length}")
