"""Files of every format, damaged at random: each is refused with its place, or means what it says.

A mutation that breaks a record for certain must be refused with file and line. One that may leave
it whole (a byte here or there) is held against a plain reading of the file with Python's own
libraries: what that refuses is refused, and what is accepted is what that reads.
"""

import csv
import gzip
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.dataset_loads import loaded
from support.small_process import in_small_process
from test_data_tokenizer import save_byte_level

from data.reading.files import read_records
from data.samples import Sample
from data.tokens.pieces import Counts

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NUM_RECORDS = 5
Records = list[dict[str, Any]]

RECORDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "messages": lambda i: {
        "messages": [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": f"h\u00e9llo, {i}"},
        ]
    },
    "sharegpt": lambda i: {
        "conversations": [{"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": "yo"}]
    },
    "alpaca": lambda i: {"instruction": f"say {i}", "input": "now", "output": f"hello, {i}"},
    "prompt-completion": lambda i: {"prompt": f"say {i}", "completion": f'"h\u00e9llo", {i}'},
    "text": lambda i: {"text": f"h\u00e9llo there,\nhow {i} are you?"},
    "tokenized": lambda i: {"input_ids": [0, 5, 6 + i, 1], "labels": [-100, 5, 6 + i, 1]},
}
# what a csv file can hold
FLAT = ("alpaca", "prompt-completion", "text")


def write_json_lines(records: Records) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def write_json(records: Records) -> bytes:
    return json.dumps(records, ensure_ascii=False, indent=1).encode()


def write_csv(records: Records) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def write_parquet(records: Records) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(records)
    parquet.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue().to_pybytes()


WRITERS: dict[str, Callable[[Records], bytes]] = {
    "x.jsonl": write_json_lines,
    "x.json": write_json,
    "x.csv": write_csv,
    "x.parquet": write_parquet,
    "x.jsonl.gz": lambda records: gzip.compress(write_json_lines(records)),
}


def damage_record(record: dict[str, Any], random: random.Random) -> None:
    """Make a record wrong: a field that is needed is gone, or of another kind, deep or not."""
    name = random.choice([key for key in record if key != "input"])
    value = record[name]
    if random.random() < 0.25:
        del record[name]
    elif not isinstance(value, list) or random.random() < 0.3:
        others: list[Any] = [None, 7, 0.5, True, {}, {"text": "a"}, [["a"]]]
        record[name] = random.choice([*others, *(["text"] if isinstance(value, list) else [])])
    elif isinstance(value[0], dict):
        turn = value[-1]
        key = random.choice(list(turn))
        if random.random() < 0.3:
            del turn[key]
        else:
            turn[key] = random.choice([None, 7, True, {}, [3], ["a"]])
        if random.random() < 0.2:
            value[-1] = random.choice(["assistant", None, 3, []])
    elif random.random() < 0.5:
        value[random.randrange(len(value))] = random.choice([None, "5", 5.0, True, [5], 10**9, -7])
    else:
        del value[-1]
    # an input is a request where no instruction is
    if name == "instruction" and record.get(name) is None:
        record.pop("input", None)


