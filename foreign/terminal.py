"""Foreign text on its way to a terminal or a log.

A terminal obeys the text that it shows: ESC begins a command, a carriage return goes back over the
line, U+202E reverses the rest. And somebody else wrote most of the text that a program shows:
answers, names of files and fields, tokens, templates, messages of the hub, quotes in errors.
`guard_output` puts a filter before stdout and stderr. So everything that is printed, also a
library's warning and a traceback, is escaped, has no secrets, and is not too long for a terminal.
"""

import logging
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO, cast

# characters of a message, and of a text that is written at once
MOST_OF_A_MESSAGE = 2_000
MOST_AT_ONCE = 1 << 16
# complaints that are listed
MOST_COMPLAINTS = 50

_HIDDEN = "***"
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
# shorter secrets would be found in ordinary words
_SECRET_LENGTH = 8
# user name and password of an address, up to the last @ before its path; where a Path was made of
# the address there is one slash only
_USER_INFO = re.compile(r"(:/{1,2})[^/\s]+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}|(?<=Bearer )[^\s'\"]+")

# tqdm's way from one bar to another
_UP = re.compile("(?:\x1b\\[A)+")


class AsIs(str):
    """Text whose foreign parts are escaped already; the rest, such as colours, passes unchanged."""


def escaped(text: str, kept: str = "\n\t") -> str:
    """Escape characters that a terminal would obey or not show, as Python does: `\\x1b`, `\\u202e`.

    Args:
        kept: control characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in kept or _is_space(c) else c.encode("unicode_escape").decode()
        for c in text
    )


def _is_space(character: str) -> bool:
    # no-break and ideographic spaces, which Python does not call printable
    return unicodedata.category(character) == "Zs"


def shortened(text: str, most: int) -> str:
    """Cut a long text in its middle: a message has its advice at the end."""
    if len(text) <= most:
        return text
    end = most // 4
    left_out = len(text) - most
    return f"{text[: most - end]}... ({left_out:,} characters more) ...{text[-end:]}"


def one_line(text: object) -> str:
    """Write a message with foreign text in one line of limited length.

    Line breaks are escaped: the foreign text cannot pretend to be another message.
    """
    return escaped(shortened(without_secrets(str(text)), MOST_OF_A_MESSAGE), kept="")


class Complaints(ValueError):
    """Several complaints about one text, such as a command line.

    Attributes:
        complaints: a sentence each.
    """

    def __init__(self, head: str, complaints: Sequence[str]) -> None:
        super().__init__(head)
        self.complaints = complaints


def printable(error: object) -> str:
    """Write an error as one_line() does; each of several complaints has a line of its own."""
    complaints = error.complaints if isinstance(error, Complaints) else ()
    lines = [one_line(each) for each in (error, *complaints[:MOST_COMPLAINTS])]
    if more := len(complaints[MOST_COMPLAINTS:]):
        lines.append(f"and {more:,} more")
    return "\n  ".join(lines)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; empty where the message is."""
    return next(iter(str(error).strip().splitlines()), "")


def without_secrets(text: str) -> str:
    """Hide tokens, and user names and passwords in addresses."""
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name, "").strip()
        if len(secret) >= _SECRET_LENGTH:
            text = text.replace(secret, _HIDDEN)
    return _TOKEN.sub(_HIDDEN, _USER_INFO.sub(rf"\1{_HIDDEN}@", text))


class _Guarded:
    """A filter before a text stream: it escapes, shortens and hides secrets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # whether a carriage return does no harm: at the start of a line, or in a progress bar
        self._may_go_back = True

    def write(self, text: str) -> int:
        shown = without_secrets(text)
        if not isinstance(text, AsIs):
            shown = self._escaped(shortened(shown, MOST_AT_ONCE))
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def _escaped(self, text: str) -> str:
        if self._may_go_back and _UP.fullmatch(text):
            return text
        back = "\r" if self._may_go_back and text.startswith("\r") else ""
        if text:
            self._may_go_back = bool(back) or text.endswith("\n")
        return back + escaped(text[len(back) :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_output() -> None:
    """Put a filter before stdout and stderr for the rest of the process.

    For the main function of a program, to which both streams belong; not for libraries.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # a closed descriptor has no stream
        if stream is not None:
            guarded = cast(TextIO, _Guarded(stream))
            setattr(sys, name, guarded)
            _redirect_logs(stream, guarded)


def _redirect_logs(before: TextIO, after: TextIO) -> None:
    """Let the loggers of libraries that hold the stream `before` write to `after`."""
    for logger in (logging.root, *logging.Logger.manager.loggerDict.values()):
        # a name without a logger of its own has a placeholder, which has no handlers
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(after)
