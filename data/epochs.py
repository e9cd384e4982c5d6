"""The rows of every epoch: one sample a row, or several side by side.

The rows are a pure function of the samples, the epoch and the seed. So a resumed run needs only the
number of its step, and the ranks of a run know each other's samples without a message.

Where an epoch has a part of the samples (data/shares.py) and several share a row, another epoch,
with other lengths, may have some rows more or fewer. Then the steps of each epoch are counted.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from data.batches import (
    collate,
    epoch_order,
    epoch_steps,
    group_by_length,
    step_micro_batches,
)
from data.packing import Packing, collate_packed, mean_sample_tokens
from data.shares import Share, samples_of_epoch
from data.tokens.stored_samples import StoredSamples
from rows.batch import Batch

# the indices of the samples in each row
MicroBatch: TypeAlias = list[list[int]]


class Epochs:
    """The order of a data set's samples in every epoch, and their batches."""

    def __init__(
        self,
        samples: StoredSamples,
        seed: int,
        shuffle: bool,
        batch_size: int,
        micro_batches_per_step: int,
        *,
        row_length: int = 0,
        group_by_length: bool = False,
        shares: Sequence[Share] = (),
    ) -> None:
        """Decide on an order.

        Args:
            batch_size: rows of a micro-batch.
            micro_batches_per_step: of all ranks together.
            row_length: tokens of a row that several samples share; 0: each sample has a row.
            group_by_length: a micro-batch has samples of like lengths, rather than random ones.
            shares: of the data sets that the samples are of; none: an epoch has each sample once.
        """
        self.samples, self._shares = samples, shares
        self._seed, self._shuffle, self._groups = seed, shuffle, group_by_length
        self._sizes = (batch_size, micro_batches_per_step)
        self._lengths: list[int] = samples.lengths.tolist()
        self._packing = None
        if row_length:
            self._packing = Packing(self._lengths, row_length, seed, shuffle, self._samples_of)
        first = self._samples_of(0)
        # of the first epoch
        self.num_rows = self._packing.num_rows if self._packing else len(first)
        self._first_lengths = [self._lengths[index] for index in first]
        has_parts = any(not share.weight.is_integer() for share in shares)
        # the first step of each epoch so far, where not all epochs have as many
        self._first_steps = [0] if self._packing and has_parts else None
        # asked for at every step, made once an epoch: shuffling a million samples takes 30 ms
        self._epoch, self._order = -1, list[int]()

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the first epoch; the last step may have fewer rows than the others."""
        return epoch_steps(self.num_rows, *self._sizes)

    @property
    def row_length(self) -> int:
        """Tokens of the longest row."""
        return self._packing.row_length if self._packing else max(self._lengths)

    @property
    def row_lengths(self) -> set[int]:
        """The lengths, in tokens, that the longest row of a batch can have."""
        return {self._packing.row_length} if self._packing else set(self._lengths)

    @property
    def packed_sample_tokens(self) -> float | None:
        """The mean over all tokens of the length of their sample, where rows hold several
        samples."""
        return mean_sample_tokens(self._first_lengths) if self._packing else None

    @property
    def rows_at_once(self) -> int:
        """Rows of the largest micro-batch."""
        batch_size, _ = self._sizes
        # a later epoch may have more rows than the first
        return batch_size if self._first_steps else min(batch_size, self.num_rows)

    @property
    def most_batch_sizes(self) -> int:
        """The most numbers of rows that micro-batches can have: a full one, and the last of each
        epoch."""
        batch_size, _ = self._sizes
        return batch_size if self._first_steps else 2

    @property
    def num_tokens(self) -> int:
        """Tokens of the first epoch without padding."""
        return sum(self._first_lengths)

    @property
    def num_target_tokens(self) -> int:
        """Labels of all samples that a loss sees."""
        return int(self.samples.rows["num_targets"].sum(dtype=np.int64))

    def describe(self) -> str:
        """Say how full the rows are."""
        share = self.num_tokens / (self.num_rows * self.row_length)
        return f"packed into {self.num_rows:,} rows of {self.row_length:,} tokens, {share:.1%} full"

    def steps_in(self, num_epochs: float) -> int:
        """The optimizer steps of so many epochs."""
        if self._first_steps is None:
            return math.ceil(num_epochs * self.num_steps)
        whole = int(num_epochs)
        first = self._first_step(whole)
        rest = num_epochs - whole
        return first + (math.ceil(rest * (self._first_step(whole + 1) - first)) if rest else 0)

    def epochs_after(self, num_steps: int) -> float:
        """How many epochs so many optimizer steps are."""
        if self._first_steps is None:
            return num_steps / self.num_steps
        epoch, step_in_epoch = self._epoch_of(num_steps)
        first = self._first_step(epoch)
        return epoch + step_in_epoch / (self._first_step(epoch + 1) - first)

    def is_end(self, num_steps: int) -> bool:
        """Whether an epoch ends with the last of so many optimizer steps."""
        return num_steps > 0 and self._epoch_of(num_steps)[1] == 0

    def _epoch_of(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the number of the step in it."""
        if self._first_steps is None:
            return divmod(step, self.num_steps)
        while self._first_steps[-1] <= step:
            self._first_step(len(self._first_steps))
        epoch = bisect_right(self._first_steps, step) - 1
        return epoch, step - self._first_steps[epoch]

    def _first_step(self, epoch: int) -> int:
        """The first step of an epoch, where not all epochs have as many."""
        assert self._packing is not None
        assert self._first_steps is not None
        for earlier in range(len(self._first_steps) - 1, epoch):
            num_rows = len(self._packing.rows(earlier))
            self._first_steps.append(self._first_steps[-1] + epoch_steps(num_rows, *self._sizes))
        return self._first_steps[epoch]

    def _samples_of(self, epoch: int) -> Sequence[int]:
        if not self._shares:
            return range(len(self.samples))
        return samples_of_epoch(self._shares, epoch, self._seed, self._shuffle)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of an optimizer step, counted from 0 in the first epoch."""
        epoch, step_in_epoch = self._epoch_of(step)
        if self._packing:
            return step_micro_batches(self._packing.rows(epoch), step_in_epoch, *self._sizes)
        some = step_micro_batches(self._order_of(epoch), step_in_epoch, *self._sizes)
        return [[[index] for index in indices] for indices in some]

    def _order_of(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            some = self._samples_of(epoch)
            places = epoch_order(len(some), epoch, self._seed, self._shuffle)
            order = [some[place] for place in places]
            if self._groups:
                batch_size, _ = self._sizes
                order = group_by_length(order, self._lengths, batch_size, epoch, self._seed)
            self._epoch, self._order = epoch, order
        return self._order

    def count(self, micro_batches: Sequence[MicroBatch]) -> tuple[int, int]:
        """Count tokens without padding, and target tokens, without making a batch."""
        indices = [index for rows in micro_batches for row in rows for index in row]
        some = self.samples.rows[indices]
        return int(some["length"].sum()), int(some["num_targets"].sum())

    def batch(self, rows: MicroBatch) -> Batch:
        """Lay the samples of a micro-batch into its rows."""
        filled = [[self.samples[index] for index in row] for row in rows]
        if self._packing:
            return collate_packed(filled, self._packing.row_length)
        return collate([sample for row in filled for sample in row])

    def largest_batch(self) -> Batch:
        """Make the largest micro-batch that an epoch can have, out of the longest sample."""
        longest = self._lengths.index(max(self._lengths))
        return self.batch([[longest]] * self.rows_at_once)
