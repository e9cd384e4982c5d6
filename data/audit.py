"""The audit of a data set before a run: counts, lengths, a sample, and faults that are refused.

A run does not fail where every label is masked, where no answer ends in EOS, or where most answers
are cut or empty: the loss falls, and the model is useless. The audit counts such samples, shows a
sample with its learned tokens marked, and refuses data that nobody can mean to train on. Two more
faults are refused where samples are made: two BOS (data/tokens/tokenization.py) and data without
any target (data/dataset.py).
"""

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data import mixture
from data.dataset import Dataset, count
from data.samples import NO_LOSS, Sample
from data.tokenizer import Tokenizer
from data.tokens.pieces import Counts
from foreign.json_text import read_object
from foreign.terminal import AsIs, escaped, one_line

AUDIT_FILE = "data.json"
MAX_SHARE_TRUNCATED = MAX_SHARE_EMPTY = 0.5

_BAR_WIDTH = 30
# around the learned parts; on a terminal these are green and the rest is dim
_MARKS = ("[[", "]]")
_COLOURS = ("\x1b[32m", "\x1b[0m")
_DIM = "\x1b[2m"
# characters of a run of tokens that are shown at its start and at its end, where it is shortened
_SHOWN = 240
# samples whose labels are held against their ids
_NUM_COMPARED = 64


def facts_of(dataset: Dataset, tokenizer: Tokenizer) -> dict[str, Any]:
    """The facts of a data set for data.json: its counts, and its first sample as `show` writes it.

    "records" and "dropped" count the records of the files, before samples were split off for
    evaluation.
    """
    sample = show(dataset.samples[0], tokenizer, in_colour=False, is_shortened=True)
    bad = [one_line(error) for error in dataset.counts.bad]
    sets = {"sets": mixture.figures(dataset)} if dataset.shares else {}
    return {**_count(dataset), "bad": bad, **sets, "sample": sample}


def _count(dataset: Dataset) -> dict[str, Any]:
    """The counts of a data set.

    "lengths" has a key for each power of two: the number of samples of at most so many tokens, and
    of more than the key before.
    """
    rows, counts = dataset.samples.rows, dataset.counts
    return {
        "format": dataset.format,
        "templates": list(dataset.templates),
        "sha256": dataset.sha256,
        "records": counts.num_records,
        "samples": len(rows),
        "tokens": dataset.num_tokens,
        "target_tokens": dataset.num_target_tokens,
        "closed": int(np.count_nonzero(rows["is_closed"])),
        "truncated": int(np.count_nonzero(rows["is_truncated"])),
        "dropped": {
            "no target": counts.num_without_target,
            "cut before the first target": counts.num_cut_before_target,
            "bad": counts.num_bad,
        },
        "doubtful": {
            "empty answer": counts.num_with_empty_answer,
            "control token in a message": counts.num_with_control_token,
            "answer without its reasoning": counts.num_without_reasoning,
        },
        "max_length": dataset.max_length,
        "longest": int(rows["length"].max()),
        "median": int(np.median(rows["length"])),
        "shortest": int(rows["length"].min()),
        "lengths": length_histogram(rows["length"]),
    }


def length_histogram(lengths: np.ndarray) -> dict[str, int]:
    """Count the lengths up to each power of two, from the first that has any to the last."""
    exponents = np.ceil(np.log2(lengths)).astype(int)
    counts = np.bincount(exponents)
    return {str(2**e): int(counts[e]) for e in range(exponents.min(), len(counts))}


