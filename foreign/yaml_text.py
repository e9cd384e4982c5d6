"""Settings in YAML that somebody else wrote: names, each with a text or a list of texts.

A scalar stays the text that stands in the file. So none of the traps of YAML 1.1, which PyYAML
reads, opens: 2e-4, which it takes for a string, 1:30, which is 90, 012, which is ten, a date, and
`no`, which is false. Whoever reads the settings knows what each must be. An alias of a value is the
value; what nests is not looked into, so no alias grows. Tags, which make Python objects elsewhere,
are refused.
"""

from pathlib import Path
from typing import Any, TypeAlias

import yaml

# a hundred settings and their comments are some 10 kB; PyYAML reads 1 MB in 2 s
MOST_BYTES = 1 << 20
# what a plain scalar may be that says nothing; a quoted one is a text
_NOTHING = ("", "~", "null", "Null", "NULL")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}

# None: a name without a value; a dict, which is empty here: a value with names or lists inside
Setting: TypeAlias = str | list[str] | dict[str, Any] | None


def read_yaml_settings(path: Path) -> dict[str, Setting]:
    """Read a file of one mapping.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is too long, not YAML, not a mapping, or has a name twice or a tag.
    """
    if (num_bytes := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} must have at most {MOST_BYTES:,} bytes: got {num_bytes:,}")
    try:
        # decoded here: PyYAML would take UTF-16 for what it is, too, and say less of a bad byte
        root = yaml.compose(path.read_bytes().decode("utf-8-sig"), yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        what = " ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{path} must be YAML: got {what}{place}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} must be YAML: got {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must hold settings, a name and a value a line: got {_kind(root)}")
    settings: dict[str, Setting] = {}
    for key, value in root.value:
        name = _scalar(key, path)
        if not isinstance(name, str):
            raise ValueError(f"{path} must have a name in {_place(key)}: got {_kind(key)}")
        if name in settings:
            raise ValueError(f"{path}: {name} must be given once: got it again in {_place(key)}")
        if isinstance(value, yaml.SequenceNode) and value.tag in _PLAIN_TAGS:
            texts = [_scalar(each, path) for each in value.value]
            flat = [text for text in texts if isinstance(text, str)]
            settings[name] = flat if len(flat) == len(texts) else {}
        else:
            settings[name] = _scalar(value, path)
    return settings


def _scalar(node: yaml.Node, path: Path) -> str | dict[str, Any] | None:
    if node.tag not in _PLAIN_TAGS:
        raise ValueError(f"{path} must have no tags: got {node.tag} in {_place(node)}")
    if not isinstance(node, yaml.ScalarNode):
        return {}
    is_plain = node.style is None
    return None if is_plain and node.value in _NOTHING else node.value


def _kind(node: yaml.Node | None) -> str:
    if isinstance(node, yaml.CollectionNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    return "a text" if node else "nothing"


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
