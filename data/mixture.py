"""Several data sets as one to learn from, and how much of it each of them is."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from data.dataset import Dataset, count
from data.shares import Share
from data.tokens.pieces import Counts
from data.tokens.stored_samples import StoredSamples


def mix(datasets: Sequence[Dataset], names: Sequence[str], weights: Sequence[float]) -> Dataset:
    """Make one data set of several; one alone, of weight 1, stays as it is."""
    if len(datasets) == 1 and weights[0] == 1:
        return datasets[0]
    counts, mode = Counts(), datasets[0].mode
    for dataset in datasets:
        counts.add(dataset.counts)
        mode &= dataset.mode
    shares = tuple(
        Share(name, weight, len(dataset.samples))
        for name, weight, dataset in zip(names, weights, datasets, strict=True)
    )
    hashes = [[dataset.sha256, len(dataset.samples)] for dataset in datasets]
    return replace(
        datasets[0],
        samples=StoredSamples.joined([dataset.samples for dataset in datasets]),
        format=", ".join(dict.fromkeys(dataset.format for dataset in datasets)),
        counts=counts,
        templates=tuple(dict.fromkeys(name for each in datasets for name in each.templates)),
        sha256=hashlib.sha256(repr(hashes).encode()).hexdigest(),
        is_cached=all(dataset.is_cached for dataset in datasets),
        mode=mode,
        shares=shares,
    )


def figures(dataset: Dataset) -> dict[str, dict[str, float]]:
    """The samples and tokens of each data set, alone and in an epoch, by its name.

    An epoch's tokens are exact where the weight is a whole number, else those of a mean epoch.
    """
    lengths, targets = dataset.samples.lengths, dataset.samples.rows["num_targets"]
    found: dict[str, dict[str, float]] = {}
    start = 0
    for share in dataset.shares:
        of_share = slice(start, start + share.num_samples)
        num_tokens = int(lengths[of_share].sum(dtype=np.int64))
        passes = share.num_in_epoch / max(share.num_samples, 1)
        found[share.name] = {
            "weight": share.weight,
            "samples": share.num_samples,
            "tokens": num_tokens,
            "target_tokens": int(targets[of_share].sum(dtype=np.int64)),
            "samples_in_epoch": share.num_in_epoch,
            "tokens_in_epoch": round(num_tokens * passes),
        }
        start += share.num_samples
    return found


def describe(dataset: Dataset) -> Iterator[str]:
    """Say how much of an epoch each data set is, and how many samples are in two of them; nothing
    of one data set alone."""
    if not dataset.shares:
        return
    rows = figures(dataset)
    num_tokens = sum(row["tokens_in_epoch"] for row in rows.values())
    for name, row in rows.items():
        share = row["tokens_in_epoch"] / max(num_tokens, 1)
        yield (
            f"{name}: weight {row['weight']:g}, {count(int(row['samples_in_epoch']), 'sample')} an "
            f"epoch of its {row['samples']:,}, {count(int(row['tokens_in_epoch']), 'token')}, "
            f"{share:.1%} of all"
        )
    hashes = np.split(
        dataset.samples.rows["content_hash"],
        np.cumsum([share.num_samples for share in dataset.shares])[:-1],
    )
    named = zip(dataset.shares, hashes, strict=True)
    for (one, ours), (other, theirs) in combinations(named, 2):
        if num_equal := int(np.count_nonzero(np.isin(theirs, ours))):
            yield (
                f"{num_equal:,} of the samples of {other.name} are those of {one.name}, too: an "
                "epoch has them from both"
            )
