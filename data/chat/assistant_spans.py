"""The characters of a rendered conversation that the assistant says, located by a trace of the
rendering and never by a search for their text.

Where a template has {% generation %} marks, the assistant says what they enclose. Otherwise a turn
of the assistant is the text that the template writes while its loop over the messages is at an
assistant message (data/chat/template_trace.py). A turn is learned

- from the end of the generation prompt on, the text that add_generation_prompt adds to the messages
  before it: the model is given this prompt at inference, and has to go on from there. Where a
  template ends in that prompt, it is known without rendering these messages
  (data/chat/template_ending.py), or after one rendering for all turns that follow messages of the
  same shape;
- to the end of the iteration, so that the token that ends the turn is learned, and with it an EOS
  that the template writes right after, before the next turn or at the end of the conversation.

A turn need not begin with that prompt: reasoning models are given an opening "<think>" that their
templates leave out of earlier turns. It is then learned from where the template writes the content
of a plain message, found by rendering it with a character in the content's place that occurs
nowhere else. Earlier turns of the same conversation may be written differently while they are the
last (reasoning is dropped, the tools move): renderings are compared up to a traced position only.

A turn that cannot be located in one of these ways is an error that says what to do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, TypeAlias

from data.chat.message_shapes import shape_until
from data.chat.template import TEMPLATE_ERRORS, ChatTemplate, Message, Rendering
from data.chat.template_trace import Event, absent_character

Span: TypeAlias = tuple[int, int]  # half-open range of characters

_WAY_OUT = (
    "give a template with {% generation %} marks (--chat-template), or learn every token with "
    "--train-on all"
)
_CORRECTION = "correct the template, or learn every token with --train-on all"


@dataclass(frozen=True)
class _Turn:
    """What a loop over the messages writes while it is at one of them."""

    loop: int
    message: Mapping[str, Any]
    index: int | None
    start: int
    end: int


def render_with_spans(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    targets: Sequence[int] | None = None,
    tools: Sequence[object] | None = None,
    variables: Mapping[str, object] | None = None,
    now: datetime | None = None,
) -> tuple[str, list[Span]]:
    """Render a conversation and locate the text of its assistant messages.

    Args:
        targets: indices of the assistant messages to locate, ascending; all of them if None.
        tools, variables, now: as ChatTemplate.render().

    Returns:
        The text, and its spans in order and apart. Without marks there is one for each target;
        marks are joined where they touch.

    Raises:
        ValueError: as ChatTemplate.render(), or the text of a message cannot be located.
    """
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    chosen = replies if targets is None else list(targets)
    # every rendering of this conversation sees the same clock
    seen = template.variables(tools=tools, variables=variables, now=now or datetime.now())
    is_marked = template.has_marks()
    # marks that are all learned need no owner, so that loops may be as they like
    with_loops = not is_marked or chosen != replies
    rendering = template.write_traced(messages, seen, with_loops=with_loops)
    if rendering is None:
        raise ValueError(
            f"{template.name} must write unchanged what its "
            f"{'loops over the messages' if with_loops else '{% generation %} marks'} enclose: got "
            f"a filter or test applied to it; {_CORRECTION if is_marked else _WAY_OUT}"
        )
    if is_marked:
        return rendering.text, _marked_spans(template, rendering, chosen, replies)
    turns = _reply_turns(template, rendering, replies)
    openings = _Openings(template, messages, seen, rendering)
    return rendering.text, [
        (openings.end(i, turns[i]), _end_of_reply(template, rendering.text, turns[i]))
        for i in chosen
    ]


def _turns(events: Sequence[tuple[int, Event]]) -> list[_Turn]:
    """The iterations of the loops over messages, in the order in which they start."""
    turns = []
    # the next iteration of each loop, or its end
    ends: dict[int, int] = {}
    for start, event in reversed(events):
        if event.kind == "turn":
            assert event.message is not None
            end = ends[event.loop]
            turns.append(_Turn(event.loop, event.message, event.index, start, end))
        ends[event.loop] = start
    return turns[::-1]


def _reply_turns(
    template: ChatTemplate, rendering: Rendering, replies: Sequence[int]
) -> dict[int, _Turn]:
    """The turn of each assistant message, by the message's index."""
    # a loop that prepares the messages writes nothing, or blanks
    written = [
        turn
        for turn in _turns(rendering.events)
        if turn.message["role"] == "assistant" and rendering.text[turn.start : turn.end].strip()
    ]
    is_apart = all(a.end <= b.start for a, b in pairwise(written))
    if len(written) != len(replies) or not is_apart:
        raise ValueError(
            f"{template.name} must write every assistant message once, in a loop over the "
            f"messages: got {len(written)} turns of the assistant for {len(replies)} messages; "
            f"{_WAY_OUT}"
        )
    for turn, i in zip(written, replies, strict=True):
        # a template that merges or reorders messages makes objects of its own
        message = rendering.messages[i]
        is_same = all(
            (turn.message.get(key) or "") == (message.get(key) or "")
            for key in ("content", "tool_calls")
        )
        if turn.message is not message and not is_same:
            raise ValueError(
                f"{template.name} must write the assistant messages in their order: got another "
                f"turn in the place of message {i}; {_WAY_OUT}"
            )
    return dict(zip(replies, written, strict=True))


