"""A conversation as text, and which characters of it each assistant message contributes.

render() gives the text that transformers' apply_chat_template(tokenize=False) gives: the same
sandboxed Jinja environment, globals and filters. What the model must learn is found without ever
searching the text for a message's content, which fails on repeated, trimmed and empty messages:

- A template with {% generation %} marks says it: the marked ranges are recorded while rendering,
  by marker characters that the block tag writes around its body.
- Otherwise by differential rendering. The conversation is rendered again with the content of one
  assistant message replaced by a sentinel, a single character that occurs nowhere else:

      text     = head + contribution + tail
      rendered = head + sentinel     + tail

  The sentinel's position is where the contribution starts, the two lengths say where it ends, and
  both head and tail must be equal character by character. A sentinel in place of the content,
  rather than at its two ends, is one rendering instead of two and needs no special case for
  templates that trim: what is trimmed is not contributed.

In both ways the renderings must agree exactly outside of the characters that were put there; where
a template's wording depends on a message's content they do not, and that is an error, never a
guess.

Left out: documents (retrieval templates), images and other parts that are not text.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]
Span = tuple[int, int]  # half-open range of characters

BUNDLED_TEMPLATES = Path(__file__).parent / "templates"

# the variable under which the marker characters travel to the block tag
_MARKS = "generation_mark_characters"
# what template code can raise besides Jinja's own errors: 'a' + none, 1 / 0, endless recursion
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
# the names under which data sets keep a message's reasoning, the one that templates read first
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_WAY_OUT = "use a template with {% generation %} marks, or learn every token with --train-on all"


def load_template(name_or_path: str) -> str:
    """Text of a bundled template, by name, or of a .jinja file, by path.

    Raises:
        ValueError: neither a bundled name nor a file, or the file is not a UTF-8 Jinja template.
    """
    bundled = {p.stem: p for p in sorted(BUNDLED_TEMPLATES.glob("*.jinja"))}
    path = bundled.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise ValueError(
            f"--chat-template must be a bundled template ({', '.join(bundled)}) or the path of a "
            f".jinja file: got {name_or_path!r}"
        )
    try:
        template = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat-template must be UTF-8: got {path} with {error}") from error
    _compile(template)
    return template


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    bos_token: str | None,
    eos_token: str | None,
    tools: Sequence[object] | None = None,
    now: datetime | None = None,
) -> str:
    """Render a conversation as transformers' apply_chat_template(tokenize=False) does.

    Args:
        tools: JSON schemas of the functions that the model may call.
        now: what strftime_now formats; the time of the call if None.

    Raises:
        ValueError: the template is not valid, or it refuses the conversation; the message says
            where.
    """
    variables = _variables(bos_token, eos_token, tools, now) | {
        "add_generation_prompt": add_generation_prompt
    }
    return _render(template, messages, variables)


def render_with_spans(
    template: str,
    messages: Sequence[Message],
    *,
    bos_token: str | None,
    eos_token: str | None,
    targets: Sequence[int] | None = None,
    tools: Sequence[object] | None = None,
    now: datetime | None = None,
) -> tuple[str, list[Span]]:
    """Render a conversation and locate what its assistant messages contribute to the text.

    Args:
        targets: indices of the assistant messages to locate, ascending; all of them if None.

    Returns:
        The text and its spans in order, one per target. With {% generation %} marks a span is what
        the template marks, usually the content and the token that ends the turn; without, the
        content alone.

    Raises:
        ValueError: as render(), or the contribution of a message cannot be located.
    """
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    chosen = replies if targets is None else list(targets)
    # every rendering of this conversation sees the same clock
    variables = _variables(bos_token, eos_token, tools, now or datetime.now())
    text = _render(template, messages, variables)
    if _has_marks(template):
        spans = _marked_spans(template, messages, variables, text)
        if chosen == replies:
            return text, spans
        if len(spans) != len(replies):
            raise ValueError(
                "a chat template must mark each assistant message once where only some of them are "
                f"learned: got {len(spans)} marks for {len(replies)} messages; {_WAY_OUT}"
            )
        return text, [spans[replies.index(i)] for i in chosen]
    return text, [_contribution(template, messages, i, variables, text) for i in chosen]


def _variables(
    bos_token: str | None,
    eos_token: str | None,
    tools: Sequence[object] | None,
    now: datetime | None,
) -> dict[str, Any]:
    named = {"bos_token": bos_token, "eos_token": eos_token}
    return {
        "tools": tools,
        "documents": None,
        "add_generation_prompt": False,
        "strftime_now": (now or datetime.now()).strftime,
        # a token that the checkpoint lacks is undefined to its template, which renders as nothing
        **{name: token for name, token in named.items() if token is not None},
    }


def _render(template: str, messages: Sequence[Message], variables: dict[str, Any]) -> str:
    compiled = _compile(template)

    def attempt(count: int) -> str:
        return compiled.render(messages=[_as_seen(m) for m in messages[:count]], **variables)

    try:
        return attempt(len(messages))
    except _TEMPLATE_ERRORS as error:
        # the culprit ends the shortest beginning that is refused for the same reason
        index = len(messages) - 1
        for count in range(1, len(messages)):
            try:
                attempt(count)
            except _TEMPLATE_ERRORS as other:
                if str(other) == str(error):
                    index = count - 1
                    break
        where = (
            f"at message {index} (role {messages[index]['role']!r})"
            if messages
            else "without messages"
        )
        raise ValueError(
            f"the conversation must suit the chat template: {where} the template raised "
            f"{str(error) or type(error).__name__!r}; correct the conversation or choose another "
            "template with --chat-template"
        ) from error


def _as_seen(message: Message) -> Message:
    """The message as transformers shows it to a template: no nulls, reasoning under one name."""
    seen = {key: value for key, value in message.items() if value is not None}
    reasoning = next((seen[name] for name in _REASONING_FIELDS if name in seen), None)
    if reasoning is not None:
        seen = {"thinking": reasoning, **seen, "reasoning_content": reasoning}
    return seen


def _marked_spans(
    template: str, messages: Sequence[Message], variables: dict[str, Any], text: str
) -> list[Span]:
    opening, closing = _absent_characters(text, 2)
    marked = _render(template, messages, variables | {_MARKS: (opening, closing)})
    spans, start, length = [], None, 0
    for piece in re.split(f"([{opening}{closing}])", marked):
        if piece == opening and start is None:
            start = length
        elif piece == closing and start is not None:
            spans.append((start, length))
            start = None
        elif piece in (opening, closing):
            raise ValueError(
                "a chat template's {% generation %} marks must not be nested or repeated: got "
                "such marks; correct the template or learn every token with --train-on all"
            )
        else:
            length += len(piece)
    if marked.translate({ord(opening): None, ord(closing): None}) != text or start is not None:
        raise ValueError(
            "a chat template must write what its {% generation %} marks enclose unchanged: got "
            "a filter or test applied to marked text; move the marks outwards or learn every "
            "token with --train-on all"
        )
    if not spans:
        raise ValueError(
            "a chat template's {% generation %} marks must be reached by some assistant "
            "message: got none in a conversation of roles "
            f"{', '.join(m['role'] for m in messages)}; correct the template or learn every token "
            "with --train-on all"
        )
    return spans


def _contribution(
    template: str, messages: Sequence[Message], index: int, variables: dict[str, Any], text: str
) -> Span:
    (sentinel,) = _absent_characters(text, 1)
    message = messages[index]

    def with_message(changed: Message) -> str | None:
        try:
            return _render(
                template, [*messages[:index], changed, *messages[index + 1 :]], variables
            )
        except ValueError:
            return None

    for name in [name for name in message if name not in ("role", "content")]:
        without = {key: value for key, value in message.items() if key != name}
        # tool calls count even where the template ignores them: they would be lost
        if message[name] and (name == "tool_calls" or with_message(without) != text):
            raise ValueError(
                f"assistant message {index} must hold nothing but its content where the chat "
                f"template has no {{% generation %}} marks: got {name!r}, whose text cannot be "
                f"located; {_WAY_OUT}"
            )
    changed = with_message({**message, "content": sentinel})
    if changed is None or changed.count(sentinel) != 1:
        found = "refuses" if changed is None else f"writes {changed.count(sentinel)} times"
        raise ValueError(
            f"the chat template must write the content of assistant message {index} once, "
            f"whatever it is: got one that {found} a single character there; {_WAY_OUT}"
        )
    head, tail = changed.split(sentinel)
    start, end = len(head), len(text) - len(tail)
    if start > end or not (text.startswith(head) and text.endswith(tail)):
        raise ValueError(
            "the chat template must write the same text around an assistant message whatever its "
            f"content: got one whose text around message {index} depends on it; {_WAY_OUT}"
        )
    return start, end


def _absent_characters(text: str, count: int) -> list[str]:
    # private use: no template means anything by them, and none is whitespace to be trimmed
    private_use = map(chr, itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)))
    return list(itertools.islice((c for c in private_use if c not in text), count))


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} body {% endgeneration %}: the body, between marker characters if given."""

    tags = {"generation"}  # noqa: RUF012, the attribute is Jinja's

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _mark(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        opening, closing = context.get(_MARKS) or ("", "")
        return f"{opening}{caller()}{closing}"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ValueError(
            f"the chat template must be valid Jinja: got {line}{error}; correct it or choose "
            "another with --chat-template"
        ) from error


@functools.lru_cache(maxsize=8)
def _has_marks(template: str) -> bool:
    calls = _environment().parse(template).find_all(jinja2.nodes.ExtensionAttribute)
    return any(call.identifier == _GenerationTag.identifier for call in calls)


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment
