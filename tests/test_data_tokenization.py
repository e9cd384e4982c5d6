"""data/tokens/tokenization.py: the same samples, counts and faults from any number of processes, in
bounded memory."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_cases import say
from test_data_tokenizer import save_byte_level

from data.formats.examples import TokenIds
from data.reading.record import Record
from data.samples import NO_LOSS, to_sample
from data.tokenizer import Tokenizer
from data.tokens import tokenization
from data.tokens.pieces import Counts, Piece, is_closed
from data.tokens.recipe import Recipe
from data.tokens.tokenization import tokenize_files, tokenize_records


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(
        save_byte_level(tmp_path_factory.mktemp("tokenizer")), chat_template="chatml"
    )


def recipe(**changes: object) -> Recipe:
    given = {
        "data_format": "auto",
        "max_length": 64,
        "train_on": "completions",
        "vocab_size": 1000,
        "now": datetime(2024, 7, 26),
        "skip_bad_lines": False,
    }
    return Recipe(**{**given, **changes})  # pyright: ignore[reportArgumentType]


def tokens_of(path: Path, tokenizer: Tokenizer, processes: int, **changes: object):
    name, pieces = tokenize_files([path], tokenizer, recipe(**changes), processes)
    counts = Counts()
    taken: list[Piece] = []
    for piece in pieces:
        counts.add(piece.counts)
        taken.append(piece)
    arrays = [
        np.concatenate([getattr(piece, part) for piece in taken])
        for part in ("input_ids", "labels", "rows")
    ]
    return name, counts, [array.tobytes() for array in arrays]


def write(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def many(count: int) -> list[object]:
    return [{"prompt": f"say {i}", "completion": "hello " * (i % 30)} for i in range(count)]


def test_the_number_of_processes_changes_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = many(700)
    records[100] = {"prompt": "no answer"}
    records[500] = {"text": 5}
    path = write(tmp_path / "x.jsonl", records)
    path.write_text(path.read_text() + "{\n" * 3 + json.dumps(records[1]) + "\n")
    one, two, three = (tokens_of(path, tokenizer, n, skip_bad_lines=True) for n in (1, 2, 3))
    assert one == two == three
    counts = one[1]
    assert (counts.num_records, counts.num_bad) == (704, 5)
    assert [error.partition(": ")[0] for error in counts.bad] == [
        f"{path}:{line}" for line in (101, 501, 701)
    ]


@pytest.mark.parametrize(
    ("num_processors", "num_bytes", "expected"),
    [(4, 1 << 22, 4), (4, 1 << 20, 2), (4, 10, 1), (None, 1 << 22, 1)],
    ids=["all", "two", "one", "unknown"],
)
def test_a_system_that_tells_only_how_many_processors_it_has_uses_those_worth_it(
    num_processors: int | None,
    num_bytes: int,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: num_processors)
    (tmp_path / "x").write_bytes(bytes(num_bytes))
    assert tokenization._worthwhile_processes([tmp_path / "x"]) == expected


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_fault_of_the_file_is_reported(
    tmp_path: Path, tokenizer: Tokenizer, processes: int
) -> None:
    records = many(400)
    records[300] = {"prompt": "no answer"}
    path = write(tmp_path / "x.jsonl", records)
    # the reader meets this one long before the other is tokenized
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:301: a prompt-completion record must have"):
        tokens_of(path, tokenizer, processes)
    records[300] = records[0]
    path = write(path, records)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:401: each line must be one JSON object"):
        tokens_of(path, tokenizer, processes)


def test_of_two_faults_in_different_tasks_the_first_is_reported(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    records = many(400)
    records[100] = records[200] = {"prompt": "no answer"}
    path = write(tmp_path / "x.jsonl", records)
    for processes in (1, 2):
        with pytest.raises(ValueError, match=r"x\.jsonl:101: a prompt-completion record must have"):
            tokens_of(path, tokenizer, processes)


def test_what_is_wrong_with_every_record_is_no_bad_line(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, config={}))
    path = write(tmp_path / "x.jsonl", many(3))
    with pytest.raises(ValueError, match="must have an eos_token"):
        tokens_of(path, tokenizer, 1, skip_bad_lines=True)


USER, ANSWER = ({"role": role, "content": "abc"} for role in ("user", "assistant"))
SAID, DEVELOPER = ({"role": role, "content": "Be kind."} for role in ("system", "developer"))


@pytest.mark.parametrize("train_on", ["completions", "all"])
@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ANSWER, USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "output": "b"},
        {"prompt": [USER], "completion": [ANSWER]},
    ],
    ids=lambda record: next(iter(record)),
)
def test_a_system_prompt_is_as_if_the_record_had_it(
    tmp_path: Path, tokenizer: Tokenizer, record: dict[str, object], train_on: str
) -> None:
    def tokens(record: dict[str, object], **changes: object):
        path = write(tmp_path / "x.jsonl", [record])
        return tokens_of(path, tokenizer, 1, train_on=train_on, max_length=256, **changes)

    actual = tokens(record, system_prompt="Be kind.")
    assert actual == tokens({**record, "system": "Be kind."})
    assert actual != tokens(record)


@pytest.mark.parametrize("own", [SAID, DEVELOPER], ids=lambda message: message["role"])
def test_a_system_prompt_of_its_own_stays_alone(
    tmp_path: Path, tokenizer: Tokenizer, own: dict[str, str]
) -> None:
    path = write(tmp_path / "x.jsonl", [{"messages": [own, USER, ANSWER]}])
    plain = tokens_of(path, tokenizer, 1, max_length=256)
    assert tokens_of(path, tokenizer, 1, max_length=256, system_prompt="Be brief.") == plain


@pytest.mark.parametrize(
    "record",
    [{"text": "abc"}, {"prompt": "a", "completion": "b"}, {"input_ids": [1, 2], "labels": [1, 2]}],
    ids=lambda record: next(iter(record)),
)
def test_a_system_prompt_is_refused_where_it_would_do_nothing(
    tmp_path: Path, tokenizer: Tokenizer, record: dict[str, object]
) -> None:
    path = write(tmp_path / "x.jsonl", [record])
    with pytest.raises(ValueError, match="--system-prompt must be given with conversations"):
        tokens_of(path, tokenizer, 1, system_prompt="Be kind.")


def test_ignored_fields_change_neither_the_format_nor_the_samples(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    records = many(3)
    expected = tokens_of(write(tmp_path / "x.jsonl", records), tokenizer, 1)
    beside = [{**r, "mood": "m", "messages": "old"} for r in records if isinstance(r, dict)]
    path = write(tmp_path / "x.jsonl", list(beside))
    ignored = {"ignored_fields": ("mood", "messages")}
    assert tokens_of(path, tokenizer, 1, **ignored) == expected
    with pytest.raises(ValueError, match=r"x\.jsonl:1: .*lost: got mood, messages beside prompt"):
        tokens_of(path, tokenizer, 1, data_format="prompt-completion")


def test_fields_that_are_named_make_the_samples_of_our_names(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    records = [{"prompt": f"say {i}", "completion": "hello"} for i in range(3)]
    name, _, expected = tokens_of(write(tmp_path / "x.jsonl", [*records]), tokenizer, 1)
    theirs = [{"q": r["prompt"], "a": r["completion"]} for r in records]
    path = write(tmp_path / "x.jsonl", [*theirs, {"q": "no answer"}])
    given = {"field_names": {"prompt": "q", "completion": "a"}}
    with pytest.raises(ValueError, match=r"x\.jsonl:4: --fields completion=a must .* got q;"):
        tokens_of(path, tokenizer, 1, **given)
    found = tokens_of(path, tokenizer, 1, skip_bad_lines=True, **given)
    assert (found[0], found[1].num_bad, found[2]) == (name, 1, expected)
    with pytest.raises(ValueError, match=r"x\.jsonl:1: --fields prompt=x must .* got q, a;"):
        tokens_of(path, tokenizer, 1, field_names={"prompt": "x"})
    with pytest.raises(ValueError, match="fields of the format text, text: got prompt"):
        tokens_of(path, tokenizer, 1, data_format="text", **given)


@pytest.mark.parametrize(
    ("first", "other", "missing"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, {"input": "b", "output": "c"}, "instr"),
        ({"question": "a", "answer": "b"}, {"query": "a", "answer": "b"}, "question"),
        ({"question": "a", "answer": "b"}, {"question": "a", "response": "b"}, "answer"),
    ],
)
def test_names_are_those_of_the_first_record(
    tmp_path: Path, tokenizer: Tokenizer, first: object, other: object, missing: str
) -> None:
    path = write(tmp_path / "x.jsonl", [first, first, other])
    for data_format in ("auto", "alpaca"):
        with pytest.raises(ValueError, match=rf"x\.jsonl:3: .* must have the field '{missing}"):
            tokens_of(path, tokenizer, 1, data_format=data_format)


def test_preference_data_is_refused_with_its_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pair = {"prompt": "say", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "x.jsonl", [pair])
    with pytest.raises(ValueError, match=r"x\.jsonl:1: .*not preference data .*got chosen, rej"):
        tokens_of(path, tokenizer, 1)


def test_nothing_but_bad_lines_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{\n[]\n")
    with pytest.raises(ValueError, match=r"a record that can be read: got 2 that cannot, .*:1: "):
        tokens_of(path, tokenizer, 1, skip_bad_lines=True)


def test_two_bos_are_refused_with_their_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good, bad = [0, 5, 6], [0, 0, 6]
    path = write(tmp_path / "x.jsonl", [{"input_ids": i, "labels": i} for i in (good, bad)])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: a sample must begin with one BOS at most"):
        tokens_of(path, tokenizer, 1)


def test_a_killed_process_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(records: object, *rest: object) -> None:
        os._exit(9)

    monkeypatch.setattr(tokenization, "tokenize_records", die)
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path / "tokenizer"))
    path = write(tmp_path / "x.jsonl", many(300))
    with pytest.raises(ChildProcessError, match=r"one was killed.*--dataset-num-proc 1"):
        tokens_of(path, tokenizer, 2)


# what a process does for a chunk that holds Python's lock for hours: backtracking in a pattern
HOLD = """
import re, threading
from data.tokens import tokenization
tokenization.tokenize_records = lambda *given: re.match("(a*)*$", "a" * 40 + "b")
threading.Timer(2, print, ("started",), {"flush": True}).start()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
@pytest.mark.parametrize("before", ["", HOLD], ids=["at rest", "in a call that holds Python"])
def test_a_killed_parent_leaves_no_process(
    tmp_path: Path, before: str, number: signal.Signals
) -> None:
    save_byte_level(tmp_path / "tokenizer")
    path = write(tmp_path / "x.jsonl", many(64 * 20))
    code = """
import sys, time
from datetime import datetime
from pathlib import Path
from data.tokenizer import Tokenizer
from data.tokens.recipe import Recipe
from data.tokens.tokenization import tokenize_files
tokenizer = Tokenizer.from_folder(Path(sys.argv[1]))
recipe = Recipe("auto", 64, "completions", 1000, datetime.now(), False)
_, pieces = tokenize_files([Path(sys.argv[2])], tokenizer, recipe, 2)
next(pieces)
print("started", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", before + code, str(tmp_path / "tokenizer"), str(path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        os.kill(parent.pid, number)
        parent.wait()
    for _ in range(200):
        try:
            os.killpg(parent.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(parent.pid, signal.SIGKILL)
    pytest.fail("the tokenizing processes outlived their parent by 10 s")


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    save_byte_level(tmp_path / "tokenizer")
    path = tmp_path / "x.jsonl"
    note = "x" * 1500
    with path.open("w") as file:
        for i in range(60_000):
            file.write(json.dumps({"prompt": str(i), "completion": "yo", "meta": note}) + "\n")
    code = """
