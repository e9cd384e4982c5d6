"""data/reading/: every record with its place, and every fault of a file named with its place."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from data.reading import json_files
from data.reading.files import read_records
from data.reading.record import Record


def read(folder: Path, name: str, content: bytes) -> list[Record]:
    path = folder / name
    path.write_bytes(content)
    return list(read_records(path))


def test_json_lines_keep_their_line_numbers_over_blank_lines(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"a": "x\xe2\x80\xa8y"}'
    path = tmp_path / "x.jsonl"
    assert read(tmp_path, "x.jsonl", content) == [
        Record(f"{path}:1", {"a": 1}),
        Record(f"{path}:4", {"a": "x\u2028y"}),
    ]


def test_json_list_counts_elements(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    records = read(tmp_path, "x.json", b'\xef\xbb\xbf[{"a": 1},\n {"a": 2}]')
    assert records == [Record(f"{path}[0]", {"a": 1}), Record(f"{path}[1]", {"a": 2})]


def test_json_lines_under_the_name_of_json_are_read_as_lines(tmp_path: Path) -> None:
    records = read(tmp_path, "x.JSON", b'{"a": 1}\n{"a": 2}\n')
    assert [r.location for r in records] == [f"{tmp_path / 'x.JSON'}:{i}" for i in (1, 2)]


@pytest.mark.parametrize("indent", [None, 2], ids=["a line", "many lines"])
def test_an_object_is_one_record(tmp_path: Path, indent: int | None) -> None:
    values = {"a": [{"b": 1}], "data": [1], "c": None}
    (record,) = read(tmp_path, "x.json", json.dumps(values, indent=indent).encode())
    assert record == Record(f"{tmp_path / 'x.json'}:1", values)


@pytest.mark.parametrize("beside", [{}, {"version": "1.1"}, {"type": "text2text"}])
@pytest.mark.parametrize("name", ["data", "instances"])
def test_an_object_may_hold_the_list_of_records(
    tmp_path: Path, name: str, beside: dict[str, object]
) -> None:
    content = json.dumps({**beside, name: [{"a": 1}, {"a": 2}]}).encode()
    path = tmp_path / "x.json"
    expected = [Record(f"{path}[0]", {"a": 1}), Record(f"{path}[1]", {"a": 2})]
    assert read(tmp_path, "x.json", content) == expected
    # what else the object says would be lost
    content = json.dumps({**beside, name: [{"a": 1}], "system": "s"}).encode()
    (record,) = read(tmp_path, "x.json", content)
    assert record.fields["system"] == "s"


def test_csv_gives_text_and_the_line_where_a_row_starts(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    content = b'\xef\xbb\xbfprompt, completion\n"a,\n""b""",c\n\n1,\n'
    assert read(tmp_path, "x.csv", content) == [
        Record(f"{path}:2", {"prompt": 'a,\n"b"', "completion": "c"}),
        Record(f"{path}:5", {"prompt": "1", "completion": ""}),
    ]


def test_the_index_that_pandas_writes_without_a_name_is_a_column(tmp_path: Path) -> None:
    (record,) = read(tmp_path, "x.csv", b",text\n7,a\n")
    assert record == Record(f"{tmp_path / 'x.csv'}:2", {"__index_level_0__": "7", "text": "a"})


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    (record,) = read(tmp_path, "x.csv", b"text\n" + b"a" * 200_000)
    assert record.fields == {"text": "a" * 200_000}


@pytest.mark.parametrize("name", ["x.txt", "x.text", "x.md", "x.TXT"])
def test_a_text_file_is_one_document_unchanged(tmp_path: Path, name: str) -> None:
    (record,) = read(tmp_path, name, " a\r\n\ncaf\u00e9\n".encode())
    text: dict[str, object] = {"text": " a\r\n\ncaf\u00e9\n"}
    assert record == Record(f"{tmp_path / name}:1", text, part=0)


