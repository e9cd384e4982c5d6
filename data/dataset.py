"""A data file as samples of token ids and labels, counted.

The faults that make the peers train on nothing without a word are errors here, before a model is
loaded: no EOS token, no target tokens, a tokenizer or ids beyond the model's vocabulary. What is
cut or dropped is counted and described.

All samples are held in memory; streaming and caches of tokenized data are left out.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from data.formats import (
    DEFAULT_TEXT_FIELD,
    FORMATS,
    Example,
    Text,
    TokenIds,
    detect_format,
    to_example,
)
from data.samples import NO_LOSS, Sample, cut_document, to_sample
from data.sources import Record, read_records
from data.tokenizer import Tokenizer

TRAIN_ON = ("completions", "all")


@dataclass(frozen=True)
class Dataset:
    """Samples with what was counted while they were made.

    Attributes:
        format: one of FORMATS.
        is_detected: the format was recognized, not given.
        num_tokens: tokens of all samples.
        num_target_tokens: labels that a loss sees, of all samples.
        num_truncated: samples that were cut to max_length, dropped ones included.
        num_dropped: samples left out because no target token was in their first max_length tokens.
    """

    samples: list[Sample]
    format: str
    is_detected: bool
    num_tokens: int
    num_target_tokens: int
    num_truncated: int
    num_dropped: int
    max_length: int

    def describe(self) -> str:
        """One line of counts for the log, and a second if anything was cut or dropped."""
        how = "detected" if self.is_detected else "as given"
        lines = [
            f"{self.format} ({how}): {_count(len(self.samples), 'sample')}, "
            f"{_count(self.num_tokens, 'token')}, {self.num_target_tokens:,} of them learned"
        ]
        losses = []
        if self.num_truncated:
            losses.append(
                f"{_count(self.num_truncated, 'sample')} cut to {self.max_length:,} tokens "
                "(--max-length)"
            )
        if self.num_dropped:
            losses.append(
                f"{_count(self.num_dropped, 'sample')} dropped: nothing to learn left in them"
            )
        if losses:
            lines.append("; ".join(losses))
        return "\n".join(lines)


def load_dataset(
    path: Path,
    tokenizer: Tokenizer,
    *,
    data_format: str = "auto",
    text_field: str = DEFAULT_TEXT_FIELD,
    max_length: int = 2048,
    train_on: str = "completions",
    vocab_size: int,
    now: datetime | None = None,
) -> Dataset:
    """Read a data file, tokenize it and label what is learned.

    Args:
        data_format: one of FORMATS, or "auto" to recognize it in the first record.
        max_length: longest sample, in tokens; a longer one is cut at its end, a text file into
            pieces.
        train_on: "completions", or "all" for every token but BOS.
        vocab_size: rows of the model's embedding.
        now: the time that templates which write the date see. A resumed run gives the time of its
            first start and gets the same samples.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an argument out of range, a record that is not what it must be (with its
            location), a tokenizer without what the data needs, or nothing to learn.
    """
    _check_arguments(data_format, max_length, train_on)
    _check_vocabulary(tokenizer, vocab_size)
    name = None if data_format == "auto" else data_format
    now = now or datetime.now()
    samples: list[Sample] = []
    num_truncated = num_dropped = 0
    for record in read_records(path):
        if name is None:
            name = _detect(record, text_field)
        example = to_example(
            record,
            name,
            text_field=text_field,
            has_chat_template=tokenizer.has_chat_template,
        )
        _check_example(example, tokenizer, train_on)
        try:
            sample = to_sample(example, tokenizer, train_on=train_on, now=now)
        except ValueError as error:
            raise ValueError(f"{record.location}: {error}") from error
        if isinstance(example, TokenIds):
            _check_ids(sample, vocab_size, record.location)
        if isinstance(example, Text) and example.is_document:
            samples += cut_document(sample, max_length)
            continue
        if len(sample.input_ids) > max_length:
            num_truncated += 1
            sample = Sample(sample.input_ids[:max_length], sample.labels[:max_length])
        if sample.num_target_tokens:
            samples.append(sample)
        else:
            num_dropped += 1
    # read_records yields at least one record
    assert name is not None
    dataset = Dataset(
        samples=samples,
        format=name,
        is_detected=data_format == "auto",
        num_tokens=sum(len(sample.input_ids) for sample in samples),
        num_target_tokens=sum(sample.num_target_tokens for sample in samples),
        num_truncated=num_truncated,
        num_dropped=num_dropped,
        max_length=max_length,
    )
    if dataset.num_target_tokens == 0:
        raise ValueError(
            f"{path} must hold at least one token to learn: got {_count(num_dropped, 'record')} "
            f"without any, {num_truncated:,} of them cut to {max_length:,} tokens; raise "
            "--max-length, or look at the first records"
        )
    return dataset


def _check_arguments(data_format: str, max_length: int, train_on: str) -> None:
    if data_format not in ("auto", *FORMATS):
        raise ValueError(
            f"--data-format must be auto or one of {', '.join(FORMATS)}: got {data_format!r}"
        )
    if train_on not in TRAIN_ON:
        raise ValueError(f"--train-on must be {' or '.join(TRAIN_ON)}: got {train_on!r}")
    # the first token of a sample is never predicted
    if max_length < 2:
        raise ValueError(f"--max-length must be at least 2 tokens: got {max_length}")


def _detect(record: Record, text_field: str) -> str:
    if record.is_document:
        return "text"
    try:
        return detect_format(record.fields, text_field)
    except ValueError as error:
        raise ValueError(f"{record.location}: {error}") from error


def _check_example(example: Example, tokenizer: Tokenizer, train_on: str) -> None:
    if isinstance(example, TokenIds):
        if train_on == "all":
            raise ValueError(
                "--train-on must be completions for tokenized data: got all; "
                "its labels already say what is learned"
            )
        return
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer must have an eos_token, or the model never learns to stop: got none; "
            "name it in tokenizer_config.json"
        )


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    # a model may well have rows to spare: vocabularies are padded to round numbers
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer's ids must be below the model's vocabulary of {vocab_size:,}: got ids "
            f"up to {tokenizer.vocab_size - 1:,}; take the tokenizer files of the model itself"
        )


def _check_ids(sample: Sample, vocab_size: int, location: str) -> None:
    for name, values in (("input_ids", sample.input_ids), ("labels", sample.labels)):
        for index, value in enumerate(values):
            if not (0 <= value < vocab_size or (name == "labels" and value == NO_LOSS)):
                raise ValueError(
                    f"{location}: {name}[{index}] must be in [0, {vocab_size:,})"
                    f"{' or -100' if name == 'labels' else ''}: got {value:,}; "
                    "tokenize with the model's own tokenizer"
                )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
