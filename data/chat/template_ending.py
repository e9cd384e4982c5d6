"""The generation prompt, where a chat template writes it behind its last loop over the messages.

Given the messages before an answer and add_generation_prompt, most templates write these messages
as in the whole conversation, and then the nodes behind their last loop, which read nothing but the
variables of the call. Where both hold, two renderings give the generation prompt of every answer:
one of the whole conversation and one of those nodes. To render the beginning of the conversation
for each answer takes a time that grows with the square of the conversation's length.

- The nodes behind the loop are judged by the template's syntax tree (ending_of).
- The text before them is judged while rendering. The template is given its messages as Watched,
  which notes how far the template has looked into them. If the template has not looked at a message
  or behind it when the loop comes to it, the text so far would be the same if the conversation
  ended before that message. A loop looks ahead by loop.last and the like, which the traced template
  notes as well.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, overload

from jinja2 import nodes

_PROMPT = "add_generation_prompt"
_BEHIND = ("index", "index0", "first", "previtem", "changed", "cycle", "depth", "depth0")
_OTHER_TEMPLATES = (nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)
_AHEAD = ("last", "nextitem", "length", "revindex", "revindex0")


class Sight:
    """How far into the messages a template has looked.

    Attributes:
        furthest: index of the furthest message that was asked for; the turns of the last loop do
            not count.
        current: index of the message that the last loop has come to.
    """

    def __init__(self) -> None:
        self.furthest = self.current = -1

    def look_at(self, index: int) -> None:
        self.furthest = max(self.furthest, index)

    def look_at_next(self) -> None:
        """Note a look at the message behind the current one, by loop.last and the like."""
        self.look_at(self.current)

    @property
    def is_clear(self) -> bool:
        """Whether nothing has looked at the message that the last loop has come to."""
        return self.furthest < self.current


class Watched(Sequence[Any]):
    """A list of messages, from some message on, that notes which of them are asked for.

    What a list can do and this class cannot is a TypeError: it never writes another text than a
    list.
    """

    def __init__(self, messages: list[Any], sight: Sight, start: int = 0) -> None:
        self._messages, self._sight, self._start = messages, sight, start

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            if index.stop is None and index.step is None and (index.start or 0) >= 0:
                return Watched(self._messages, self._sight, self._start + (index.start or 0))
            return self._all()[index]
        position = operator.index(index)
        if position < 0:
            return self._all()[position]
        self._sight.look_at(self._start + position)
        return self._messages[self._start + position]

    def _all(self) -> list[Any]:
        self._sight.look_at(len(self._messages))
        return self._messages[self._start :]

    def __len__(self) -> int:
        return len(self._all())

    def __bool__(self) -> bool:
        self._sight.look_at(self._start)
        return self._start < len(self._messages)

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._start, len(self._messages) + 1):
            self._sight.look_at(index)
            yield from self._messages[index : index + 1]

    def turns(self) -> Iterator[Any]:
        """The messages, for the last loop."""
        for index in range(self._start, len(self._messages) + 1):
            self._sight.current = index
            yield from self._messages[index : index + 1]

    def _refuse(self, *args: object) -> NoReturn:
        raise TypeError("the messages are watched")

    __eq__ = __str__ = __repr__ = _refuse
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()


@dataclass(frozen=True)
class Ending:
    """The last loop of a template, the nodes with which it looks ahead, and those behind it."""

    loop: nodes.For
    ahead: list[nodes.Getattr]
    behind: list[nodes.Node]


def ending_of(tree: nodes.Template) -> Ending | None:
    """The ending of a template, None where the ending may depend on messages, or the prompt on
    another part of the template."""
    loops = [i for i, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    if not loops or any(tree.find_all(_OTHER_TEMPLATES)):
        return None
    loop = tree.body[loops[-1]]
    behind = nodes.Template(tree.body[loops[-1] + 1 :])
    before = nodes.Template([n for n in tree.body[: loops[-1] + 1] if not _is_default(n)])
    assert isinstance(loop, nodes.For)
    of_loop = list(_of_loop(loop))
    attributes = [n for n in of_loop if isinstance(n, nodes.Getattr) and _is_loop(n.node)]
    is_plain = (
        not loop.recursive
        and not loop.else_
        # a loop that is looked at in another way may be looked at from anywhere
        and len(attributes) == sum(map(_is_loop, of_loop))
        and all(n.attr in (*_BEHIND, *_AHEAD) for n in attributes)
    )
    written = {n.name for n in before.find_all(nodes.Name) if n.ctx != "load"}
    written |= {n.name for n in tree.find_all(nodes.Macro)}
    read = {n.name for n in behind.find_all(nodes.Name)}
    if (
        not is_plain
        or any(n.name == _PROMPT for n in before.find_all(nodes.Name))
        or any(n.ctx != "load" for n in behind.find_all(nodes.Name))
        or read & (written | {"messages", "loop", "self"})
    ):
        return None
    return Ending(loop, [n for n in attributes if n.attr in _AHEAD], behind.body)


def _is_default(node: nodes.Node) -> bool:
    """Whether a node only gives add_generation_prompt a value if it has none: here it has one."""
    is_defined = nodes.Test(nodes.Name(_PROMPT, "load"), "defined", [], [], None, None)
    if not isinstance(node, nodes.If) or node.elif_ or node.else_:
        return False
    return node.test == nodes.Not(is_defined)


def _is_loop(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "loop"


def _of_loop(loop: nodes.For) -> Iterator[nodes.Node]:
    """The nodes to which "loop" is this loop."""
    rest: list[nodes.Node] = list(loop.body)
    while rest:
        node = rest.pop()
        yield node
        outside = ("iter", "test", "else_") if isinstance(node, nodes.For) else None
        rest += node.iter_child_nodes(only=outside)