def test_escaped_surrogate_pairs_are_text(tmp_path: Path) -> None:
    (record,) = read(tmp_path, "x.jsonl", b'{"a": "\\ud83e\\uddff"}')
    assert record.fields == {"a": "\U0001f9ff"}


GOOD = b'{"a": 1}\n'
DAMAGED_GZIP = gzip.compress(b"a\n1\n")[:-8] + bytes(8)
MALFORMED = {
    "line-truncated": ("x.jsonl", GOOD + b'{"a": ', ":2: each line"),
    "line-single-quotes": ("x.jsonl", GOOD + b"{'a': 1}", ":2: each line"),
    "line-trailing-comma": ("x.jsonl", GOOD + b'{"a": 1,}', ":2: each line"),
    "line-two-objects": ("x.jsonl", b'{"a": 1} {"a": 2}', ":1: each line"),
    "line-comma-at-end": ("x.jsonl", b'{"a": 1},\n', ":1: each line"),
    "line-list": ("x.jsonl", GOOD + b"[1]", ":2: each line must be a JSON object: got list"),
    "line-string": ("x.jsonl", b'"a"', ":1: each line must be a JSON object: got string"),
    "line-number": ("x.jsonl", b"3", ":1: each line must be a JSON object: got number"),
    "line-null": ("x.jsonl", b"null", ":1: each line must be a JSON object: got null"),
    "line-bool": ("x.jsonl", b"true", ":1: each line must be a JSON object: got boolean"),
    "line-text": ("x.jsonl", b"hello", ":1: each line"),
    "line-pretty-printed": ("x.jsonl", b'{\n"a": 1\n}', ":1: each line"),
    "line-control-character": ("x.jsonl", b'{"a": "\x01"}', ":1: each line"),
    "line-nul": ("x.jsonl", GOOD + b"\x00\x00", ":2: each line"),
    "line-bad-escape": ("x.jsonl", b'{"a": "\\x"}', ":1: each line"),
    "line-half-surrogate": ("x.jsonl", GOOD + b'{"a": "\\ud83e"}', ":2: text must be valid"),
    "line-half-surrogate-key": ("x.jsonl", b'{"\\uDFFF": 1}', ":1: text must be valid"),
    "line-half-surrogate-deep": ("x.jsonl", b'{"a": [{"b": "\\udc00"}]}', ":1: text must be"),
    "line-deep": ("x.jsonl", b'{"a": ' + b"[" * 200_000, ":1: each line"),
    "line-nested": (
        "x.jsonl",
        GOOD + b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
        ":2: lists and objects must nest at most 100 deep",
    ),
    "line-huge-integer": ("x.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ":1: each line"),
    "line-latin-1": ("x.jsonl", GOOD + b'{"a": "caf\xe9"}', ":2: the file must be UTF-8"),
    "line-utf-16": ("x.jsonl", '{"a": 1}'.encode("utf-16"), ":1: the file must be UTF-8"),
    "line-cut-character": ("x.jsonl", GOOD + b'{"a": "\xe4\xbd', ":2: the file must be UTF-8"),
    "lines-gzip": ("x.jsonl", b"\x1f\x8b\x08\x00", ":1: the file must be UTF-8"),
    "lines-empty": ("x.jsonl", b"", " must hold at least one record"),
    "lines-blank": ("x.jsonl", b"\n \n\t\n", " must hold at least one record"),
    "lines-mark-only": ("x.jsonl", b"\xef\xbb\xbf", " must hold at least one record"),
    "json-truncated": ("x.json", b'[{"a": 1},\n{"a": ', ":2: the file must be a JSON list"),
    "json-truncated-text": ("x.json", b'[{"a": 1},\n{"a": "b', ":2: the file must be a JSON"),
    "json-unclosed": ("x.json", b'[{"a": 1}', ":1: the file must be a JSON list"),
    "json-trailing-comma": ("x.json", b'[{"a": 1},]', ":1: the file must be a JSON list"),
    "json-string": ("x.json", b'"a"', ":1: a file that is no JSON list .*: got string 'a'"),
    "json-number": ("x.json", b"1", ":1: a file that is no JSON list .* object: got number"),
    "json-null": ("x.json", b"null", ":1: a file that is no JSON list .* object: got null"),
    "json-object-twice-a-key": ("x.json", b'{"a": 1, "a": 2}', ":1: .*'a' twice"),
    "json-object-cut": ("x.json", b'{"a": 1,\n"b": ', ":2: the file must be a JSON list"),
    "json-wrapped-text": ("x.json", b'{"data": [{"a": 1}, "b"]}', r"\[1\]: each element must be"),
    "json-text": ("x.json", b"hello", ":1: the file must be a JSON list"),
    "json-list-of-lists": ("x.json", b'[{"a": 1}, [1]]', r"\[1\]: each element must be"),
    "json-list-of-text": ("x.json", b'["a"]', r"\[0\]: each element must be"),
    "json-null-element": ("x.json", b'[{"a": 1}, null]', r"\[1\]: each element must be"),
    "json-half-surrogate": ("x.json", b'[{}, {"a": "\\uD800"}]', r"\[1\]: text must be valid"),
    "json-nested": (
        "x.json",
        b'[{}, {"a": ' + b"[" * 100 + b"]" * 100 + b"}]",
        r"\[1\]: lists and objects must nest at most 100 deep",
    ),
    "json-second-line-bad": ("x.json", GOOD + b'{"a": ', ":2: each line"),
    "json-list-twice": ("x.json", b'[{"a": 1}]\n[2]', ":2: .*got '\\[2\\]' after its end"),
    "json-no-comma": ("x.json", b'[{"a": 1}\n{"a": 1}]', ":2: .*after element 0, where a comma"),
    "json-twice-a-key": ("x.json", b'[{"a": 1}, {"a": 1, "a": 2}]', r"\[1\]: .*'a' twice"),
    "line-twice-a-key": ("x.jsonl", GOOD + b'{"b": {"a": 1, "a": 2}}', ":2: .*'a' twice"),
    "gzip-cut": ("x.jsonl.gz", gzip.compress(GOOD * 9)[:-9], r":\d+: the file must be whole"),
    "gzip-none": ("x.json.gz", GOOD, ":1: the file must be whole"),
    "gzip-damaged": ("x.csv.gz", DAMAGED_GZIP, r":\d+: the file must be whole"),
    "gzip-empty": ("x.jsonl.gz", b"", " must hold at least one record"),
    "gzip-of-latin-1": ("x.txt.gz", gzip.compress(b"a\n\xe9"), ":2: the file must be UTF-8"),
    "json-latin-1": ("x.json", b'[\n{"a": "\xe9"}]', ":2: the file must be UTF-8"),
    "json-deep": ("x.json", b"[" * 200_000, ":1: the file must be a JSON list"),
    "json-huge-integer": ("x.json", b"[" + b"9" * 5000 + b"]", ":1: the file must be a JSON"),
    "json-empty": ("x.json", b"", " must hold at least one record"),
    "json-blank": ("x.json", b" \n", " must hold at least one record"),
    "json-empty-list": ("x.json", b"[]", " must hold at least one record"),
    "csv-short-row": ("x.csv", b"a,b\n1,2\n3\n", ":3: each row must have 2 values.*got 1"),
    "csv-long-row": ("x.csv", b"a,b\n1,2,3\n", ":2: each row must have 2 values.*got 3"),
    "csv-ragged-after-break": ("x.csv", b'a,b\n"1\n1",2\n3\n', ":4: each row must have 2"),
    "csv-unclosed-quote": ("x.csv", b'a,b\n1,2\n"3,4\n', ":3: each row must be comma"),
    "csv-text-after-quote": ("x.csv", b'a\n"b"c\n', ":2: each row must be comma"),
    "csv-twice-a-column": ("x.csv", b"a,a\n1,2\n", ":1: the first row must name"),
    "csv-nameless-column": ("x.csv", b"a,\n1,2\n", ":1: the first row must name"),
    "csv-nothing-but-an-index": ("x.csv", b'""\n1\n', ":1: the first row must name"),
    "csv-two-nameless-columns": ("x.csv", b",a,\n1,2,3\n", ":1: the first row must name"),
    "csv-latin-1": ("x.csv", b"a\nb\n\xe9\n", ":3: the file must be UTF-8"),
    "csv-header-only": ("x.csv", b"a,b\n", " must hold at least one record"),
    "csv-empty": ("x.csv", b"", " must hold at least one record"),
    "text-empty": ("x.txt", b"", " must hold at least one record"),
    "text-blank": ("x.txt", b" \n", " must hold at least one record"),
    "text-latin-1": ("x.txt", b"a\nb\xe9", ":2: the file must be UTF-8"),
    "text-binary": ("x.md", bytes(range(256)), ":2: the file must be UTF-8"),
    "parquet-cut": ("x.parquet", b"PAR1", r"\[0\]: the file must be parquet"),
    "parquet-compressed": ("x.parquet.gz", b"", r"must end in \.jsonl"),
    "no-extension": ("x", GOOD, r"must end in \.jsonl"),
    "zstandard": ("x.jsonl.zst", b"", r"must end in \.jsonl"),
}


@pytest.mark.parametrize(("name", "content", "match"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_files_are_value_errors_with_their_place(
    tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        read(tmp_path, name, content)
    assert str(tmp_path / name) in str(caught.value)


def test_keys_that_are_there_twice_are_counted_in_one_pass() -> None:
    num_comparisons = 0

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal num_comparisons
            num_comparisons += 1
            return str.__eq__(self, other)

    decoder = json_files._Decoder()
    pairs = [(Key(i), i) for i in range(1000)]
    value = decoder._object([*pairs, *((Key(key), i) for key, i in pairs)])
    # a dictionary compares what it finds under the same hash
    assert num_comparisons < 10 * len(pairs)
    with pytest.raises(ValueError, match="'0' twice"):
        decoder.record(value, "", "x:1", "each line")


def complaint(path: Path) -> str:
    try:
        list(read_records(path))
    except ValueError as error:
        return str(error)
    return str(path)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x.txt"])
def test_a_file_cut_anywhere_is_read_or_refused_with_its_place(tmp_path: Path, name: str) -> None:
    content = json.dumps([{"a": "caf\u00e9", "b": [1, {"c": None}]}], ensure_ascii=False).encode()
    path = tmp_path / name
    for end in range(len(content)):
        path.write_bytes(content[:end])
        assert str(path) in complaint(path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    (tmp_path / "notes.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"trian\.jsonl; did you mean train\.jsonl\?"):
        list(read_records(tmp_path / "trian.jsonl"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        list(read_records(tmp_path / "nowhere" / "x.jsonl"))
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="has no data files"):
        list(read_records(tmp_path / "x.jsonl"))


def test_a_name_of_a_list_of_data_sets_is_led_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("identity.bin", "identity.json", "dataset_info.json"):
        (tmp_path / "data" / name).write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*data/identity\.json\?"):
        list(read_records(tmp_path / "identity"))


def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path) -> None:
    contents = {"x.jsonl": GOOD * 2, "x.json": b'[{"a": 1}]', "x.csv": b"a\n1\n", "x.txt": b"a"}
    for name, content in contents.items():
        plain = read(tmp_path, name, content)
        compressed = read(tmp_path, f"{name}.gz", gzip.compress(content))
        assert [record.fields for record in compressed] == [record.fields for record in plain]
        assert compressed[-1].location == plain[-1].location.replace(name, f"{name}.gz")


def test_a_list_is_read_piece_by_piece_wherever_the_pieces_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [{"a": "caf\u00e9 \U0001f9ff" * 3, "b": [1.5, {"c": None}]}, {}, {"d": "\n]"}]
    path = tmp_path / "x.json"
    path.write_text("\ufeff \n" + json.dumps(expected, indent=1, ensure_ascii=False) + "\n\n")
    for size in range(1, 12):
        monkeypatch.setattr(json_files, "_READ_BYTES", size)
        assert [record.fields for record in read_records(path)] == expected
        path_of_bad = tmp_path / "bad.json"
        path_of_bad.write_text('[{"a": 1},\n {"a": 2},\n {"a" 3}]')
        with pytest.raises(ValueError, match=r"bad\.json:3: the file must be a JSON list"):
            list(read_records(path_of_bad))
        path_of_bad.write_bytes(b'[{"a": 1},\n\n {"a": "\xe9"}]')
        with pytest.raises(ValueError, match=r"bad\.json:3: the file must be UTF-8"):
            list(read_records(path_of_bad))


def test_parquet_gives_rows_with_their_numbers(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": f"{i}"}], "n": i} for i in range(3000)]
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    read_rows = list(read_records(path))
    assert [record.fields for record in read_rows] == rows
    assert read_rows[2999].location == f"{path}[2999]"
    parquet.write_table(pyarrow.Table.from_pylist(rows[:0]), path)
    with pytest.raises(ValueError, match="must hold at least one record"):
        list(read_records(path))


def test_nulls_that_parquet_made_go_and_those_of_json_stay(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"arguments": {"item": "a", "tags": []}}]},
                {"role": "tool", "content": "b"},
            ],
            "schema": {"type": "object", "enum": ["x", None]},
        },
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"arguments": {"city": "c"}}]},
                {"role": "assistant", "tool_calls": [{"arguments": {"deep": {"x": 1}}}]},
                {"role": "assistant", "tool_calls": [{"arguments": {"deep": {"y": False}}}]},
            ],
            "text": "",
        },
    ]
    path = tmp_path / "x.parquet"
    schema = pyarrow.Table.from_pylist(rows[:1]).schema.field("schema")
    table = pyarrow.table(
        {
            "messages": pyarrow.array([row["messages"] for row in rows]),
            "schema": pyarrow.array([rows[0]["schema"], None], schema.type),
            "text": [None, ""],
        }
    )
    parquet.write_table(table, path)
    # a column is a field of every record
    expected = [{**rows[0], "text": None}, {**rows[1], "schema": None}]
    assert [record.fields for record in read_records(path)] == expected
    kept = {"a": None, "b": {"c": None, "d": [{"e": None}]}}
    (record,) = read(tmp_path, "x.jsonl", json.dumps(kept).encode())
    assert record.fields == kept


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pip install -e '\.\[parquet\]'"):
        list(read_records(tmp_path / "x.parquet"))