def broken_structure(name: str, content: bytes, random: random.Random) -> bytes:
    """Break what a file of its kind must be, for certain."""
    if name == "x.jsonl":
        lines = content.splitlines(keepends=True)
        index = random.randrange(len(lines))
        line = lines[index].rstrip(b"\n")
        lines[index] = random.choice(
            [
                line[: random.randrange(1, len(line))] + b"\n",
                line.replace(b'"', b"'") + b"\n",
                line.replace(b":", b"", 1) + b"\n",
                line[:-1] + b",}\n",
                line + b"," + b"\n",
                line + line + b"\n",
                b"[" + line + b"]\n",
                line[:-1] + b', "text": "a", "text": "b"}\n',
                line.replace(b'": ', b'": \x01', 1) + b"\n",
                line[:9] + b"\xff" + line[9:] + b"\n",
                line.replace(b'"}', b'\\ud800"}').replace(b"]}", b'], "a": "\\udfff"}') + b"\n",
                json.dumps(line.decode()).encode() + b"\n",
            ]
        )
        return b"".join(lines)
    if name == "x.json":
        at = random.randrange(1, len(content) - 1)
        return random.choice(
            [
                content[:at],
                content[1:],
                content + b"]",
                content + content,
                content[:-1] + b",]",
                content.replace(b"},\n {", b"}\n {", 1),
                content.replace(b"},\n {", b"}, 7,\n {", 1),
                content.replace(b"},\n {", b"}, null,\n {", 1),
                b'{"records": ' + content + b"}",
                content.replace(b'"', b"'"),
                content[:at] + b"\xff" + content[at:],
            ]
        )
    if name == "x.csv":
        lines = content.splitlines(keepends=True)
        index = random.randrange(1, len(lines))
        head = lines[0].rstrip(b"\n")
        return random.choice(
            [
                content + b'"a',
                content + b'"a"b\n',
                content + b",".join([b"a"] * (head.count(b",") + 2)) + b"\n",
                b"".join([b"x" + head, b"\n", *lines[1:]]),
                b"".join([head + b"," + head.split(b",")[0], b"\n", *lines[1:]]),
                b"".join([head + b",\n", *lines[1:]]),
                b"".join([*lines[:index], b"\xe9", *lines[index:]]),
                head,
                b"",
            ]
        )
    at = random.randrange(4, len(content) - 1)
    return random.choice(
        [
            content[:at],
            content[at:],
            content[:-8] + b"\x00" * 8,
            content[::-1],
            content[: at // 2] + content[at:],
        ]
    )


def flipped(content: bytes, random: random.Random) -> bytes:
    """Change, insert or delete a byte, or a few."""
    changed = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 5])):
        at = random.randrange(len(changed))
        match random.randrange(3):
            case 0:
                changed[at] ^= 1 << random.randrange(8)
            case 1:
                changed.insert(at, random.choice(b'"{}[],:\\\n\r\x00\xff a1'))
            case _:
                del changed[at]
    return bytes(changed)


