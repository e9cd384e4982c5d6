"""Text on its way to a terminal or a log.

A terminal obeys the text that it shows: ESC begins a command, a carriage return goes back over the
line, U+202E turns the rest around. And most of a program's text is somebody else's: answers, names
of files and fields, tokens, templates, what the hub says, whatever an error quotes. `guard_output`
stands before stdout and stderr, so whoever prints, a library's warning and a traceback included,
prints escaped, without secrets, and no more than a terminal can take.
"""

import logging
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any, TextIO, cast

# of a message, and of whatever is written at once
MOST_OF_A_MESSAGE = 2_000
MOST_AT_ONCE = 1 << 16

_HIDDEN = "***"
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
# shorter ones are found in ordinary words
_SECRET_LENGTH = 8
# of an address, up to the last @ before its path, and one slash where a Path was made of it
_USER_INFO = re.compile(r"(:/{1,2})[^/\s]+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}|(?<=Bearer )[^\s'\"]+")

# how tqdm gets from one bar to another
_UP = re.compile("(?:\x1b\\[A)+")


class AsIs(str):
    """Text whose foreign parts are escaped already, so that the rest, such as colours, may pass."""


def escaped(text: str, kept: str = "\n\t") -> str:
    """Write out what a terminal would obey or not show, as Python does: `\\x1b`, `\\u202e`.

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
    """Leave out what is too much, a message's advice at its end excepted."""
    if len(text) <= most:
        return text
    end = most // 4
    left_out = len(text) - most
    return f"{text[: most - end]}... ({left_out:,} characters more) ...{text[-end:]}"


def one_line(text: object) -> str:
    """Write a message that holds foreign text in one line of bounded length, which no line break in
    it can end and go on as another message."""
    return escaped(shortened(without_secrets(str(text)), MOST_OF_A_MESSAGE), kept="")


def without_secrets(text: str) -> str:
    """Hide tokens, and names and passwords in addresses."""
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name, "").strip()
        if len(secret) >= _SECRET_LENGTH:
            text = text.replace(secret, _HIDDEN)
    return _TOKEN.sub(_HIDDEN, _USER_INFO.sub(rf"\1{_HIDDEN}@", text))


class _Guarded:
    """A text stream before another one, which gets only what may be shown."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # whether the cursor stands where it may go back: in a line's first column or in a bar
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
    """Put a guard before stdout and stderr, for the rest of the process.

    For a program, whose streams they are, and not for a function that others call.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # where the descriptor was closed there is none
        if stream is not None:
            guarded = cast(TextIO, _Guarded(stream))
            setattr(sys, name, guarded)
            _redirect_logs(stream, guarded)


def _redirect_logs(before: TextIO, after: TextIO) -> None:
    """Lead the logs of libraries that have taken a stream already to another one."""
    for logger in (logging.root, *logging.Logger.manager.loggerDict.values()):
        # where only a logger below it is known there is a placeholder
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(after)