class _Openings:
    """The text at the beginning of each turn that the model is given and does not learn."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        rendering: Rendering,
    ) -> None:
        self._template, self._messages, self._variables = template, messages, variables
        self._rendering = rendering
        self._ending = template.ending(variables)
        # of the last messages before a turn whose generation prompt is the template's ending
        self._shapes: set[object] = set()

    def end(self, index: int, turn: _Turn) -> int:
        """Where the text that the model is given ends, in the turn of an assistant message.

        Raises:
            ValueError: neither the generation prompt nor the opening of a plain message begins it.
        """
        written = self._rendering.text[turn.start : turn.end]
        opening = self._prompt(index, turn)
        if opening is None or not written.startswith(opening):
            opening = self._opening_of_content(index, turn.loop)
        if opening is not None and written.startswith(opening):
            return turn.start + len(opening)
        raise ValueError(
            f"{self._template.name} must begin the turn of assistant message {index} with its "
            f"generation prompt, or as that of a message with nothing but content: got "
            f"{written[:60]!r}; {_WAY_OUT}"
        )

    def _prompt(self, index: int, turn: _Turn) -> str | None:
        """What add_generation_prompt adds to the messages before a turn, None where that cannot be
        known."""
        # templates look at their first message without asking whether there is one
        if not index:
            return None
        shape = shape_until(self._messages, index)
        if self._ending is not None and (turn.index == index or shape in self._shapes):
            return self._ending
        prompt = self._rendered_prompt(index, self._rendering.text[: turn.start])
        # the messages before it add nothing to the ending because they are the last
        if prompt is not None and prompt == self._ending:
            self._shapes.add(shape)
        return prompt

    def _rendered_prompt(self, index: int, text_before: str) -> str | None:
        before = self._messages[:index]
        try:
            given = {**self._variables, "add_generation_prompt": True}
            prompt = self._template.attempt(before, given)
            if prompt.startswith(text_before):
                return prompt[len(text_before) :]
            # these messages read otherwise while they are the last
            unprompted = self._template.trace(before, self._variables)
        except TEMPLATE_ERRORS:
            return None
        ends = [turn.end for turn in _turns(unprompted.events)] if unprompted else []
        if unprompted is None or not ends or not prompt.startswith(unprompted.text[: max(ends)]):
            return None
        return prompt[max(ends) :]

    def _opening_of_content(self, index: int, loop: int) -> str | None:
        """What the turn of a message in this place, with nothing but content, begins with."""
        sentinel = absent_character(self._rendering.text)
        messages = list(self._messages)
        messages[index] = {"role": "assistant", "content": sentinel}
        try:
            rendering = self._template.trace(messages, self._variables)
        except TEMPLATE_ERRORS:
            return None
        if rendering is None or rendering.text.count(sentinel) != 1:
            return None
        position = rendering.text.index(sentinel)
        for turn in _turns(rendering.events):
            if turn.loop == loop and turn.start <= position < turn.end:
                return rendering.text[turn.start : position]
        return None


def _end_of_reply(template: ChatTemplate, text: str, turn: _Turn) -> int:
    """Where the turn ends: behind an EOS that the template writes right after it, if it does."""
    eos = template.special_tokens.get("eos_token")
    last, rest = turn.end, skip_blanks(text, turn.end)
    while last and text[last - 1].isspace():
        last -= 1
    if not eos or not text.startswith(eos, rest) or text.endswith(eos, 0, last):
        return turn.end
    return rest + len(eos)


def skip_blanks(text: str, position: int) -> int:
    """The position of the next character that is no whitespace, or the end of the text."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _marked_spans(
    template: ChatTemplate, rendering: Rendering, chosen: list[int], replies: list[int]
) -> list[Span]:
    """What the marks enclose, of the chosen messages."""
    spans: list[Span] = []
    opened = None
    for position, event in rendering.events:
        if event.kind == "open" and opened is None:
            opened = position
        elif event.kind == "close" and opened is not None:
            spans.append((opened, position))
            opened = None
        elif event.kind in ("open", "close"):
            raise ValueError(
                f"{template.name} must not nest {{% generation %}} marks: got such marks; "
                f"{_CORRECTION}"
            )
    if chosen != replies:
        turns = _reply_turns(template, rendering, replies)
        owners = [_owner(template, span, turns, rendering) for span in spans]
        spans = [s for s, owner in zip(spans, owners, strict=True) if owner in chosen]
    if not spans:
        raise ValueError(
            f"{template.name} must reach its {{% generation %}} marks at some assistant message "
            f"to be learned: got none in a conversation of roles "
            f"{', '.join(m['role'] for m in rendering.messages)}; {_CORRECTION}"
        )
    return _joined(spans)


def _owner(
    template: ChatTemplate, span: Span, turns: Mapping[int, _Turn], rendering: Rendering
) -> int:
    """The index of the message that a mark belongs to."""
    start, end = span
    for i, turn in turns.items():
        if turn.start <= start and end <= turn.end:
            return i
    last = len(rendering.messages) - 1
    # an EOS at the end of the conversation
    if last in turns and turns[last].end <= start:
        return last
    raise ValueError(
        f"{template.name} must set its {{% generation %}} marks in the turns of the assistant "
        "where only some of them are learned: got a mark elsewhere; "
        f"{_CORRECTION}"
    )


def _joined(spans: list[Span]) -> list[Span]:
    joined = spans[:1]
    for start, end in spans[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
