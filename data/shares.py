"""Which samples an epoch has, where some come more often than once, or not in every epoch.

A weight is how often an epoch has each sample of a data set: 2 is twice; 0.5 is half of the samples
in an epoch and the other half in the next. All samples of a set, shuffled, are a pass. The passes
of a set follow one another without end, and each epoch goes on where the epoch before ended:

    passes       |---- 0 ----|---- 1 ----|---- 2 ----|
    weight 0.5   |  0  |  1  |  2  |  3  |  4  |  5  |    epochs
    weight 1.5   |        0        |        1        |

So no sample comes again before all others of its set have come. The samples of an epoch are a pure
function of the sizes, the weights, the epoch and the seed.

Where datasets.interleave_datasets draws the set of each sample at random until one set or all are
used up, an epoch has an exact number of samples of each set here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.batches import epoch_order


@dataclass(frozen=True)
class Share:
    """The samples of one data set, which lie side by side among those of all.

    Attributes:
        name: of the data set.
    """

    name: str
    weight: float
    num_samples: int

    @property
    def num_in_epoch(self) -> int:
        """The number of samples of each epoch: to the nearest whole number, and at least one."""
        return min(self.num_samples, 1) and max(1, int(self.weight * self.num_samples + 0.5))

    def passes_in(self, epoch: int) -> Iterator[tuple[int, slice]]:
        """The passes that an epoch has samples of, each with the places in it."""
        start = epoch * self.num_in_epoch
        stop = start + self.num_in_epoch
        while start < stop:
            number, first = divmod(start, self.num_samples)
            last = min(first + stop - start, self.num_samples)
            yield number, slice(first, last)
            start += last - first


def samples_of_epoch(shares: Sequence[Share], epoch: int, seed: int, shuffle: bool) -> list[int]:
    """Indices of the samples that an epoch has, set by set; a sample that comes twice stands
    twice."""
    found: list[int] = []
    start = 0
    for share in shares:
        for number, places in share.passes_in(epoch):
            order = epoch_order(share.num_samples, number, seed, shuffle)
            # the order is the epoch's business: a whole pass has the samples as they lie
            found += [start + index for index in sorted(order[places])]
        start += share.num_samples
    return found
