"""A trace of a rendering: which part of the text each loop and each {% generation %} mark wrote.

A copy of the template, rewritten as a syntax tree, also writes a marker where an iteration of a
loop over messages begins, where such a loop ends, and around what {% generation %} encloses. A
marker is a number between two characters that occur nowhere in the text, so it lands where the
text of its iteration does, however that text reaches the output: through macros, {% set %} blocks
or calls. Whether a loop runs over messages is decided while rendering, by its values and never by
names: it does if they are objects with a role.

The reader (ChatTemplate.trace) takes the markers out again. A marker that goes straight to the
output is seen by nothing on its way. A marker that the template collects first, in a macro, a
{% set %} block or a {% filter %}, may be filtered or tested: the text without markers is then
compared with the plain rendering, and a template in which markers change anything is refused.

Left out: recursive loops, which are not marked.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.visitor

from data.chat.template_ending import Ending, Sight, Watched, ending_of

# the variable under which a trace travels to the marked places of the template
TRACE = "trace_of_this_rendering"


def absent_character(text: str) -> str:
    # private use: no template means anything by them, and none is whitespace to be trimmed
    private_use = map(chr, itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)))
    return next(character for character in private_use if character not in text)


# the first and last character of a marker, where the text is not known yet
MARK = absent_character("")


@dataclass(frozen=True)
class Event:
    """One marker: "turn" and "end" of the loop with this number, "open" and "close" of a mark.

    Attributes:
        index: of the message at a turn, if the text before the turn would be the same without the
            messages from this one on (data/chat/template_ending.py), else None.
    """

    kind: str
    loop: int = -1
    message: Mapping[str, Any] | None = None
    index: int | None = None


class Trace:
    """The events of one rendering, and the markers that hold their places in its text.

    Attributes:
        is_collected: a marker was in text that the template collected before it wrote it.
    """

    def __init__(self, character: str, with_loops: bool) -> None:
        self._character = character
        self._with_loops = with_loops
        self._events: list[Event] = []
        self._running: set[int] = set()
        self.is_collected = False
        self.sight = Sight()

    def _turn(
        self, loop: int, is_last: bool, is_collected: bool, values: tuple[object, ...]
    ) -> str:
        message = next((v for v in values if isinstance(v, Mapping) and "role" in v), None)
        if message is None or not self._with_loops:
            return ""
        self._running.add(loop)
        index = self.sight.current if is_last and self.sight.is_clear else None
        return self._marker(Event("turn", loop, message, index), is_collected)

    def _end(self, loop: int) -> str:
        if loop not in self._running:
            return ""
        self._running.remove(loop)
        # collected with the turns of its loop
        return self._marker(Event("end", loop), self.is_collected)

    def _marker(self, event: Event, is_collected: bool) -> str:
        self._events.append(event)
        self.is_collected |= is_collected
        return f"{self._character}{len(self._events) - 1}{self._character}"

    def read(self, marked: str) -> tuple[str, list[tuple[int, Event]]]:
        """The text without its markers, and the position of each in it, in their order."""
        # every second piece is a marker's number
        pieces = re.split(f"{self._character}([0-9]+){self._character}", marked)
        places, position = [], 0
        for text, number in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            position += len(text)
            if number is not None:
                places.append((position, self._events[int(number)]))
        return "".join(pieces[::2]), places

    def read_alone(self, marked: str) -> tuple[str, list[tuple[int, Event]]] | None:
        """As read(), or None where only a plain rendering can tell the text."""
        # a text that has the character itself may have a part that looks like a marker
        if self.is_collected or marked.count(self._character) != 2 * len(self._events):
            return None
        return self.read(marked)


class TraceExtension(jinja2.ext.Extension):
    """Parses {% generation %} body {% endgeneration %}, and writes the markers if there is a
    trace."""

    tags = {"generation"}  # noqa: RUF012, the attribute is Jinja's

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def output(self, method: str, line: int, *values: jinja2.nodes.Expr) -> jinja2.nodes.Node:
        call = self.call_method(method, list(values))
        return jinja2.nodes.Output([call]).set_lineno(line)

    @jinja2.pass_context
    def _mark(
        self,
        context: jinja2.runtime.Context,
        is_collected: bool = False,
        *,
        caller: Callable[[], str],
    ) -> str:
        trace, body = context.get(TRACE), caller()
        if trace is None:
            return body
        opening, closing = (trace._marker(Event(kind), is_collected) for kind in ("open", "close"))
        return f"{opening}{body}{closing}"

    @jinja2.pass_context
    def _turn(
        self,
        context: jinja2.runtime.Context,
        loop: int,
        is_last: bool,
        is_collected: bool,
        *values: object,
    ) -> str:
        return context[TRACE]._turn(loop, is_last, is_collected, values)

    @jinja2.pass_context
    def _end(self, context: jinja2.runtime.Context, loop: int) -> str:
        return context[TRACE]._end(loop)

    def _turns(self, values: object) -> object:
        return values.turns() if isinstance(values, Watched) else values

    @jinja2.pass_context
    def _ahead(self, context: jinja2.runtime.Context, value: object) -> object:
        context[TRACE].sight.look_at_next()
        return value


def compile_traced(environment: jinja2.Environment, template: str) -> jinja2.Template:
    """Compile a template so that its rendering needs a Trace as TRACE and writes its markers."""
    tree = environment.parse(template)
    extension = environment.extensions[TraceExtension.identifier]
    assert isinstance(extension, TraceExtension)
    _LoopMarker(extension, ending_of(tree)).visit(tree)
    tree.set_environment(environment)
    return environment.from_string(tree)


def compile_ending(environment: jinja2.Environment, template: str) -> jinja2.Template | None:
    """Compile what a template writes behind its last loop, None where that cannot be known."""
    ending = ending_of(environment.parse(template))
    if ending is None:
        return None
    tree = jinja2.nodes.Template(ending.behind, lineno=1)
    tree.set_environment(environment)
    return environment.from_string(tree)


def has_generation_marks(environment: jinja2.Environment, template: str) -> bool:
    calls = environment.parse(template).find_all(jinja2.nodes.ExtensionAttribute)
    return any(call.identifier == TraceExtension.identifier for call in calls)


class _LoopMarker(jinja2.visitor.NodeTransformer):
    """Puts a marker at the head of every loop's body and behind every loop.

    Not at the end of the body: {% continue %} and {% break %} would leave it out.
    """

    def __init__(self, extension: TraceExtension, ending: Ending | None) -> None:
        self._extension = extension
        self._last_loop = ending and ending.loop
        self._ahead = {id(node) for node in ending.ahead} if ending else set()
        self._num_loops = 0
        self._is_collected = False

    def _visit_collected(self, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        before, self._is_collected = self._is_collected, True
        self.generic_visit(node)
        self._is_collected = before
        return node

    visit_Macro = visit_FilterBlock = visit_AssignBlock = _visit_collected

    def visit_CallBlock(self, node: jinja2.nodes.CallBlock) -> jinja2.nodes.Node:
        if getattr(node.call.node, "identifier", None) == TraceExtension.identifier:
            node.call.args.append(jinja2.nodes.Const(self._is_collected))
        return self._visit_collected(node)

    def visit_Getattr(self, node: jinja2.nodes.Getattr) -> jinja2.nodes.Expr:
        self.generic_visit(node)
        return self._extension.call_method("_ahead", [node]) if id(node) in self._ahead else node

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        self.generic_visit(node)
        if node.recursive:
            return node
        loop = jinja2.nodes.Const(self._num_loops)
        self._num_loops += 1
        targets = [node.target, *node.target.find_all(jinja2.nodes.Name)]
        names = [jinja2.nodes.Name(t.name, "load") for t in targets if hasattr(t, "name")]
        is_last, is_collected = node is self._last_loop, self._is_collected
        known = map(jinja2.nodes.Const, (is_last, is_collected))
        turn = self._extension.output("_turn", node.lineno, loop, *known, *names)
        if is_last:
            assert isinstance(node.iter, jinja2.nodes.Expr)
            node.iter = self._extension.call_method("_turns", [node.iter])
        node.body.insert(0, turn)
        return [node, self._extension.output("_end", node.lineno, loop)]
