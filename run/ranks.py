"""The processes of a run: one, or those that torchrun started, each with a GPU of its own.

    micro-batch   | 0 | 1 | 2 | 3 | 4 |        of a step, with two ranks
    rank            0   1   0   1   0

Data parallel: every rank holds the model, computes its share of a step's micro-batches, adds its
gradients up with the others' and takes the same optimizer step. A micro-batch's dropout follows
from its place in the step, so two ranks learn what one process learns of twice as many
micro-batches, but for the order in which float32 adds up. DistributedDataParallel averages over
ranks instead, which is another gradient where their numbers of target tokens differ; and it sends
the gradients in buckets beside the backward pass. Here they are one arena and one call: those of
rank 16 on 8B parameters are 168 MB, a millisecond between GPUs of one machine, of a step's seconds.

torch.distributed does the work: NCCL between GPUs, gloo for what Python must agree on.
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

from run.shortage import is_shortage

T = TypeVar("T")
# the first rank may tokenize, fetch a model or write a checkpoint meanwhile; a rank that dies is
# noticed at once, this is for a machine that vanishes
TIMEOUT = timedelta(hours=2)


class RankError(RuntimeError):
    """The ranks cannot go on together: one has ended, or they are not the same."""


class RankOutOfMemory(RuntimeError):
    """A rank's GPU did not have the memory; raised by all of them."""


class Ranks:
    """What a process knows of the others, and does together with them.

    Every method but `share` and `said_once` must be called by all ranks, in one order.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        local_rank: the number among those on this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @property
    def is_first(self) -> bool:
        """The first one prints, and writes into the output folder."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """What this rank has to do of what all ranks have, each with its place among all."""
        return list(enumerate(items))[self.rank :: self.size]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over all ranks. Does not wait for the device."""
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
        """Let the first rank do something, and then, if it succeeds, the others.

        What the user has given wrong is thus said once, and what is fetched is fetched once.
        """
        if not self.is_first:
            self.largest(0)
        yield
        if self.is_first:
            self.largest(0)

    def sharing_shortage(self) -> "SharedShortage":
        """Compute something for which the memory may not suffice; then all ranks learn of it."""
        return SharedShortage(self)

    def check_same(self, what: str, number: int) -> None:
        """Hold a number, such as a hash, against the other ranks'.

        Raises:
            RankError: they have different ones.
        """
        largest, smallest = self.largest(number), -self.largest(-number)
        if largest != smallest:
            error = RankError(
                f"{what} must be the same for all {self.size} ranks, and is not: start all of them "
                "with the same files, flags and versions"
            )
            raise self.said_once(error)

    def said_once(self, error: Exception) -> BaseException:
        """What to raise where every rank raises the same error: the first one's says why."""
        return error if self.is_first else SystemExit(1)


class SharedShortage:
    """Turns what runs out of memory on one rank into the same error on all.

    What was computed goes with the error, before anything is saved. A generator as context manager
    would keep it: from Python 3.12 on, contextlib's frame and the error hold each other.

    Raises:
        RankOutOfMemory: at the end, if the memory did not suffice.
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
            is_own = error is not None and number == self._ranks.rank + 1
            what = str(error).partition("\n")[0] if is_own else "out of memory"
            raise RankOutOfMemory(f"{whose}{what}")


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other processes, if torchrun started this one.

    All but the first are silent on stdout.
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
    # not after an error, which must not wait for the others
    dist.destroy_process_group()


@contextmanager
def _as_rank_error() -> Iterator[None]:
    """Name what torch.distributed raises when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if is_shortage(error):
            raise
        raise RankError(f"another rank has ended: {str(error).partition('. ')[0]}") from error
