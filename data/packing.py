"""Several samples in a row of tokens, so that almost no token is padding.

    row 0   | sample 7                | sample 2        | sample 9  |
    row 1   | sample 4          | sample 0      | sample 5     |....|

Which samples share a row, and the order of the rows, is a pure function of the lengths, the epoch
and the seed: a resumed run needs nothing more. The longest samples come first, and each goes into
the fullest row that has room for it (best fit decreasing). Like first fit decreasing this needs at
most 11/9 of the smallest possible number of rows and one more (Johnson 1974); the number of rows
depends on the lengths alone, so all epochs of the same samples have as many steps. Samples of one
length change their neighbours from epoch to epoch.

The samples of a row do not see each other: the positions of each start at 0, attention does not
cross its ends (llama/attention.py), and its first token is no target.
"""

from collections.abc import Callable, Sequence

import torch

from data.batches import epoch_order
from data.samples import NO_LOSS, Sample
from rows.batch import Batch


def pack(
    lengths: Sequence[int], row_length: int, epoch: int, seed: int, shuffle: bool
) -> list[list[int]]:
    """Distribute samples over rows: the indices of each row's, in the order of an epoch.

    Raises:
        ValueError: a sample is longer than a row.
    """
    order = epoch_order(len(lengths), epoch, seed, shuffle)
    # stable: samples of one length stay in the epoch's order
    order.sort(key=lambda index: -lengths[index])
    if order and lengths[order[0]] > row_length:
        raise ValueError(
            f"every sample must fit a row of {row_length:,} tokens: sample {order[0]} has "
            f"{lengths[order[0]]:,}; raise --max-length"
        )
    rows: list[list[int]] = []
    # by the room that is left, the rows that have it; and the set of the rooms there are, as bits
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0
    for index in order:
        length = lengths[index]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    # the rows that were opened first hold the longest samples
    return [rows[row] for row in epoch_order(len(rows), epoch, seed, shuffle)]


class Packing:
    """The rows of every epoch of a data set."""

    def __init__(
        self,
        lengths: Sequence[int],
        row_length: int,
        seed: int,
        shuffle: bool,
        samples_of: Callable[[int], Sequence[int]],
    ) -> None:
        """Args:
        lengths: of all samples.
        samples_of: the indices of the samples of an epoch.
        """
        self.row_length = row_length
        self._arguments = (seed, shuffle)
        self._lengths, self._samples_of = lengths, samples_of
        self._epoch, self._rows = -1, list[list[int]]()
        # of the first epoch
        self.num_rows = len(self.rows(0))

    def rows(self, epoch: int) -> list[list[int]]:
        """Indices of the samples of each row, in the epoch's order."""
        if epoch != self._epoch:
            some = self._samples_of(epoch)
            lengths = [self._lengths[index] for index in some]
            rows = pack(lengths, self.row_length, epoch, *self._arguments)
            self._epoch, self._rows = epoch, [[some[i] for i in row] for row in rows]
        return self._rows


def mean_sample_tokens(lengths: Sequence[int]) -> float:
    """The mean over all tokens of the length of their sample."""
    return sum(length * length for length in lengths) / sum(lengths)


def collate_packed(rows: Sequence[Sequence[Sample]], row_length: int) -> Batch:
    """Lay samples side by side in rows of a fixed length, padded on the right.

    Padding has id 0, label -100 and position 0: every such token is a sample of its own.

    Raises:
        ValueError: no rows, or samples that exceed one.
    """
    if not rows:
        raise ValueError("a batch must have at least one row: got none")
    input_ids = torch.zeros(len(rows), row_length, dtype=torch.int64)
    labels = torch.full((len(rows), row_length), NO_LOSS, dtype=torch.int64)
    positions = torch.zeros(len(rows), row_length, dtype=torch.int64)
    lengths = torch.zeros(len(rows), row_length, dtype=torch.int64)
    for row, samples in enumerate(rows):
        start = 0
        for sample in samples:
            stop = start + len(sample.input_ids)
            if stop > row_length:
                raise ValueError(f"the samples of a row must have at most {row_length:,} tokens")
            input_ids[row, start:stop] = torch.tensor(sample.input_ids)
            labels[row, start:stop] = torch.tensor(sample.labels)
            # the token before it belongs to another sample
            labels[row, start] = NO_LOSS
            positions[row, start:stop] = torch.arange(stop - start)
            lengths[row, start:stop] = stop - start
            start = stop
    return Batch(input_ids, labels, positions, lengths)