def test_what_is_refused_may_be_left_out_and_the_rest_is_read(tmp_path: Path) -> None:
    contents = {
        "x.jsonl": (GOOD + b'{"a"\n[]\n{"a": "\xff"}\n{"a": "\\ud800"}\n' + GOOD, [2, 3, 4, 5]),
        "x.csv": (b"a,b\n1,2\n3\n4,5,6\n7,8\n", [3, 4]),
        "x.json": (b'[{"a": 1}, 7, {"a": 1, "a": 2}, {"a": 2}]', ["[1]", "[2]"]),
    }
    for name, (content, places) in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        refused: list[ValueError] = []
        assert len(list(read_records(path, refused.append))) == 2
        said = [str(error).partition(": ")[0] for error in refused]
        assert said == [f"{path}:{p}" if isinstance(p, int) else f"{path}{p}" for p in places]


@pytest.mark.parametrize("content", [b'{"a": 1, "a": 2}', b'"a"'])
def test_an_object_that_is_refused_may_be_left_out(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    refused: list[ValueError] = []
    assert list(read_records(path, refused.append)) == []
    assert [str(error).partition(": ")[0] for error in refused] == [f"{path}:1"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.csv", b'a,b\n1,2\n"3,4\n5,6\n'), ("x.json", b'[{"a": 1}, {"a"]'), ("x.txt", b"\xff")],
)
def test_what_leaves_the_rest_in_doubt_is_refused_all_the_same(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused: list[ValueError] = []
    with pytest.raises(ValueError, match=name):
        list(read_records(path, refused.append))
    assert refused == []
