"""JSON that somebody else wrote, read within limits.

Python's decoder recurses as deep as the text is nested, keeps the last of two values of the same
key, and accepts half of a surrogate pair in a string, which no file name and no terminal can take.
Here each of these is a ValueError that names the file. So any code may walk, copy and quote the
value without further checks.

NaN and Infinity, which JSON does not have and Python writes, are read as floats: code that takes a
number from a file checks the number's range.
"""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

# the files of a checkpoint nest some ten levels, a tool's schema some thirty
MOST_NESTED = 100
# the largest index of a checkpoint is some 10 MB
MOST_BYTES = 256 << 20

# the escapes of U+D800 to U+DFFF: text only in pairs, but JSON lets one stand alone
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, advice: str = "") -> Any:
    """Read a file of one JSON value.

    Args:
        advice: what to do about a malformed file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is too long, not JSON, nested too deep, or repeats a key in an object.
    """
    if (num_bytes := path.stat().st_size) > MOST_BYTES:
        raise ValueError(
            f"{path} must be a JSON file of at most {MOST_BYTES:,} bytes: got {num_bytes:,}"
            + (advice and f"; {advice}")
        )
    return parse_json(path.read_bytes(), str(path), advice)


def read_object(path: Path, advice: str = "") -> dict[str, Any]:
    """Read a file of one JSON object.

    Raises:
        OSError, ValueError: as read_json(), or the value is not an object.
    """
    value = read_json(path, advice)
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} must hold a JSON object: got a {type(value).__name__}"
            + (advice and f"; {advice}")
        )
    return value


def parse_json(text: str | bytes, what: str, advice: str = "") -> Any:
    """Decode a JSON value.

    Args:
        text: bytes are UTF-8.
        what: the name of the text, such as that of its file, for messages.

    Raises:
        ValueError: as read_json().
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = _DECODER.decode(text)
    # a RecursionError is nesting, too; a ValueError without a position is too long an integer
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON: got {error}" + (advice and f"; {advice}")) from None
    try:
        check_value(value, text)
    except ValueError as error:
        raise ValueError(f"{what}: {error}" + (advice and f"; {advice}")) from None
    return value


def check_value(value: object, text: str) -> None:
    """Refuse a decoded value that is nested too deep or has invalid Unicode.

    Raises:
        ValueError: the value is nested deeper than MOST_NESTED, or has half of a surrogate pair.
    """
    # counting all brackets is far cheaper than walking the value, and is enough for most texts
    if text.count("[") + text.count("{") > MOST_NESTED and _is_deeper(value, MOST_NESTED):
        raise ValueError(f"lists and objects must nest at most {MOST_NESTED} deep: got more")
    if _SURROGATE_ESCAPE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                "text must be valid Unicode: got half of a surrogate pair, "
                f"U+{ord(error.object[error.start]):04X}"
            ) from None


def _is_deeper(value: object, most: int) -> bool:
    """Whether lists and objects are nested more than `most` deep."""
    containers = [value] if isinstance(value, (dict, list)) else []
    for _ in range(most):
        inner = chain.from_iterable(c.values() if isinstance(c, dict) else c for c in containers)
        containers = [each for each in inner if isinstance(each, (dict, list))]
    return bool(containers)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} twice in one object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