def describe(dataset: Dataset) -> str:
    """The audit as lines of text: format, counts, what was cut or dropped, and the lengths."""
    facts, counts = _count(dataset), dataset.counts
    how = "detected" if dataset.is_detected else "as given"
    share = facts["target_tokens"] / facts["tokens"]
    lines = [
        f"{dataset.format} ({how})" + (", tokenized before" if dataset.is_cached else ""),
        *(f"written by {name}" for name in dataset.templates),
        f"{count(facts['samples'], 'sample')}, {count(facts['tokens'], 'token')}, "
        f"{facts['target_tokens']:,} of them learned ({share:.0%})",
        f"{count(facts['closed'], 'sample')} {'ends' if facts['closed'] == 1 else 'end'} in EOS "
        "or a token that closes a turn",
    ]
    lost = []
    if facts["truncated"]:
        lost.append(
            f"{count(facts['truncated'], 'sample')} cut to {dataset.max_length:,} tokens "
            "(--max-length)"
        )
    if counts.num_cut_before_target:
        lost.append(
            f"{count(counts.num_cut_before_target, 'record')} dropped: what is to be learned is "
            f"beyond {dataset.max_length:,} tokens (--max-length)"
        )
    if counts.num_without_target:
        lost.append(
            f"{count(counts.num_without_target, 'record')} dropped: nothing to learn in "
            f"{'it' if counts.num_without_target == 1 else 'them'}"
        )
    if counts.num_bad:
        lost.append(f"{count(counts.num_bad, 'bad record')} skipped (--skip-bad-lines):")
        lost += [f"  {error}" for error in counts.bad]
    # names of templates and errors of records may quote the text of others
    return "\n".join(map(one_line, [*lines, *lost, *_doubts(counts), *_bars(facts)]))


def _doubts(counts: Counts) -> Iterator[str]:
    """Warnings of records that are learned as they are, and that hardly anybody means to learn."""
    for number, what, first, consequence in (
        (
            counts.num_with_empty_answer,
            "an empty answer",
            counts.first_empty_answer,
            "there the model learns to say nothing",
        ),
        (
            counts.num_with_control_token,
            "a control token of the model within a message",
            counts.first_control_token,
            "there the turn ends for the model, and what follows is another one; delete it from "
            "the data",
        ),
        (
            counts.num_without_reasoning,
            "an answer whose reasoning the chat template leaves out, because another turn follows",
            counts.first_without_reasoning,
            "there the model learns to answer without reasoning; give that message a weight of 0, "
            "or let the conversation end with it",
        ),
    ):
        if number:
            has = "has" if number == 1 else "have"
            yield (
                f"warning: {count(number, 'record')} {has} {what} (the first: {first}): "
                f"{consequence}"
            )


def _bars(facts: dict[str, Any]) -> Iterator[str]:
    lengths: dict[str, int] = facts["lengths"]
    yield (
        f"lengths {facts['shortest']:,} to {facts['longest']:,}, half of them up to "
        f"{facts['median']:,}"
    )
    if len(lengths) == 1:
        return
    highest = max(lengths.values())
    for upper, number in lengths.items():
        # a number above 0 has a bar of at least one mark
        bar = "#" * max(round(_BAR_WIDTH * number / highest), number > 0)
        yield f"  {f'<= {int(upper):,}':>10} {bar:<{_BAR_WIDTH}} {number:,}"


def check(dataset: Dataset, what: str, *, allow_truncation: bool) -> None:
    """Refuse a data set that would teach the wrong thing.

    Args:
        what: such as "--data", for messages.
        allow_truncation: let more than half of the records be cut.

    Raises:
        ValueError: most samples are cut or have empty answers, no sample ends in a token that stops
            the model, or the labels are shifted.
    """
    rows, counts = dataset.samples.rows, dataset.counts
    share = counts.num_empty / max(counts.num_records, 1)
    if share > MAX_SHARE_EMPTY:
        raise ValueError(
            f"{what} must have answers, or the model learns to say nothing: those of "
            f"{counts.num_empty:,} of {count(counts.num_records, 'record')} ({share:.0%}) are "
            f"empty, the first in {counts.first_empty_answer}; say which field has them with "
            "--fields, or delete these records"
        )
    share = counts.num_truncated / max(counts.num_records, 1)
    if share > MAX_SHARE_TRUNCATED and not allow_truncation:
        raise ValueError(
            f"{what} must fit --max-length, or the model learns answers without their ends: "
            f"{counts.num_truncated:,} of {count(counts.num_records, 'record')} ({share:.0%}) are "
            f"cut to {dataset.max_length:,} tokens; raise it, or give --allow-truncation"
        )
    # whoever made the token ids chose their labels; all other samples end in such a token unless
    # they are cut
    is_whole = ~rows["is_truncated"]
    if dataset.format != "tokenized" and is_whole.any() and not rows["is_closed"].any():
        raise ValueError(
            f"{what} must have samples whose last target is EOS or a token that closes a turn, or "
            f"the model never learns to stop: got none among {count(len(rows), 'sample')}; look at "
            "them with --inspect, and at eos_token in the checkpoint's tokenizer_config.json"
        )

    if dataset.format == "tokenized" and _is_shifted(dataset):
        raise ValueError(
            f"{what} must have labels that are not shifted yet, each at the position of its own "
            "token: got labels that are the ids of the next position; move them by one, the loss "
            "is what shifts them"
        )


