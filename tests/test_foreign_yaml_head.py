"""foreign/yaml_head.py: a field of the YAML head of a file, within limits."""

from pathlib import Path

import pytest

from foreign.yaml_head import MOST_FIELD_BYTES, read_field


def field_of(tmp_path: Path, text: str) -> object:
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    return read_field(path, "configs")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("---\nconfigs: [a]\n---\n", ["a"]),
        ("\ufeff---\r\nconfigs:\r\n- no\r\n- 1.0\r\n---", ["no", "1.0"]),
        ("---\nlicense: mit\nconfigs:\n- a\n\n# b\n- c\ntags: [\n---\n", ["a", "c"]),
        ("---\nconfigs:\n  x: 2024-01-01\n  <<: true\n---\n", {"x": "2024-01-01", "<<": "true"}),
        ("---\ntags: a\n---\nconfigs: b\n", None),
        ("---\n---\nconfigs: b\n", None),
        ("# A card\n---\nconfigs: b\n---\n", None),
        ("---\nconfigs: b\n", None),
        ("", None),
    ],
)
def test_a_field_is_texts_lists_and_mappings(tmp_path: Path, text: str, value: object) -> None:
    assert field_of(tmp_path, text) == value


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ("{a: b", "must have YAML without aliases in the field configs: got "),
        ("[&a [b], *a]", "got an alias; correct it, or remove the field configs"),
        ("[" * 9_000, "must have YAML without aliases"),
        ("!!python/object/apply:os.system [ls]\n? [a]\n: b", "must have YAML"),
        ("a" * MOST_FIELD_BYTES, "must have at most 262,144 characters in the field configs: got"),
    ],
    ids=["open", "alias", "nested", "program", "long"],
)
def test_what_would_take_too_much_is_refused(tmp_path: Path, field: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        field_of(tmp_path, f"---\nconfigs: {field}\n---\n")
