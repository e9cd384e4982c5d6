"""foreign/json_text.py: what it reads as Python's decoder does, and what it refuses."""

import json
from pathlib import Path

import pytest

import foreign.json_text
from foreign.json_text import MOST_NESTED, parse_json, read_json, read_object


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, 2.5, null, true, "h\\u00e9", {"b": {}}]}',
        '"\\ud83d\\ude00"',
        nested(MOST_NESTED),
        json.dumps([{"a": {"b": [i]}} for i in range(MOST_NESTED)]),
        "[NaN, Infinity, -1e400, 1e-400]",
        " 7 ",
    ],
)
def test_a_value_is_what_python_reads(text: str, tmp_path: Path) -> None:
    expected = json.dumps(json.loads(text))
    assert json.dumps(parse_json(text, "x")) == expected
    (tmp_path / "x.json").write_text(text)
    assert json.dumps(read_json(tmp_path / "x.json")) == expected


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert parse_json(b"\xef\xbb\xbf{}", "x") == {}


REFUSED: dict[str, tuple[bytes, str]] = {
    "cut-off": (b'{"a": ', "must be JSON: got Expecting value"),
    "nothing": (b"", "must be JSON: got Expecting value"),
    "not-utf-8": (b'{"a": "\xff"}', "must be JSON: got 'utf-8' codec can't decode"),
    "a-key-twice": (b'[{"b": {"a": 1, "c": 2, "a": 1}}]', "got the key 'a' twice in one object"),
    "five-thousand-digits": (b"1" * 5000, "must be JSON: got Exceeds the limit"),
    "lists-too-deep": (nested(MOST_NESTED + 1).encode(), "nest at most 100 deep"),
    "objects-too-deep": (
        (nested(MOST_NESTED, '{"a":', "}").replace(":}", ":[]}")).encode(),
        "nest at most 100 deep",
    ),
    "deeper-than-python-recurses": (b"[" * 100_000, "must be JSON: got maximum recursion depth"),
    "half-a-pair": (b'{"a": ["\\ud800"]}', "must be valid Unicode: got half of a surrogate pair"),
    "half-a-pair-as-a-key": (b'{"\\uDFFF": 1}', "got half of a surrogate pair, U+DFFF"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_other_code_could_not_take_is_refused_by_the_files_name(
    case: str, tmp_path: Path
) -> None:
    content, message = REFUSED[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        read_object(path, "download it again")
    assert message in str(raised.value)
    assert str(raised.value).endswith("; download it again")


@pytest.mark.parametrize("content", ["[]", '"x"', "5", "null"])
def test_another_value_is_no_object(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config.json must hold a JSON object: got a \w+$"):
        read_object(path)


def test_a_file_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(foreign.json_text.MOST_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"at most 268,435,456 bytes: got 268,435,457"):
        read_json(path)