class Folder:
    """Loads files as train.py does, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer = save_byte_level(path / "tokenizer")

    def load(
        self, name: str, content: bytes, data_format: str, **options: Any
    ) -> tuple[list[Sample], Counts]:
        path = self.path / name
        path.write_bytes(content)
        options |= {"data_format": data_format, "vocab_size": 1000}
        return in_small_process(loaded, path, self.tokenizer, "chatml", **options)

    def refusal(self, name: str, content: bytes, data_format: str) -> str | None:
        """What it says with a place, None if it takes the file; another error passes through."""
        try:
            self.load(name, content, data_format)
        except ValueError as error:
            refused = error
        else:
            return None
        assert type(refused) is ValueError
        place = re.match(re.escape(str(self.path / name)) + r"(:\d+|\[\d+\])", str(refused))
        assert place or "must hold at least one" in str(refused), refused
        return str(refused)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("fuzz"))


CASES = [
    (name, data_format)
    for name in WRITERS
    for data_format in RECORDS
    if name != "x.csv" or data_format in FLAT
]
NUM_EACH = 12


def records_of(data_format: str) -> Records:
    return [RECORDS[data_format](i) for i in range(NUM_RECORDS)]


@pytest.mark.parametrize(("name", "data_format"), CASES)
def test_the_files_are_good_before_they_are_damaged(
    folder: Folder, name: str, data_format: str
) -> None:
    samples, _ = folder.load(name, WRITERS[name](records_of(data_format)), data_format)
    expected, _ = folder.load("x.jsonl", write_json_lines(records_of(data_format)), "auto")
    assert samples == expected
    assert len(samples) == NUM_RECORDS


@pytest.mark.parametrize(
    ("name", "data_format"), [(n, f) for n, f in CASES if n not in ("x.csv", "x.parquet")]
)
def test_wrong_records_are_refused_with_their_place_or_skipped_and_counted(
    folder: Folder, name: str, data_format: str
) -> None:
    for seed in range(NUM_EACH):
        chance = random.Random(f"{name} {data_format} {seed}")
        records = records_of(data_format)
        index = chance.randrange(NUM_RECORDS)
        damage_record(records[index], chance)
        content = WRITERS[name](records)
        said = folder.refusal(name, content, data_format)
        place = f"[{index}]" if name == "x.json" else f":{index + 1}"
        assert said, records[index]
        assert said.startswith(f"{folder.path / name}{place}: "), said
        samples, counts = folder.load(name, content, data_format, skip_bad_lines=True)
        assert (len(samples), counts.num_bad) == (NUM_RECORDS - 1, 1)
        assert counts.bad == [said]


@pytest.mark.parametrize("data_format", FLAT)
def test_wrong_columns_of_parquet_are_refused(folder: Folder, data_format: str) -> None:
    # an input is a request where no instruction is
    records = [{k: v for k, v in r.items() if k != "input"} for r in records_of(data_format)]
    for name in records[0]:
        for value in (None, 7, 0.5, b"a", ["a"], {"a": "b"}):
            wrong = [{**record, name: value} for record in records]
            assert folder.refusal("x.parquet", write_parquet(wrong), data_format), value
        without = [{k: v for k, v in record.items() if k != name} for record in records]
        without = [record or {"other": "a"} for record in without]
        assert folder.refusal("x.parquet", write_parquet(without), data_format)


@pytest.mark.parametrize(("name", "data_format"), CASES)
def test_broken_files_are_refused_with_their_place(
    folder: Folder, name: str, data_format: str
) -> None:
    content = WRITERS[name](records_of(data_format))
    for seed in range(NUM_EACH):
        chance = random.Random(f"{name} {data_format} {seed} broken")
        broken = broken_structure(name, content, chance)
        assert folder.refusal(name, broken, data_format), broken


def plain_reading(name: str, content: bytes) -> Records | None:
    """The records by Python's own libraries, None where they or the rules of the house refuse."""
    try:
        text = content.decode("utf-8-sig")
        if name == "x.csv":
            rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
            rows = [row for row in rows if row]
            names = [column.strip() for column in rows[0]]
            is_table = all(len(row) == len(names) == len(set(names)) for row in rows)
            return [dict(zip(names, row, strict=True)) for row in rows[1:]] if is_table else None
        if name == "x.json":
            records = json.loads(text)
        else:
            records = [
                json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()
            ]
        for record in records:
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, csv.Error, IndexError):
        return None
    is_right = isinstance(records, list) and all(isinstance(r, dict) for r in records)
    return records if is_right else None


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
@pytest.mark.parametrize("data_format", ["prompt-completion", "text"])
def test_a_file_with_changed_bytes_is_refused_or_means_what_it_says(
    folder: Folder, name: str, data_format: str
) -> None:
    content = WRITERS[name](records_of(data_format))
    needed = list(records_of(data_format)[0])
    num_taken = 0
    for seed in range(10 * NUM_EACH):
        changed = flipped(content, random.Random(f"{name} {data_format} {seed} flipped"))
        expected = plain_reading(name, changed)
        is_right = bool(expected) and all(
            isinstance(record.get(key), str) for record in expected or [] for key in needed
        )
        said = folder.refusal(name, changed, data_format)
        # an old Mac's line ends are a csv that Python reads in one way and not in another
        if name == "x.csv" and b"\r" in changed:
            continue
        assert (said is None) == is_right, (said, changed)
        if said is None:
            num_taken += 1
            assert [r.fields for r in read_records(folder.path / name)] == expected
    assert 0 < num_taken < 10 * NUM_EACH


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.gz"])
def test_changed_bytes_of_what_has_checksums_change_no_record(folder: Folder, name: str) -> None:
    records = records_of("prompt-completion")
    content = WRITERS[name](records)
    num_refused = 0
    for seed in range(10 * NUM_EACH):
        changed = flipped(content, random.Random(f"{name} {seed} flipped"))
        said = folder.refusal(name, changed, "prompt-completion")
        num_refused += said is not None
        if said is None:
            assert [record.fields for record in read_records(folder.path / name)] == records
    assert num_refused > 5 * NUM_EACH


def test_texts_that_are_none_are_refused(folder: Folder) -> None:
    content = b"hello there, how are you?\n" * 3
    for seed in range(NUM_EACH):
        chance = random.Random(seed)
        at = chance.randrange(len(content))
        broken = content[:at] + bytes([chance.randrange(0x80, 0x100)]) + content[at:]
        assert folder.refusal("x.txt", broken, "auto")
    for blank in (b"", b"\n", b" \t\r\n", b"\xef\xbb\xbf"):
        assert folder.refusal("x.txt", blank, "auto")
