"""What the rows of every epoch are: one sample each, or several side by side.

A pure function of the samples, the epoch and the seed, so a resumed run needs nothing more than the
number of its step.
"""

from collections.abc import Sequence

from data.batches import Batch, collate, epoch_order, group_by_length, step_micro_batches
from data.packing import Packing, collate_packed, mean_sample_tokens
from data.samples import Sample
from data.token_cache import Samples


class Epochs:
    """The order of a data set's samples in every epoch, and their batches."""

    def __init__(
        self,
        samples: Sequence[Sample] | Samples,
        lengths: Sequence[int],
        seed: int,
        shuffle: bool,
        *,
        row_length: int = 0,
        group: int = 0,
    ) -> None:
        """Decide on an order.

        Args:
            lengths: tokens of every sample.
            row_length: tokens of a row that several samples share; 0: each has its own.
            group: samples of a micro-batch, which shall be of like lengths; 0: by chance.
        """
        self.samples = samples
        self._seed, self._shuffle, self._group = seed, shuffle, group
        self._lengths = lengths
        self._packing = Packing(self._lengths, row_length, seed, shuffle) if row_length else None
        # asked for at every step, made once an epoch: shuffling a million samples takes 30 ms
        self._epoch, self._order = -1, list[int]()

    @property
    def num_rows(self) -> int:
        """Of an epoch, whichever it is."""
        return self._packing.num_rows if self._packing else len(self.samples)

    @property
    def row_length(self) -> int:
        """Tokens of the longest row there is."""
        return self._packing.row_length if self._packing else max(self._lengths)

    @property
    def packed_sample_tokens(self) -> float | None:
        """The length of the sample that a token is in, on average, where rows hold several."""
        return mean_sample_tokens(self._lengths) if self._packing else None

    @property
    def num_tokens(self) -> int:
        """Of an epoch, padding left out."""
        return sum(self._lengths)

    def describe(self) -> str:
        """Say how the samples lie in rows."""
        share = self.num_tokens / (self.num_rows * self.row_length)
        return f"packed into {self.num_rows:,} rows of {self.row_length:,} tokens, {share:.1%} full"

    def micro_batches(
        self, epoch: int, step_in_epoch: int, batch_size: int, gradient_accumulation_steps: int
    ) -> list[list[list[int]]]:
        """The samples of each row of each micro-batch of an optimizer step.

        Raises:
            ValueError: the epoch has no such step.
        """
        sizes = (step_in_epoch, batch_size, gradient_accumulation_steps)
        if self._packing:
            return step_micro_batches(self._packing.rows(epoch), *sizes)
        return [[[i] for i in some] for some in step_micro_batches(self._order_of(epoch), *sizes)]

    def _order_of(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            order = epoch_order(len(self.samples), epoch, self._seed, self._shuffle)
            if self._group:
                order = group_by_length(order, self._lengths, self._group, epoch, self._seed)
            self._epoch, self._order = epoch, order
        return self._order

    def batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Lay samples into the rows of a micro-batch."""
        filled = [[self.samples[index] for index in row] for row in rows]
        if self._packing:
            return collate_packed(filled, self._packing.row_length)
        return collate([sample for row in filled for sample in row])

    def largest_batch(self, batch_size: int) -> Batch:
        """Make the largest micro-batch that may come, of the longest sample."""
        longest = self._lengths.index(max(self._lengths))
        return self.batch([[longest]] * min(batch_size, self.num_rows))