import resource, sys
from pathlib import Path
from data.tokenizer import Tokenizer
from data.dataset import load_dataset
tokenizer = Tokenizer.from_folder(Path(sys.argv[1]))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
dataset = load_dataset([Path(sys.argv[2])], tokenizer, vocab_size=1000, num_processes=1)
print(len(dataset.samples), peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokenizer"), str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    num_samples, growth = map(int, done.stdout.split())
    assert num_samples == 60_000
    # rows, starts and their temporaries are 42 bytes a sample; a chunk has 64 records
    assert growth < 42 * num_samples + 2 * 64 * 2000 + (16 << 20) < path.stat().st_size / 4


PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=24)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)


@PROPERTY
@given(turns=TURNS, drop_last=st.booleans())
def test_exactly_what_the_assistant_says_is_learned_and_ends_closed(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], drop_last: bool
) -> None:
    # the template's own marks must not be in the text: they would be tokens
    clean = [tuple(text.replace("<|", "").strip() for text in turn) for turn in turns]
    messages = say(*(text for turn in clean for text in turn))
    messages += [{"role": "user", "content": "bye"}] if drop_last else []
    record = Record("x:1", {"messages": messages})
    piece = tokenize_records([record], "messages", tokenizer, recipe(max_length=10**6))
    labels = piece.labels.tolist()
    learned = tokenizer.decode([i for i in labels if i != NO_LOSS], skip_special_tokens=False)
    assert learned == "".join(f"{answer}<|im_end|>\n" for _, answer in clean)
    where = piece.labels != NO_LOSS
    assert (piece.labels[where] == piece.input_ids[where]).all()
    assert piece.rows["is_closed"].all()


