"""The rows of every epoch: one sample a row, or several side by side.

The rows are a pure function of the samples, the epoch and the seed. So a resumed run needs only the
number of its step, and the ranks of a run know each other's samples without a message.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from data.batches import (
    Batch,
    collate,
    epoch_order,
    epoch_steps,
    group_by_length,
    step_micro_batches,
)
from data.packing import Packing, collate_packed, mean_sample_tokens
from data.tokens.stored_samples import StoredSamples

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
    ) -> None:
        """Decide on an order.

        Args:
            batch_size: rows of a micro-batch.
            micro_batches_per_step: of all ranks together.
            row_length: tokens of a row that several samples share; 0: each sample has a row.
            group_by_length: a micro-batch has samples of like lengths, rather than random ones.
        """
        self.samples = samples
        self._seed, self._shuffle, self._groups = seed, shuffle, group_by_length
        self._sizes = (batch_size, micro_batches_per_step)
        self._lengths: list[int] = samples.lengths.tolist()
        self._packing = Packing(self._lengths, row_length, seed, shuffle) if row_length else None
        # asked for at every step, made once an epoch: shuffling a million samples takes 30 ms
        self._epoch, self._order = -1, list[int]()

    @property
    def num_rows(self) -> int:
        """Rows of an epoch; all epochs have as many."""
        return self._packing.num_rows if self._packing else len(self.samples)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch; the last step may have fewer rows than the others."""
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
        return mean_sample_tokens(self._lengths) if self._packing else None

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch without padding."""
        return sum(self._lengths)

    @property
    def num_target_tokens(self) -> int:
        """Labels of an epoch that a loss sees."""
        return int(self.samples.rows["num_targets"].sum(dtype=np.int64))

    def describe(self) -> str:
        """Say how full the rows are."""
        share = self.num_tokens / (self.num_rows * self.row_length)
        return f"packed into {self.num_rows:,} rows of {self.row_length:,} tokens, {share:.1%} full"

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of an optimizer step, counted from 0 in the first epoch."""
        epoch, step_in_epoch = divmod(step, self.num_steps)
        if self._packing:
            return step_micro_batches(self._packing.rows(epoch), step_in_epoch, *self._sizes)
        some = step_micro_batches(self._order_of(epoch), step_in_epoch, *self._sizes)
        return [[[index] for index in indices] for indices in some]

    def _order_of(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            order = epoch_order(len(self.samples), epoch, self._seed, self._shuffle)
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
        batch_size, _ = self._sizes
        return self.batch([[longest]] * min(batch_size, self.num_rows))
