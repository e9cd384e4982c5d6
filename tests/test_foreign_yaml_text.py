"""foreign/yaml_text.py: texts as they stand in the file, and what is refused in a line."""

from pathlib import Path
from typing import Any

import pytest

from foreign.yaml_text import MOST_BYTES, read_yaml_settings


def read(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return dict(read_yaml_settings(path))


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        # YAML 1.1 takes these for a string, 90, ten, a date, false, true and None
        ("a: 2e-4", {"a": "2e-4"}),
        ("a: 1:30", {"a": "1:30"}),
        ("a: 012", {"a": "012"}),
        ("a: 2026-11-30", {"a": "2026-11-30"}),
        ("a: no\nb: On", {"a": "no", "b": "On"}),
        ("a:\nb: ~\nc: null", {"a": None, "b": None, "c": None}),
        ("a: ''\nb: 'null'", {"a": "", "b": "null"}),
        ("a: [x, 2e-4]", {"a": ["x", "2e-4"]}),
        ("a:\n- x\n- y", {"a": ["x", "y"]}),
        ("a: []", {"a": []}),
        ("a: # why\n  1 # and this", {"a": "1"}),
        ("a: |\n  one\n  two\n", {"a": "one\ntwo\n"}),
        ("a: &rate 1e-4\nb: *rate", {"a": "1e-4", "b": "1e-4"}),
        ("{a: 1, b: 2}", {"a": "1", "b": "2"}),
        ("\ufeffa: é", {"a": "é"}),
        # not looked into
        ("a: {b: 1}\nc: [[1]]\nd: [x, ~]", {"a": {}, "c": {}, "d": {}}),
    ],
)
def test_a_scalar_is_the_text_of_the_file(
    tmp_path: Path, text: str, settings: dict[str, Any]
) -> None:
    assert read(tmp_path, text) == settings


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must hold settings, a name and a value a line: got nothing"),
        ("# a comment", "got nothing"),
        ("- a", "got a list"),
        ("learning_rate 1e-4", "got a text"),
        ("a: 1\nb: 2\na: 3", "a must be given once: got it again in line 3"),
        ("? [a]\n: 1", "must have a name in line 1: got a list"),
        ("~: 1", "must have a name in line 1: got a text"),
        ("a: !!python/object/apply:os.system [ls]", "must have no tags: got tag:yaml.org,2002:py"),
        ("a: [!x 1]", "must have no tags: got !x in line 1"),
        ("a: b: c", "must be YAML: got mapping values are not allowed here"),
        (
            "\ta: 1",
            "found character '\\t' that cannot start any token in line 1",
        ),
        (
            "a: 1\n---\nb: 2",
            "in the stream but found another document in line 2",
        ),
        ("a: *b", "must be YAML: got found undefined alias 'b' in line 1"),
        ("a: \x00", "must be YAML: got unacceptable character"),
    ],
)
def test_what_are_no_settings_is_said_in_a_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml") as refused:
        read(tmp_path, text)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bytes_that_are_no_text_and_a_file_that_is_no_recipe_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"must be YAML: got 'utf-8' codec can't decode byte 0xff"):
        read_yaml_settings(path)
    path.write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(ValueError, match=r"must have at most 1,048,576 bytes: got 1,048,577"):
        read_yaml_settings(path)


def test_aliases_of_aliases_do_not_grow(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i + 1}: &a{i + 1} [{', '.join(9 * [f'*a{i}'])}]" for i in range(40)]
    settings = read(tmp_path, "\n".join(lines))
    assert settings.pop("a0") == 9 * ["x"]
    assert all(value == {} for value in settings.values())
