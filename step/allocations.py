"""Record the memory that code allocates and frees, event by event, without a GPU.

    with Allocations() as recorded:         tensors on torch's meta device have sizes and no values,
        step(...)                           so the code runs through and computes nothing

Every tensor that an operation makes lies in a storage, which its views share; the storage is given
back when the last of them goes. Both are recorded in the order in which the code does them: nothing
here knows what a layer is. `step/caching_allocator.py` computes what a GPU's allocator would hold.

Recorded are storages of one type of device. Memory that torch takes for itself while an operation
runs on a GPU is not seen: `llama/attention.py` says what attention takes.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

# where memory is taken from unless someone says otherwise
DEFAULT_POOL = "default"


class Event(NamedTuple):
    """A block of memory is taken, or given back."""

    block: int
    num_bytes: int  # 0 where the block is given back
    pool: str  # the memory that the block is of


class Allocations(TorchDispatchMode):
    """Records what operations take and give back while it is entered.

    Attributes:
        events: so far, in order.
        num_blocks: taken so far; they are numbered in this order.
    """

    def __init__(self, device_type: str = "meta", num_blocks: int = 0) -> None:
        """Prepare.

        Args:
            num_blocks: taken before by others, whose numbers are not to be given again.
        """
        super().__init__()
        self.events: list[Event] = []
        self._device_type = device_type
        self._pool = DEFAULT_POOL
        self.num_blocks = num_blocks
        # by the storage's address, until it goes: the block that it is, and who calls when it goes
        self._taken: dict[int, Event] = {}
        self._watched: dict[int, weakref.ref[UntypedStorage]] = {}

    @contextmanager
    def taking_from(self, pool: str) -> Iterator[None]:
        """Take new blocks from a pool; every block goes back to the pool that it came from."""
        before, self._pool = self._pool, pool
        try:
            yield
        finally:
            self._pool = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing for a while; only the recorder that was entered last may pause."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = set()
        for tensor in self._tensors((*args, *kwargs.values())):
            address = tensor.untyped_storage()._cdata
            given.add(address)
            # an operation may make the storage of a tensor that it is given larger
            if address in self._taken:
                self.note(tensor)
        for tensor in self._tensors((result,)):
            # a result in the storage of an argument is a view
            if tensor.untyped_storage()._cdata not in given:
                self.note(tensor)
        return result

    def _tensors(self, values: Sequence[Any]) -> list[Tensor]:
        """List the device's tensors among values and in lists and tuples of them."""
        found = []
        for value in values:
            if isinstance(value, Tensor):
                if value.device.type == self._device_type:
                    found.append(value)
            elif isinstance(value, (tuple, list)):
                found += self._tensors(value)
        return found

    def note(self, tensor: Tensor) -> None:
        """Record a tensor's storage, if it is new or has another size than before."""
        storage = tensor.untyped_storage()
        before = self._taken.get(storage._cdata)
        if before is None and storage.nbytes():
            self.adopt(tensor, self.take(storage.nbytes(), self._pool))
        elif before is not None and before.num_bytes != storage.nbytes():
            self._taken[storage._cdata] = self.take(storage.nbytes(), before.pool)
            # values are copied before the smaller block goes
            self.give_back(before)

    def take(self, num_bytes: int, pool: str) -> Event:
        """Record that a block is taken."""
        self.num_blocks += 1
        event = Event(self.num_blocks, num_bytes, pool)
        self.events.append(event)
        return event

    def give_back(self, taken: Event) -> None:
        """Record that a block is given back."""
        self.events.append(taken._replace(num_bytes=0))

    def adopt(self, tensor: Tensor, taken: Event) -> None:
        """Tie a block that was taken to a tensor's storage: the block is given back with it."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        self._taken[address] = taken
        self._watched[address] = weakref.ref(storage, lambda _: self._went(address))

    def block_of(self, tensor: Tensor) -> Event | None:
        """Find the block that a tensor lies in; None if the tensor was there before."""
        return self._taken.get(tensor.untyped_storage()._cdata)

    def disown(self, tensor: Tensor) -> Event:
        """Untie a tensor's storage from its block, and return the block."""
        address = tensor.untyped_storage()._cdata
        del self._watched[address]
        return self._taken.pop(address)

    def _went(self, address: int) -> None:
        del self._watched[address]
        self.give_back(self._taken.pop(address))
