"""A conversation with the model: on a terminal, or with lines from a pipe."""

import importlib
import sys
from collections.abc import Callable
from contextlib import closing, suppress

from answering.job import AnswerJob, say
from data.answer_text import StreamedAnswer
from data.chat.template import Message
from generation.generator import Generator
from run.signals import interruptible

_HELP = """\
/reset  forgets the conversation
/help   shows this
/exit   ends, as Ctrl-D does
Ctrl-C  stops an answer; where there is none it ends the conversation"""


def talk(job: AnswerJob, generator: Generator) -> None:
    """Answer the user's messages until the end of the input."""
    if sys.stdin and sys.stdin.isatty():
        say("/help lists the commands; Ctrl-D ends")
        # edits lines and recalls earlier ones, where Python has it
        with suppress(ImportError):
            importlib.import_module("readline")
    messages = opening = job.first_messages
    while (line := _read_line()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = opening
        elif line == "/help":
            print(_HELP, file=sys.stderr)
        elif line.startswith("/") and line[1:].isalpha():
            say(f"there is no command {line}; /help lists them")
        elif line:
            messages = _turn(job, generator, [*messages, {"role": "user", "content": line}])


def _read_line() -> str | None:
    """Read what the user says; None at the end of the input."""
    is_terminal = bool(sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty())
    try:
        return input("> " if is_terminal else "").strip() if sys.stdin else None
    except (EOFError, KeyboardInterrupt):
        if is_terminal:
            # the next line is the shell's
            print()
        return None


def _turn(job: AnswerJob, generator: Generator, messages: list[Message]) -> list[Message]:
    """Answer the last message.

    Returns:
        The conversation with the answer, or without the last message where it cannot be answered.
    """
    try:
        ids = job.encode_messages(messages)
        if len(ids) >= job.capacity:
            raise ValueError(
                f"the conversation must leave room for an answer: it has {len(ids):,} tokens of "
                f"{job.capacity:,}; /reset begins a new one"
            )
    except ValueError as error:
        say(error)
        return messages[:-1]
    with interruptible() as is_pressed:
        answer = print_answer(job, generator, ids, is_pressed)
    return [*messages, {"role": "assistant", "content": answer}]


def print_answer(
    job: AnswerJob,
    generator: Generator,
    ids: list[int],
    is_stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Print an answer token by token, until it ends or is stopped; reasoning before it to stderr.

    Args:
        ids: the prompt's tokens.
        is_stopped: is asked after each token.

    Returns:
        The answer as far as it was printed.
    """
    text, pieces = StreamedAnswer(job.tokenizer, job.opening), []
    max_new_tokens = min(job.max_new_tokens, job.capacity - len(ids))

    def show(piece: str) -> None:
        pieces.append(piece)
        print(piece, end="", flush=True)

    with closing(generator.stream(ids, max_new_tokens, job.stop_ids)) as tokens:
        for token in tokens:
            words, reasoning = text.add(token)
            show(words)
            print(reasoning, end="", flush=True, file=sys.stderr)
            if text.is_closed or is_stopped():
                break
    show(text.rest())
    print(flush=True)
    if len(text.ids) == max_new_tokens:
        say(f"the answer was cut at {max_new_tokens:,} tokens")
    return "".join(pieces)
