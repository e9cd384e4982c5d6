"""A field of the YAML head of a Markdown file that somebody else wrote.

    ---
    configs:
    - config_name: main
    ---
    # A data set

All values are texts, lists and mappings, so that `no` and `2024-01-01` stay names. Only the lines
of the field are read: a head may describe hundreds of other things, and some of them wrongly. An
alias would make a value of gigabytes out of some lines; none is accepted.
"""

import re
from pathlib import Path
from typing import Any

import yaml

# of a head, of which most have some ten thousand, and of a field
MOST_BYTES, MOST_FIELD_BYTES = 4 << 20, 256 << 10

_HEAD = re.compile(r"\s*---[ \t]*\n(.*?\n)?---[ \t]*(\n|\Z)", re.S)
# a line that begins another field
_NEXT = re.compile(r"^[\w\"'].*:", re.M)


class _Loader(yaml.BaseLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def read_field(path: Path, name: str) -> Any:
    """Read a field of the head of a file; None where there is no head, or no such field.

    Raises:
        OSError: the file cannot be read.
        ValueError: the field is too long, not YAML, nested too deep, or has an alias.
    """
    with path.open("rb") as file:
        text = file.read(MOST_BYTES).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    head = _HEAD.match(text)
    lines = re.search(rf"^{name}:.*\n?", head[1] or "", re.M) if head else None
    if head is None or lines is None:
        return None
    end = _NEXT.search(head[1], lines.end())
    field = head[1][lines.start() : end.start() if end else None]
    advice = f"correct it, or remove the field {name}"
    if len(field) > MOST_FIELD_BYTES:
        raise ValueError(
            f"{path} must have at most {MOST_FIELD_BYTES:,} characters in the field {name}: got "
            f"{len(field):,}; {advice}"
        )
    try:
        return yaml.load(field, _Loader)[name]
    except (yaml.YAMLError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{path} must have YAML without aliases in the field {name}: got {why}; {advice}"
        ) from None
