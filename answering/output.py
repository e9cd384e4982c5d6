"""The file of answers, in JSON lines: whole, in the order of the prompts, or not there.

    answers.jsonl.unfinished    while the model answers: each answer as soon as it is complete
    answers.jsonl               in the end, in the order of the prompts

A process that is killed loses no answer: the unfinished file has all that were complete.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from run.atomic import make_folder, write_text
from run.folder import check_writable
from run.lock import LOCK_FILE, check_unlocked, locked


def _unfinished(output: Path) -> Path:
    return output.with_name(output.name + ".unfinished")


def _lock(output: Path) -> Path:
    return output.with_name(output.name + LOCK_FILE)


def check_new_file(output: Path) -> None:
    """Refuse a file that is there already, that another process writes, or that cannot be written.

    Raises:
        ValueError: it is so.
    """
    check_unlocked(_lock(output), f"--output {output}")
    _check_is_new(output)
    check_writable(output.parent)


def _check_is_new(output: Path) -> None:
    for path in (output, _unfinished(output)):
        if path.exists():
            raise ValueError(
                f"--output must be a new file: {path} is there"
                + ("" if path == output else ", with the answers of a start that did not end")
                + "; keep it under another name, or choose another one"
            )


class AnswerFile:
    """The answers so far, each in the unfinished file.

    Attributes:
        unfinished: the file's path.
        num_answers: that are in it.
    """

    def __init__(self, output: Path) -> None:
        self._output, self.unfinished, self.num_answers = output, _unfinished(output), 0
        self._file = self.unfinished.open("x", encoding="utf-8")

    def add(self, index: int, given: dict[str, Any], answer: str) -> None:
        """Write down the answer to the prompt of an index."""
        record = {"index": index, **given, "answer": answer}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        self.num_answers += 1

    def close(self) -> None:
        self._file.close()
        if not self.num_answers:
            self.unfinished.unlink()

    def finish(self) -> None:
        """Put the answers in the order of the prompts, under the file's own name."""
        self._file.close()
        with self.unfinished.open(encoding="utf-8") as file:
            lines = sorted(file, key=lambda line: json.loads(line)["index"])
        write_text(self._output, "".join(lines))
        self.unfinished.unlink()


@contextmanager
def new_answers(output: Path) -> Iterator[AnswerFile]:
    """Yield a file to add answers to; at the end of the block it becomes `output`.

    If the block raises, the unfinished file stays.

    Raises:
        ValueError: another process writes the same file, or has written it by now.
        OSError: the disk refused.
    """
    output = output.absolute()
    make_folder(output.parent)
    with locked(_lock(output), f"--output {output}"):
        # another process may have written it since the first check
        _check_is_new(output)
        answers = AnswerFile(output)
        try:
            yield answers
        except BaseException:
            answers.close()
            raise
        answers.finish()
