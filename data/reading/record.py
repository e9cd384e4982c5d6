"""One record of a data file, and how to treat a record that cannot be read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

# takes the error of a record that cannot be used: raises it, or counts the record
Refuse: TypeAlias = Callable[[ValueError], None]


@dataclass(frozen=True)
class Record:
    """One example as the file has it.

    Attributes:
        location: file:line, or file[index] for an element of a JSON list or a row of a parquet
            file.
        part: the number of a part of a text file, None for any other record. The parts of a file
            follow each other and are one document together.
    """

    location: str
    fields: dict[str, object]
    part: int | None = None

    @property
    def is_document(self) -> bool:
        return self.part is not None


def raise_it(error: ValueError) -> NoReturn:
    raise error
