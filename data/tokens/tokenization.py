"""Records to arrays of token ids, by several processes; the arrays do not depend on their number.

One process reads the file, the others tokenize chunks of records. The results are taken in the
order of the records, so that the first fault of the file is reported. At no time are more than a
few chunks in memory. Where datasets.map sends examples to processes that write files of their own,
there is one stream here and one writer (data/tokens/token_cache.py).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import TypeAlias

from data.formats.examples import Conversation, Example, Text, TokenIds
from data.formats.field_names import check_fields, settle_names
from data.formats.fields import without
from data.formats.layouts import detect_format, to_example
from data.reading.files import read_records
from data.reading.record import Record, Refuse, raise_it
from data.samples import NO_LOSS, Sample, to_sample
from data.tokenizer import Tokenizer
from data.tokens.confinement import TakesTooMuch, begin_record
from data.tokens.documents import (
    Encoded,
    Window,
    cut,
    encode_window,
    first_window,
    join,
    next_window,
)
from data.tokens.doubts import note_doubts
from data.tokens.pieces import Counts, Piece, piece_of, row_of
from data.tokens.recipe import Recipe
from data.tokens.workers import in_turn
from foreign.reading import Reading

_CHUNK_RECORDS = 64
# a process takes about 0.1 s to start
_BYTES_WORTH_A_PROCESS = 1 << 19
# what a process is given at a time, and what the process makes of it
Task: TypeAlias = list[Record] | Window
Result: TypeAlias = Piece | Encoded


def tokenize_files(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    recipe: Recipe,
    num_processes: int,
) -> tuple[str, Iterator[Piece]]:
    """Tokenize the records of files, one after the other.

    Args:
        num_processes: 0 for as many as the files are worth and the machine has.

    Returns:
        The format, and the pieces in order, made as they are asked for; a last one, without
        samples, counts what could not be read, or not be tokenized within the limits.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a record is not what it must be (with its location), or the tokenizer has not
            what the data needs; also while the pieces are taken.
        ChildProcessError: a process was killed.
    """
    unread = Counts()
    refuse: Refuse = unread.refuse if recipe.skip_bad_lines else raise_it
    records = chain.from_iterable(read_records(path, refuse) for path in files)
    first = next(records, None)
    if first is None:
        raise ValueError(
            f"{files[0]} must hold a record that can be read: got {unread.num_bad:,} that cannot, "
            f"the first of them {unread.bad[0]}"
        )
    name = _detect(first, recipe) if recipe.data_format == "auto" else recipe.data_format
    check_fields(recipe.field_names, name)
    settled = _settle(first, name, recipe)

    def tokenize(task: Task) -> Result:
        if isinstance(task, Window):
            begin_record(task.location)
            _check_example(Text(task.text), tokenizer, recipe)
            return encode_window(task, tokenizer)
        return tokenize_records(task, name, tokenizer, recipe, settled)

    def leave_out(task: Task, fault: TakesTooMuch) -> Task | None:
        if isinstance(task, Window):
            return None
        rest = [record for record in task if record.location != fault.location]
        if len(rest) == len(task):
            return None
        refuse(fault)
        return rest

    is_text = name == "text" and "text" not in recipe.ignored_fields
    tasks = _tasks(chain([first], records), is_text)
    num_processes = num_processes or _worthwhile_processes(files)
    results = in_turn(tokenize, tasks, num_processes, leave_out)
    pieces = _with_documents(results, tokenizer, recipe)
    return name, chain(pieces, [piece_of([], [], unread)])


def tokenize_records(
    records: Iterable[Record],
    data_format: str,
    tokenizer: Tokenizer,
    recipe: Recipe,
    settled_names: Mapping[str, str] | None = None,
) -> Piece:
    """Tokenize records, label what is learned, cut what is too long, and drop what has no target.

    Args:
        settled_names: as find_names.

    Raises:
        ValueError: as tokenize_files.
    """
    counts = Counts()
    refuse: Refuse = counts.refuse if recipe.skip_bad_lines else raise_it
    samples: list[Sample] = []
    truncated: list[bool] = []
    for record in records:
        begin_record(record.location)
        try:
            with Reading(record.location):
                example = to_example(
                    record,
                    data_format,
                    has_chat_template=tokenizer.has_chat_template,
                    ignored_fields=recipe.ignored_fields,
                    field_names=recipe.field_names,
                    settled_names=settled_names,
                )
        except ValueError as error:
            refuse(error)
            continue
        _check_example(example, tokenizer, recipe)
        if recipe.system_prompt and isinstance(example, Conversation):
            example = example.with_system_prompt(recipe.system_prompt)
        try:
            with Reading(record.location):
                sample = _to_sample(example, record.location, tokenizer, recipe)
        except ValueError as error:
            refuse(error)
            continue
        counts.num_records += 1
        if isinstance(example, Conversation):
            counts.num_rendered += 1
            counts.num_rendered_with_tools += example.tools is not None
        if not sample.num_target_tokens:
            counts.num_without_target += 1
        else:
            is_truncated = len(sample.input_ids) > recipe.max_length
            counts.num_truncated += is_truncated
            if is_truncated:
                end = recipe.max_length
                ids, labels = sample.input_ids[:end], sample.labels[:end]
                sample = replace(sample, input_ids=ids, labels=labels)
            if sample.num_target_tokens:
                note_doubts(counts, record.location, example, sample, tokenizer, recipe.train_on)
                samples.append(sample)
                truncated.append(is_truncated)
            else:
                counts.num_cut_before_target += 1
    rows = [
        row_of(sample, is_truncated, tokenizer)
        for sample, is_truncated in zip(samples, truncated, strict=True)
    ]
    return piece_of(samples, rows, counts)


def _to_sample(example: Example, location: str, tokenizer: Tokenizer, recipe: Recipe) -> Sample:
    try:
        sample = to_sample(example, tokenizer, train_on=recipe.train_on, now=recipe.now)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    if isinstance(example, TokenIds):
        _check_ids(sample, recipe.vocab_size, location)
    else:
        tokenizer.check_rows(sample.input_ids, recipe.vocab_size, f"{location}: a sample")
    bos = tokenizer.bos_token_id
    if bos is not None and sample.input_ids[:2] == [bos, bos]:
        raise ValueError(
            f"{location}: a sample must begin with one BOS at most: got two (id {bos}); tokenize "
            "what a chat template wrote without adding special tokens"
        )
    return sample


def _detect(record: Record, recipe: Recipe) -> str:
    if record.is_document:
        return "text"
    try:
        return detect_format(without(record.fields, recipe.ignored_fields), recipe.field_names)
    except ValueError as error:
        raise ValueError(f"{record.location}: {error}") from error


def _settle(record: Record, data_format: str, recipe: Recipe) -> dict[str, str]:
    """The names that all records must have for the fields of a format, by the first record.

    There are none where the record is refused, which is said where it is read.
    """
    values = without(record.fields, recipe.ignored_fields)
    with contextlib.suppress(ValueError):
        return settle_names(values, data_format, recipe.field_names)
    return {}


def _check_example(example: Example, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Refuse faults that every record has: of the tokenizer, or of the recipe."""
    if recipe.system_prompt and not isinstance(example, Conversation):
        raise ValueError(
            "--system-prompt must be given with conversations, which a chat template writes: the "
            "data has texts or token ids; leave it out"
        )
    if isinstance(example, TokenIds):
        if recipe.train_on == "all":
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
    # a chat template writes EOS as text, where other samples get its id
    if isinstance(example, Conversation) and not tokenizer.has_eos_as_one_token:
        raise ValueError(
            f"the eos_token {tokenizer.eos_token} must be one token of a text, or answers do not "
            "end in it where a chat template writes it: it is several; list it among the "
            "added_tokens of tokenizer.json"
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


def _tasks(records: Iterator[Record], is_text: bool) -> Iterator[Task]:
    """Group records, and make windows of the parts of a document; what was read before a fault is
    handed on before the fault."""
    chunk: list[Record] = []
    window: Window | None = None
    document = 0
    try:
        for record in records:
            if record.is_document and is_text:
                if chunk:
                    yield chunk
                    chunk = []
                part = str(record.fields["text"])
                if record.part == 0 or window is None:
                    document += 1
                    window = first_window(document, record.location, part)
                else:
                    window = next_window(window, part)
                yield window
            # a document of another format is refused once, by its first part
            elif not record.part:
                chunk.append(record)
                if len(chunk) == _CHUNK_RECORDS:
                    yield chunk
                    chunk = []
    except ValueError:
        yield chunk
        raise
    yield chunk


def _with_documents(
    results: Iterator[Result], tokenizer: Tokenizer, recipe: Recipe
) -> Iterator[Piece]:
    """The pieces in their order, those of documents made of their windows."""
    for document, group in groupby(results, _document_of):
        if document is None:
            yield from (piece for piece in group if isinstance(piece, Piece))
        else:
            windows = (window for window in group if isinstance(window, Encoded))
            yield from _document(windows, tokenizer, recipe)


def _document_of(result: Result) -> int | None:
    return result.window.document if isinstance(result, Encoded) else None


def _document(windows: Iterator[Encoded], tokenizer: Tokenizer, recipe: Recipe) -> Iterator[Piece]:
    first = next(windows)
    ids = join(chain([first], windows), tokenizer)
    counts = Counts(num_records=1, num_without_target=1)
    for samples in cut(ids, tokenizer, recipe.max_length):
        for sample in samples:
            what = f"{first.window.location}: a sample"
            tokenizer.check_rows(sample.input_ids, recipe.vocab_size, what)
        rows = [row_of(sample, False, tokenizer) for sample in samples]
        yield piece_of(samples, rows, Counts())
        counts.num_without_target = 0
    yield piece_of([], [], counts)


def _worthwhile_processes(files: Sequence[Path]) -> int:
    size = sum(path.stat().st_size for path in files)
    return max(1, min(_num_processors(), size // _BYTES_WORTH_A_PROCESS))


def _num_processors() -> int:
    """Count the processors that this process may use; macOS tells only how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