RECORDS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6)


@PROPERTY
@given(
    pairs=RECORDS, max_length=st.integers(2, 40), train_on=st.sampled_from(["completions", "all"])
)
def test_every_record_is_kept_cut_or_dropped_once(
    tokenizer: Tokenizer, pairs: list[tuple[str, str]], max_length: int, train_on: str
) -> None:
    records = [Record("x:1", {"prompt": p, "completion": c}) for p, c in pairs]
    given = recipe(max_length=max_length, train_on=train_on)
    piece = tokenize_records(records, "prompt-completion", tokenizer, given)
    whole = tokenize_records(
        records, "prompt-completion", tokenizer, recipe(max_length=10**6, train_on=train_on)
    )
    counts, lengths = piece.counts, whole.rows["length"]
    assert counts.num_records == len(records) == len(piece.rows) + counts.num_dropped
    assert counts.num_without_target == len(records) - len(lengths)
    assert counts.num_truncated == int((lengths > max_length).sum())
    assert (piece.rows["length"] <= max_length).all()
    assert (piece.rows["num_targets"] > 0).all()
    assert piece.rows["length"].sum() == len(piece.input_ids) == len(piece.labels)
    # what is kept is the beginning of what it was
    starts = np.cumsum(lengths) - lengths
    kept = []
    for start, length in zip(starts, lengths, strict=True):
        end = start + min(length, max_length)
        if (whole.labels[start + 1 : end] != NO_LOSS).any():
            kept.append(whole.input_ids[start:end])
    assert np.array_equal(piece.input_ids, np.concatenate([*kept, piece.input_ids[:0]]))
    is_whole = ~piece.rows["is_truncated"]
    assert piece.rows["is_closed"][is_whole].all()


def test_closed_is_what_ends_in_eos_whitespace_apart(tokenizer: Tokenizer) -> None:
    space, letter = (tokenizer.encode(text, add_special_tokens=False) for text in (" ", "#"))
    for labels, expected in (
        ([NO_LOSS, *letter, 1], True),
        ([NO_LOSS, *letter, 3, *space], True),
        ([NO_LOSS, *letter, 1, NO_LOSS], True),
        ([NO_LOSS, *letter], False),
        ([1, *letter], False),
        ([1], False),
        ([NO_LOSS, 0], False),
    ):
        sample = to_sample(TokenIds([5] * len(labels), labels), tokenizer, train_on="completions")
        assert is_closed(sample, tokenizer) == expected, labels
