"""The turns of a chat template: what it writes around each message, found from what it renders.

Most templates write each message between two fixed texts that its role decides, and a fixed text
that opens the answer:

    begin | before system | text | after | before user | text | after | ... | opens the answer

Such a template can be written in another template language without being read: probe conversations
are rendered, the fixed texts are cut out of them, and conversations put together from these are
compared with renderings of the template. Where one differs, the template has no turns.

The system's text may also stand inside a user's turn: the first (Llama 2) or the last (Mistral).
A system message that the template refuses goes there too, in front of the first user's text.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import product
from typing import Literal

from data.chat.template import TEMPLATE_ERRORS, ChatTemplate, Message
from foreign.guest import in_guest

# texts of probes: words that no template writes by itself, none a part of another
_SYSTEM, _USERS, _ANSWERS = "Qsystem", ("Quser", "Qnext", "Qlast"), ("Qanswer", "Qmore")
# of two days: a template that writes the date has no fixed texts
_DAYS = (datetime(2024, 2, 3), datetime(2031, 12, 25))

Turn = tuple[str, str]


@dataclass(frozen=True)
class ChatTurns:
    """What a template writes around the messages of a conversation.

    Attributes:
        begin: before all.
        user, assistant: before and behind a message's text.
        system: the same; with the system's text in a user's turn, before it and between the two.
        place: where the system's text stands.
        default_system: what is written where a conversation has no system message.
        answer: what opens the answer.
    """

    begin: str
    user: Turn
    assistant: Turn
    system: Turn
    place: Literal["turn", "first user", "last user"]
    default_system: str
    answer: str

    def write(self, messages: Sequence[Message]) -> str:
        """Write a conversation up to where the answer begins."""
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        rest = [m for m in messages if m["role"] != "system"]
        users = [i for i, m in enumerate(rest) if m["role"] == "user"]
        text = self.begin
        if system is None:
            text += self.default_system
        elif self.place == "turn":
            text += self.system[0] + system + self.system[1]
        for i, message in enumerate(rest):
            before, after = getattr(self, message["role"])
            text += before
            holder = users[0] if self.place == "first user" else users[-1]
            if system is not None and self.place != "turn" and i == holder:
                text += self.system[0] + system + self.system[1]
            text += message["content"] + after
        return text + self.answer


def find_turns(template: ChatTemplate) -> ChatTurns | None:
    """Find the turns of a template; None where it does not write fixed texts around messages."""
    return in_guest(lambda: _find_turns(template), template.name)


def _find_turns(template: ChatTemplate) -> ChatTurns | None:
    try:
        return next((t for t in _candidates(template) if _writes_as(t, template)), None)
    except TEMPLATE_ERRORS:
        return None


def begins_with(template: ChatTemplate, text: str) -> bool:
    """Whether a template begins conversations with a text, such as BOS."""

    def find() -> bool:
        with suppress(*TEMPLATE_ERRORS):
            return _render(template, _conversation(None, 1)).startswith(text)
        return False

    return in_guest(find, template.name)


class _NoTurns(Exception):
    """A rendering does not have the texts of its messages once each, in their order."""


def _conversation(system: str | None, num_users: int, ends_with_answer: bool = False):
    messages: list[Message] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for i in range(num_users):
        messages.append({"role": "user", "content": _USERS[i]})
        if i < num_users - 1 or ends_with_answer:
            messages.append({"role": "assistant", "content": _ANSWERS[i]})
    return messages


def _render(
    template: ChatTemplate, messages: Sequence[Message], opens_answer: bool = True, day: int = 0
) -> str:
    seen = template.variables(tools=None, variables=None, now=_DAYS[day])
    return template.attempt(messages, seen | {"add_generation_prompt": opens_answer})


def _fixed_texts(text: str, messages: Sequence[Message]) -> list[str]:
    """Cut the texts of messages out of a rendering: what is before, between and behind them."""
    pieces = []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found or message["content"] in text:
            raise _NoTurns
        pieces.append(before)
    return [*pieces, text]


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise _NoTurns
    return text[: len(text) - len(end)]


def _without_beginning(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise _NoTurns
    return text[len(beginning) :]


def _candidates(template: ChatTemplate) -> Iterator[ChatTurns]:
    """Cut the turns out of short conversations.

    Where no answer is asked for, a template may write EOS behind the last message: it is a part of
    the turn, or it is not.
    """
    for end in ("", template.special_tokens.get("eos_token")):
        if end is not None:
            with suppress(_NoTurns):
                yield from _candidates_before(end, template)


def _candidates_before(end: str, template: ChatTemplate) -> Iterator[ChatTurns]:
    def fixed(*arguments, opens_answer: bool = True) -> list[str]:
        messages = _conversation(*arguments)
        return _fixed_texts(_render(template, messages, opens_answer), messages)

    opening, *between, closing = fixed(None, 2)
    after_user = fixed(None, 1, opens_answer=False)[-1].removesuffix(end)
    after_answer = fixed(None, 1, True, opens_answer=False)[-1].removesuffix(end)
    user = (_without_beginning(between[1], after_answer), after_user)
    assistant = (_without_beginning(between[0], after_user), after_answer)
    begin = _without_end(opening, user[0])
    plain = ChatTurns(
        begin,
        user,
        assistant,
        ("", "\n\n"),
        "first user",
        "",
        _without_beginning(closing, after_user),
    )
    try:
        before, behind = fixed(_SYSTEM, 1)[:2]
    except TEMPLATE_ERRORS:
        # the template refuses a system message
        yield plain
        return
    if before.startswith(opening):
        inside = (before[len(opening) :], behind)
        yield replace(plain, system=inside)
        yield replace(plain, system=inside, place="last user")
    if behind.endswith(user[0]):
        system = (before, _without_end(behind, user[0]))
        yield from _own_turns(replace(plain, system=system, place="turn"), template)


def _own_turns(turns: ChatTurns, template: ChatTemplate) -> Iterator[ChatTurns]:
    """Divide what is before the system's text, and what is there without it."""
    before, after = turns.system
    begins = (turns.begin, template.special_tokens.get("bos_token") or "", "")
    for begin in begins:
        if before.startswith(begin) and turns.begin.startswith(begin):
            default = turns.begin.removeprefix(begin)
            system = (before.removeprefix(begin), after)
            yield replace(turns, begin=begin, system=system, default_system=default)


def _writes_as(turns: ChatTurns, template: ChatTemplate) -> bool:
    """Whether the turns put together are what the template renders, on both days."""
    for system, num_users, day in product((None, _SYSTEM), (1, 2, 3), (0, 1)):
        messages = _conversation(system, num_users)
        try:
            rendered = _render(template, messages, day=day)
        except TEMPLATE_ERRORS:
            if system is None:
                return False
            continue
        if rendered != turns.write(messages):
            return False
    return True
