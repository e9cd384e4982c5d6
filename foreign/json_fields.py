"""A JSON object that somebody else wrote: each value is checked as it is taken."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# no count in a file of today comes near it
_MOST = 2**31 - 1


@dataclass(frozen=True)
class JsonFields:
    """A JSON object of a file; null counts as absent.

    Each method takes one value, or the default where there is none, and raises a ValueError that
    names the file and the key where the value is missing or has the wrong type or size.

    Attributes:
        section: the key of the object in its file, where it is not the whole of it.
    """

    path: Path
    values: dict[str, Any]
    section: str = ""

    @property
    def where(self) -> str:
        """The place of the object, for messages."""
        return f"{self.path}, {self.section}" if self.section else str(self.path)

    def _take(self, key: str, default: Any, what: str, is_valid: bool) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise ValueError(f"{self.where} must give {key}: the key is missing")
        if value is not None and not is_valid:
            raise ValueError(f"{self.where}: {key} must be {what}: got {value!r}")
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, most: int = _MOST) -> int:
        value = self.values.get(key)
        is_positive = type(value) is int and value > 0
        what = f"at most {most:,}" if is_positive else "a positive integer"
        return self._take(key, default, what, type(value) is int and 0 < value <= most)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        is_valid = (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and 0 < value <= sys.float_info.max
        )
        return float(self._take(key, default, "a positive number", is_valid))

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        is_valid = isinstance(self.values.get(key), bool)
        return self._take(key, default, "true or false", is_valid)
