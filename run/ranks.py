"""The processes of a run: a single one, or several that torchrun started, each on its own GPU.

    micro-batch   | 0 | 1 | 2 | 3 | 4 |        of a step, with two ranks
    rank            0   1   0   1   0

Data parallel: every rank holds the model, computes its share of a step's micro-batches, sums its
gradients with those of the other ranks and takes the same optimizer step. The seed of a
micro-batch's dropout follows from its place in the step. So two ranks compute the same as one
process with twice as many micro-batches, except for the order of float32 sums.

DistributedDataParallel averages over ranks instead, which gives another gradient where the ranks'
numbers of target tokens differ; and it sends the gradients in buckets beside the backward pass.
Here the gradients are one arena, sent in one call: for rank 16 on 8B parameters 168 MB, which takes
a millisecond between GPUs of one machine, while a step takes seconds.

torch.distributed does the work: NCCL between GPUs, gloo for numbers of Python.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from foreign.terminal import first_line
from run.shortage import is_shortage

T = TypeVar("T")
# for a machine that vanishes: a process that dies is noticed at once. It is long, because the first
# rank may tokenize, fetch a model or write a checkpoint meanwhile
TIMEOUT = timedelta(hours=2)


class RankError(RuntimeError):
    """The ranks cannot go on together: one of them has ended, or they differ."""


class RankOutOfMemory(RuntimeError):
    """One rank's GPU ran out of memory; raised on all ranks."""


class Ranks:
    """This process as one of a run's ranks, and the calls that all ranks make together.

    All ranks must call every method, except `share` and `said_once`, in the same order.

    Attributes:
        rank: this process's number, from 0.
        size: the number of ranks.
        local_rank: this process's number among the ranks on this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints and writes into the output folder."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """The items that are this rank's share, each with its place among all items."""
        return list(enumerate(items))[self.rank :: self.size]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks, without waiting for the device."""
        if self.size > 1:
            with _as_rank_error():
                dist.all_reduce(tensor)

    def sum_of(self, number: float) -> float:
        """Add up a number over all ranks."""
        total = torch.tensor(number, dtype=torch.float64)
        self.add_up(total)
        return float(total)

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        with _as_rank_error():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Let the first rank run the block, and then, if it succeeds, the other ranks.

        So a mistake of the user is reported once, and a model is fetched once.
        """
        if not self.is_first:
            self.largest(0)
        yield
        if self.is_first:
            self.largest(0)

    def sharing_shortage(self) -> "SharedShortage":
        """Run a block that may run out of memory: if one rank does, all ranks raise the error."""
        return SharedShortage(self)

    def check_same(self, what: str, number: int) -> None:
        """Compare a number, such as a hash, with that of the other ranks.

        Raises:
            RankError: the ranks have different numbers.
        """
        largest, smallest = self.largest(number), -self.largest(-number)
        if largest != smallest:
            error = RankError(
                f"{what} must be the same for all {self.size} ranks, and is not: start all of them "
                "with the same files, flags and versions"
            )
            raise self.said_once(error)

    def said_once(self, error: Exception) -> BaseException:
        """The error to raise where all ranks fail alike: on the others a silent exit."""
        return error if self.is_first else SystemExit(1)


class SharedShortage:
    """Turns an out-of-memory error of one rank into the same error on all ranks.

    The tensors of the failed block are freed with its error, before the run is saved. A generator
    as context manager would keep them: from Python 3.12 on, contextlib's frame and the error hold
    each other.

    Raises:
        RankOutOfMemory: at the end of the block, if any rank ran out of memory.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error and not is_shortage(error):
            return
        number = self._ranks.largest(self._ranks.rank + 1 if error else 0)
        if number:
            whose = "" if self._ranks.size == 1 else f"rank {number - 1}: "
            is_own = number == self._ranks.rank + 1
            what = first_line(error) if error and is_own else "out of memory"
            raise RankOutOfMemory(f"{whose}{what}")


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other processes of the run, if torchrun started this one.

    On stdout only the first rank prints.
    """
    is_started = dist.is_available() and dist.is_torchelastic_launched()
    if not is_started or os.environ["WORLD_SIZE"] == "1":
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _as_rank_error():
        dist.init_process_group(backend, timeout=TIMEOUT)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    with open(os.devnull, "w") as nowhere:
        quiet = nullcontext() if ranks.is_first else redirect_stdout(nowhere)
        with quiet:
            yield ranks
    # not after an error: this would wait for the other ranks
    dist.destroy_process_group()


@contextmanager
def _as_rank_error() -> Iterator[None]:
    """Turn the error of torch.distributed after another process has ended into a RankError."""
    try:
        yield
    except RuntimeError as error:
        if is_shortage(error):
            raise
        raise RankError(f"another rank has ended: {str(error).partition('. ')[0]}") from error
