"""A conversation as text, exactly as transformers' apply_chat_template(tokenize=False) writes it.

The Jinja environment is the same (data/chat/environment.py). A template sees plain JSON, the
tokenizer's special tokens and the variables of the call. Three things differ:

- An error says which template, where it came from, which message it stumbled over, and why.
- A content is given as a list of one part to a template that writes no other one.
- The text can be traced (data/chat/template_trace.py): which part was written for which message.
  From the trace data/chat/assistant_spans.py finds what the assistant says.

Left out: images and other parts that are not text, and functions in place of tools' JSON schemas.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2

from data.chat import environment
from data.chat.template_ending import Watched
from data.chat.template_trace import MARK, TRACE, Event, Trace, absent_character

Message = dict[str, Any]
# the errors of template code, Jinja's own and others: 'a' + none, 1 / 0, endless recursion, a
# text beyond the memory of a confined process (foreign/guest.py)
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
_LONGEST_REASON = 500
# the variables that a call itself gives, which none of its own may replace
GIVEN_VARIABLES = ("messages", "tools", "add_generation_prompt", "strftime_now")
# the names under which data sets keep a message's reasoning; templates read the first of them
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Rendering:
    """A traced text: its events with their positions, and the messages as the template saw
    them."""

    text: str
    events: list[tuple[int, Event]]
    messages: list[Message]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, its name in errors, and the special tokens that it may write.

    Attributes:
        special_tokens: "bos_token" and the like to the token. One that is absent is undefined to
            the template, which renders as nothing.
    """

    text: str
    name: str
    special_tokens: Mapping[str, str]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[object] | None = None,
        variables: Mapping[str, object] | None = None,
        now: datetime | None = None,
    ) -> str:
        """Render a conversation as apply_chat_template(tokenize=False) does.

        Args:
            tools: JSON schemas of the functions that the model may call.
            variables: other variables of the template: documents, enable_thinking.
            now: the time that strftime_now formats; the time of the call if None.

        Raises:
            ValueError: the template is not valid, or it refuses the conversation; the message says
                which template, where, and its reason.
        """
        seen = self.variables(tools=tools, variables=variables, now=now)
        return self.write(messages, seen | {"add_generation_prompt": add_generation_prompt})

    def variables(
        self,
        *,
        tools: Sequence[object] | None,
        variables: Mapping[str, object] | None,
        now: datetime | None,
    ) -> dict[str, Any]:
        """What the template sees besides the messages, without a prompt for the assistant."""
        return {
            "documents": None,
            **self.special_tokens,
            **(variables or {}),
            "tools": tools,
            "add_generation_prompt": False,
            "strftime_now": (now or datetime.now()).strftime,
        }

    def write(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """Render with all variables of the template; raises the same errors as render()."""
        with self._refusing(messages, variables):
            return self.attempt(messages, variables)

    def write_traced(
        self, messages: Sequence[Message], variables: Mapping[str, Any], *, with_loops: bool
    ) -> "Rendering | None":
        """As trace(), with the errors of write()."""
        with self._refusing(messages, variables):
            return self.trace(messages, variables, with_loops=with_loops)

    @contextlib.contextmanager
    def _refusing(
        self, messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> Iterator[None]:
        self.check_syntax()
        try:
            yield
        except TEMPLATE_ERRORS as error:
            place = self._place_of(error, messages, variables)
            raise ValueError(
                f"the conversation must suit {self.name}: {place} the template raised "
                f"{_reason(error)!r}; correct the conversation or choose another template with "
                "--chat-template"
            ) from error

    def attempt(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """Render, and let one of TEMPLATE_ERRORS pass as it is."""
        return environment.compiled(self.text).render(messages=self._seen(messages), **variables)

    def _seen(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template can read them."""
        takes_parts = _takes_parts(self.text, tuple(self.special_tokens.items()))
        return [_as_seen(message, takes_parts) for message in messages]

    def trace(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        with_loops: bool = True,
    ) -> Rendering | None:
        """Render and say where each message's turn and each {% generation %} mark is.

        Args:
            with_loops: False leaves the turns out.

        Returns:
            None where the template changes the text inside its loops or marks before writing it.

        Raises one of TEMPLATE_ERRORS where attempt() does.
        """
        seen = self._seen(messages)
        marked = environment.traced(self.text)
        trace = Trace(MARK, with_loops)
        watched = Watched(seen, trace.sight) if environment.ending(self.text) else seen
        with contextlib.suppress(*TEMPLATE_ERRORS):
            found = trace.read_alone(marked.render(messages=watched, **{**variables, TRACE: trace}))
            if found is not None:
                return Rendering(*found, seen)
        text = self.attempt(messages, variables)
        trace = Trace(absent_character(text), with_loops)
        try:
            found = trace.read(marked.render(messages=seen, **{**variables, TRACE: trace}))
        except TEMPLATE_ERRORS:
            return None
        return Rendering(*found, seen) if found[0] == text else None

    def ending(self, variables: Mapping[str, Any]) -> str | None:
        """What is written behind the last loop where a prompt for the assistant is asked for, None
        where that is not the same for all conversations."""
        template = environment.ending(self.text)
        if template is None:
            return None
        try:
            return template.render(**{**variables, "add_generation_prompt": True})
        except TEMPLATE_ERRORS:
            return None

    def check_syntax(self) -> None:
        """Raise ValueError if the template is not Jinja."""
        try:
            environment.compiled(self.text)
        # Jinja translates a template to Python, which refuses blocks nested too deep
        except (jinja2.TemplateError, MemoryError, RecursionError, SyntaxError) as error:
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ValueError(
                f"{self.name} must be valid Jinja: got {line}{_reason(error)}; correct it or "
                "choose another with --chat-template"
            ) from error

    def has_marks(self) -> bool:
        """Whether the template has {% generation %} marks."""
        self.check_syntax()
        return environment.has_marks(self.text)

    def clock(self, now: datetime) -> list[str]:
        """What the template can read of the time: the texts that it formats it as, or all of it
        where they cannot be told from the template."""
        formats = environment.clock_formats(self.text)
        return [now.isoformat()] if formats is None else [now.strftime(f) for f in formats]

    def reads(self, name: str) -> bool:
        """Whether the template names a field: message.name or message['name']."""
        return name in environment.fields_read(self.text)

    def check_variables(self, names: Sequence[str]) -> None:
        """Raise ValueError if the template has no use for a variable: it would be ignored."""
        self.check_syntax()
        unread = [name for name in names if name not in environment.names_read(self.text)]
        if unread:
            raise ValueError(
                f"{self.name} must read what the record gives it: got no use of "
                f"{', '.join(unread)} in it; delete that from the data, or choose another template "
                "with --chat-template"
            )

    def _place_of(
        self, error: Exception, messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> str:
        # the culprit ends the shortest beginning that is refused for the same reason
        if not messages:
            return "without messages"
        index = len(messages) - 1
        for count in range(1, len(messages)):
            try:
                self.attempt(messages[:count], variables)
            except TEMPLATE_ERRORS as other:
                if str(other) == str(error):
                    index = count - 1
                    break
        return f"at message {index} (role {messages[index]['role']!r})"


def _reason(error: Exception) -> str:
    # a template may raise a text of any length
    return str(error)[:_LONGEST_REASON] or type(error).__name__


@functools.lru_cache(maxsize=16)
def _takes_parts(template: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template writes a content that is a list of parts, and not one that is a text.

    Templates of models for images may, as LLaVA's do: of a text they write nothing.
    """
    if "text" not in environment.fields_read(template):
        return False
    letters = "quatrain"
    parts = [{"type": "text", "text": letters}]
    whole = (str(parts), json.dumps(parts))
    variables = {"documents": None, **dict(special_tokens), "tools": None}
    variables |= {"add_generation_prompt": False, "strftime_now": datetime.now().strftime}
    is_written = []
    for content in (letters, parts):
        messages = [{"role": "user", "content": content}]
        try:
            text = environment.compiled(template).render(messages=messages, **variables)
        except TEMPLATE_ERRORS:
            text = ""
        # a template may write in capitals, or the list as it is
        is_written.append(letters in text.lower() and not any(each in text for each in whole))
    return is_written == [False, True]


def _as_seen(message: Message, takes_parts: bool) -> Message:
    """The message as transformers gives it to a template: no nulls, reasoning under one name.

    Args:
        takes_parts: the content as a list of one part.
    """
    seen = {key: value for key, value in message.items() if value is not None}
    if takes_parts and isinstance(content := seen.get("content"), str):
        seen["content"] = [{"type": "text", "text": content}]
    reasoning = next((seen[name] for name in REASONING_FIELDS if name in seen), None)
    if reasoning is not None:
        seen = {"thinking": reasoning, **seen, "reasoning_content": reasoning}
    return seen
