"""Record the memory events of a call once, and repeat them for later calls that are alike.

A model has tens of layers that are alike, and walking through one on the meta device takes ten
milliseconds of Python. So the first call records its events. A later call of a like function, with
arguments of the same form, repeats the events: it takes blocks of the same sizes, gives the same
blocks back, and returns tensors of the same form in them. The caller uses the results as those of
a real call.

Arguments and results may be tensors, constants, and tuples, lists and objects of them.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from step.allocations import Allocations, Event


class _Place(NamedTuple):
    """Where a tensor lies: in which block of its call, and how."""

    block: int | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _form_of(value: Any, tensors: list[Tensor]) -> tuple[Any, ...]:
    """Describe a value but for the tensors in it, which are listed in the order of their places."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return (Tensor,)
    if isinstance(value, (tuple, list)):
        return type(value), *(_form_of(part, tensors) for part in value)
    if isinstance(value, dict) or hasattr(value, "__dict__"):
        parts = value if isinstance(value, dict) else vars(value)
        return type(value), *((name, _form_of(part, tensors)) for name, part in parts.items())
    return None, value


def _made_of(form: tuple[Any, ...], tensors: Iterator[Tensor]) -> Any:
    """Make a value of a form again, with other tensors in the same places."""
    kind, *parts = form
    if kind is None:
        return parts[0]
    if kind is Tensor:
        return next(tensors)
    if issubclass(kind, (tuple, list)):
        values = [_made_of(part, tensors) for part in parts]
        return kind(*values) if hasattr(kind, "_fields") else kind(values)
    named = {name: _made_of(part, tensors) for name, part in parts}
    if kind is dict:
        return named
    made = object.__new__(kind)
    vars(made).update(named)
    return made


@dataclass(frozen=True)
class _Call:
    """What a call did; blocks that it took are numbered from 1, those it was given from -1 down."""

    events: tuple[Event, ...]
    form: tuple[Any, ...]
    results: tuple[_Place, ...]


class RepeatedCalls:
    """Makes the first call of each kind, and repeats its memory events for the later ones."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, _Call] = {}

    def of(
        self, function: Callable[..., Any], kind: Hashable, recorded: Allocations
    ) -> Callable[..., Any]:
        """Wrap a function so that it repeats an earlier call of its kind if there was one.

        Args:
            kind: equal for functions that do the same with arguments of the same form.
            recorded: where the calls take and give back.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors: list[Tensor] = []
            form = _form_of((args, kwargs), tensors)
            given = _numbered(tensors, recorded)
            numbers = {recorded.block_of(given[number]): number for number in given}
            numbers = {block.block: number for block, number in numbers.items() if block}
            key = (kind, form, *(_place(tensor, numbers, recorded) for tensor in tensors))
            if key in self._calls:
                return _repeat(self._calls[key], given, recorded)
            # the call may give back what it was given, if nobody else holds it
            del tensors, given
            start, first = len(recorded.events), recorded.num_blocks
            result = function(*args, **kwargs)
            done = recorded.events[start:]
            numbers |= {event.block: event.block - first for event in done if event.block > first}
            self._calls[key] = _call(done, numbers, result, recorded)
            return result

        return call


def _numbered(tensors: list[Tensor], recorded: Allocations) -> dict[int, Tensor]:
    """Number the blocks that tensors lie in from -1 down, and name a tensor in each."""
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        if (block := recorded.block_of(tensor)) is not None:
            found.setdefault(block.block, tensor)
    return {-1 - index: tensor for index, tensor in enumerate(found.values())}


def _place(tensor: Tensor, numbers: dict[int, int], recorded: Allocations) -> _Place:
    block = recorded.block_of(tensor)
    number = None if block is None else numbers[block.block]
    offset = int(tensor.storage_offset())
    return _Place(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), offset)


def _call(done: list[Event], numbers: dict[int, int], result: Any, recorded: Allocations) -> _Call:
    tensors: list[Tensor] = []
    form = _form_of(result, tensors)
    events = tuple(event._replace(block=numbers[event.block]) for event in done)
    places = tuple(_place(tensor, numbers, recorded) for tensor in tensors)
    # what a call takes for good would be missing from the memory of the calls like it
    left = {event.block for event in events if event.num_bytes}
    left -= {event.block for event in events if not event.num_bytes}
    assert left <= {place.block for place in places}, (left, places)
    return _Call(events, form, places)


def _repeat(call: _Call, given: dict[int, Tensor], recorded: Allocations) -> Any:
    taken: dict[int, Event] = {}
    for number, num_bytes, pool in call.events:
        if num_bytes:
            taken[number] = recorded.take(num_bytes, pool)
        else:
            block = taken.pop(number) if number > 0 else recorded.disown(given[number])
            recorded.give_back(block)
    bases, results = dict(given), []
    with recorded.paused():
        for number, dtype, shape, stride, offset in call.results:
            if number is None:
                # of no numbers, and so in no block
                assert 0 in shape, shape
                results.append(torch.empty(shape, dtype=dtype, device="meta"))
                continue
            if number not in bases:
                num_elements = taken[number].num_bytes // dtype.itemsize
                bases[number] = torch.empty(num_elements, dtype=dtype, device="meta")
                recorded.adopt(bases[number], taken[number])
            results.append(bases[number].as_strided(shape, stride, offset))
    return _made_of(call.form, iter(results))
