"""Data files as samples of token ids and labels, counted.

Some faults make other trainers train on nothing, silently. They are errors here, before a model is
loaded: no EOS token, no target tokens, a tokenizer or ids beyond the model's vocabulary. Samples
that are cut or dropped are counted, and data/audit.py reports and judges the counts.

The tokens lie on the disk (data/tokens/token_cache.py). A data set holds the lengths and hashes of
its samples in memory, and reads a sample when it is asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from data.shares import Share
from data.tokenizer import Tokenizer
from data.tokens.pieces import Counts
from data.tokens.recipe import Recipe
from data.tokens.stored_samples import StoredSamples
from data.tokens.token_cache import cached_tokens
from run.privacy import shared_mode


@dataclass(frozen=True)
class Dataset:
    """Samples, and the counts of the records that they were made of.

    Attributes:
        format: one of FORMATS.
        is_detected: the format was recognized, not given.
        counts: of all records of the files, also in the two parts that `split` returns.
        templates: names of the chat templates that wrote the conversations.
        sha256: of all samples of the files.
        is_cached: an earlier run made the samples.
        mode: permissions of files that repeat text of the data files.
        shares: the data sets that the samples are of, one after the other, with their weights; none
            where each epoch has each sample once.
    """

    samples: StoredSamples
    format: str
    is_detected: bool
    max_length: int
    counts: Counts
    templates: tuple[str, ...]
    sha256: str
    is_cached: bool
    mode: int
    shares: tuple[Share, ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.samples.lengths.sum(dtype=np.int64))

    @property
    def num_target_tokens(self) -> int:
        """Labels that a loss sees, of all samples."""
        return int(self.samples.rows["num_targets"].sum(dtype=np.int64))

    def split(self, fraction: float) -> tuple["Dataset", "Dataset"]:
        """Split off samples for evaluation: those whose hash is in the lowest `fraction` of all
        hashes.

        The hash is of a sample's tokens alone: equal samples are on the same side, whatever the
        seed, the order of the files, or the records that were added to them.

        Raises:
            ValueError: one side would have no sample.
        """
        is_eval = self.samples.rows["content_hash"] < np.uint64(fraction * 2**64)
        if is_eval.all() or not is_eval.any():
            raise ValueError(
                f"--eval-fraction must leave samples on both sides: {fraction} of "
                f"{len(is_eval):,} puts {np.count_nonzero(is_eval):,} into the evaluation; choose "
                "another, or give --eval-data"
            )
        train, evaluation = (self.samples.select(chosen) for chosen in (~is_eval, is_eval))
        shares, start = list[Share](), 0
        for share in self.shares:
            is_of_share = slice(start, start + share.num_samples)
            left = int(np.count_nonzero(~is_eval[is_of_share]))
            shares.append(replace(share, num_samples=left))
            start += share.num_samples
        # an evaluation has each sample once
        return (
            replace(self, samples=train, shares=tuple(shares)),
            replace(self, samples=evaluation, shares=()),
        )


def load_dataset(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    data_format: str = "auto",
    max_length: int = 2048,
    train_on: str = "completions",
    vocab_size: int,
    now: datetime | None = None,
    skip_bad_lines: bool = False,
    ignored_fields: tuple[str, ...] = (),
    field_names: dict[str, str] | None = None,
    system_prompt: str = "",
    num_processes: int = 0,
    report: Callable[[int], None] = lambda num_records: None,
) -> Dataset:
    """Read data files, tokenize them and label the tokens to learn, or find all that in the cache.

    Args:
        data_format to system_prompt: as data.tokens.tokenization.Recipe.
        num_processes: 0 for as many as the files are worth and the machine has.
        report: is given the number of records done so far.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an argument out of range, a record that is not what it must be (with its
            location), a tokenizer without what the data needs, or nothing to learn.
        OSError: the cache cannot be written.
    """
    recipe = Recipe(
        data_format,
        max_length,
        train_on,
        vocab_size,
        now or datetime.now(),
        skip_bad_lines,
        ignored_fields,
        field_names or {},
        system_prompt,
    )
    _check_vocabulary(tokenizer, vocab_size)
    tokens = cached_tokens(files, tokenizer, recipe, num_processes, report)
    counts = tokens.counts
    if not len(tokens.samples):
        bad = f", and {counts.num_bad:,} bad, the first: {counts.bad[0]}" if counts.bad else ""
        raise ValueError(
            f"{files[0]} must hold at least one token to learn: got "
            f"{count(counts.num_dropped, 'record')} without any, {counts.num_truncated:,} of them "
            f"cut to {max_length:,} tokens{bad}; raise --max-length, or look at the first records"
        )
    return Dataset(
        samples=tokens.samples,
        format=tokens.format,
        is_detected=data_format == "auto",
        max_length=max_length,
        counts=counts,
        templates=_templates(counts, tokenizer),
        sha256=tokens.sha256,
        is_cached=tokens.is_cached,
        mode=shared_mode(files),
    )


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _templates(counts: Counts, tokenizer: Tokenizer) -> tuple[str, ...]:
    used = {False: counts.num_rendered - counts.num_rendered_with_tools}
    used[True] = counts.num_rendered_with_tools
    names = [tokenizer.chat_template(has_tools).name for has_tools, n in used.items() if n]
    return tuple(dict.fromkeys(names))


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    # a model may have more rows than the tokenizer has ids: vocabularies are padded to round
    # numbers; an added token beyond the rows is refused where a sample has it
    if tokenizer.own_vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer's ids must be below the model's vocabulary of {vocab_size:,}: got ids "
            f"up to {tokenizer.own_vocab_size - 1:,}; take the tokenizer files of the model itself"
        )