def _is_shifted(dataset: Dataset) -> bool:
    """Whether most labels of the first samples are the id of the next token, and most are not the
    id at their own position."""
    num_own = num_next = num_targets = 0
    for sample in dataset.samples[:_NUM_COMPARED]:
        ids, labels = np.array(sample.input_ids), np.array(sample.labels)
        is_target = labels != NO_LOSS
        num_targets += np.count_nonzero(is_target)
        num_own += np.count_nonzero(is_target & (labels == ids))
        num_next += np.count_nonzero(is_target[:-1] & (labels[:-1] == ids[1:]))
    return num_own < num_targets / 2 < num_next


def num_shared(dataset: Dataset, other: Dataset) -> int:
    """Count the samples of `other` whose tokens are also those of a sample of `dataset`."""
    ours, theirs = (each.samples.rows["content_hash"] for each in (dataset, other))
    return int(np.count_nonzero(np.isin(theirs, ours)))


def to_json(audits: dict[str, dict[str, Any]]) -> str:
    return json.dumps(audits, indent=2) + "\n"


def check_same(path: Path, audits: dict[str, dict[str, Any]]) -> None:
    """Refuse to resume a run with samples that differ from those recorded in its data.json.

    Raises:
        ValueError: the samples differ, or data.json cannot be read.
    """
    try:
        earlier = {name: facts["sha256"] for name, facts in read_object(path).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--resume must find what the run learned from in {path}: got {error!r}; start a new "
            "run in another --output"
        ) from error
    changed = [name for name, facts in audits.items() if earlier.get(name) != facts["sha256"]]
    if changed:
        raise ValueError(
            f"--resume must be given the same samples: those of {' and '.join(changed)} are not "
            f"the ones of {path}, so the data files, the tokenizer or a template have changed; "
            "bring them back, or start a new run in another --output"
        )


def show(
    sample: Sample, tokenizer: Tokenizer, *, in_colour: bool, is_shortened: bool = False
) -> str:
    """Write a sample as text with its learned parts marked.

    Args:
        in_colour: learned parts are green and the rest is dim; otherwise learned parts stand
            between [[ and ]].
        is_shortened: leave out the middle of long parts.
    """
    parts = []
    for is_learned, text in masked_text(sample, tokenizer):
        text = escaped(text)
        if is_shortened and len(text) > 3 * _SHOWN:
            left_out = f" ...{len(text) - 2 * _SHOWN:,} characters... "
            text = text[:_SHOWN] + left_out + text[-_SHOWN:]
        if in_colour:
            start, end = _COLOURS if is_learned else (_DIM, _COLOURS[1])
        else:
            start, end = _MARKS if is_learned else ("", "")
        parts.append(start + text + end)
    return "".join(parts)


def say_sample(dataset: Dataset, index: int, tokenizer: Tokenizer, *, is_shortened: bool) -> None:
    """Print a sample under a line with its number."""
    in_colour = sys.stdout.isatty()
    legend = "what is learned is green" if in_colour else "[[what is learned]]"
    text = show(dataset.samples[index], tokenizer, in_colour=in_colour, is_shortened=is_shortened)
    print(f"sample {index + 1:,} of {len(dataset.samples):,}, {legend}:")
    sys.stdout.write(AsIs(f"{text}\n\n"))


def masked_text(sample: Sample, tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    """Each run of tokens that are all learned, or all not learned, as text.

    The texts together are the text of the whole sample. A character of several tokens belongs to
    the run that its last token is in.
    """
    labels = sample.labels
    # nothing comes before the first token to predict it from
    learned = [i > 0 and label != NO_LOSS for i, label in enumerate(labels)]
    shown, end = "", 0
    for is_learned, run in groupby(learned):
        end += len(list(run))
        text = tokenizer.decode(sample.input_ids[:end], skip_special_tokens=False)
        if end < len(learned):
            # the bytes of a character that the next run completes
            text = text.rstrip("\ufffd")
        if not text.startswith(shown):
            shown = _common(shown, text)
        yield is_learned, text[len(shown) :]
        shown = text


def _common(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[:length] if length is not None else min(a, b, key=len)
