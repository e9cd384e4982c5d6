"""data/tokens/confinement.py: templates and tokenizers that take all time or all memory end in a
message that names the record, and in no process that stays."""

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support.hostile_templates import CHAT, DEEP, ROUND_IN_CIRCLES, WITHOUT_BOUNDS, WITHOUT_END
from test_data_tokenizer import save_byte_level
from test_foreign_guest import children
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from data.chat.template import ChatTemplate
from data.chat.template_marks import marks_without_token
from data.prompt import encode_prompt
from data.tokenizer import Tokenizer
from data.tokens import workers
from data.tokens.confinement import Confinement, begin_record
from data.tokens.pieces import Counts
from data.tokens.recipe import Recipe
from data.tokens.tokenization import tokenize_files
from foreign import guest

# wall clock, on a machine that others use as well
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(guest, "SECONDS", 0.5)
    monkeypatch.setattr(guest, "NUM_BYTES", 512 << 20)
    start, before = time.monotonic(), children()
    yield
    assert time.monotonic() - start < PATIENCE_S
    assert children() == before


def chat_data(folder: Path, num_records: int = 1, user: str = "hi") -> Path:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": "yo"}]
    path = folder / "data.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * num_records)
    return path


def tokenize(
    path: Path, tokenizer: Tokenizer, num_processes: int = 1, *, skip_bad_lines: bool = False
) -> Counts:
    now = datetime(2024, 7, 26)
    recipe = Recipe("auto", 64, "completions", 1000, now, skip_bad_lines)
    counts = Counts()
    for piece in tokenize_files([path], tokenizer, recipe, num_processes)[1]:
        counts.add(piece.counts)
    return counts


def with_template(folder: Path, template: str) -> Tokenizer:
    return Tokenizer.from_folder(save_byte_level(folder / "model", template=template))


@pytest.mark.parametrize("case", WITHOUT_END)
def test_a_template_without_end_is_ended_and_its_record_named(case: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, WITHOUT_END[case] + CHAT)
    with pytest.raises(ValueError, match=r"data.jsonl:1: a record must be tokenized within 0.5 s"):
        tokenize(chat_data(tmp_path), tokenizer)


@pytest.mark.parametrize("case", WITHOUT_BOUNDS)
def test_a_template_without_bounds_is_refused(case: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, WITHOUT_BOUNDS[case] + CHAT)
    with pytest.raises((ValueError, ChildProcessError), match=r"data.jsonl:1: (the conv|a record)"):
        tokenize(chat_data(tmp_path), tokenizer)


@pytest.mark.parametrize("case", ROUND_IN_CIRCLES)
def test_a_template_that_goes_round_in_circles_is_refused(case: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, ROUND_IN_CIRCLES[case] + CHAT)
    with pytest.raises(ValueError, match=r"data.jsonl:1: the conversation must suit"):
        tokenize(chat_data(tmp_path), tokenizer)


@pytest.mark.parametrize("case", ["loops", "power", "constant-power"])
def test_a_prompt_in_a_template_without_end_is_refused(case: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, WITHOUT_END[case] + CHAT)
    with pytest.raises(ValueError, match=r"the prompt, .* must come to an end: it used 0.5 s"):
        encode_prompt("hi", tokenizer, 1000)


@pytest.mark.parametrize("case", DEEP)
def test_a_template_nested_beyond_reason_is_no_jinja(case: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, DEEP[case] + CHAT)
    assert tokenizer.fingerprint(datetime(2024, 7, 26))
    message = r"data.jsonl:1: the chat template .* must be valid Jinja|a record must be tokenized"
    with pytest.raises(ValueError, match=message):
        tokenize(chat_data(tmp_path), tokenizer)


def test_a_template_beyond_reason_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have at most 500,000 characters: got 600,000"):
        with_template(tmp_path, "x" * 600_000)


# while others go on, and when they have nothing left to do
@pytest.mark.parametrize("number", [70, 300])
def test_the_slow_record_is_named_among_many_processes(number: int, tmp_path: Path) -> None:
    tokenizer, path = slow_records(tmp_path, {number: "slow"})
    with pytest.raises(ValueError, match=rf"data.jsonl:{number}: a record must be tokenized with"):
        tokenize(path, tokenizer, num_processes=3)


def slow_records(folder: Path, users: dict[int, str]) -> tuple[Tokenizer, Path]:
    """A template that does not come to an end where the user says "slow", and 300 records of which
    some say what is given by their numbers."""
    slow = "{% if messages[0].content == 'slow' %}" + WITHOUT_END["loops"] + "{% endif %}"
    path = chat_data(folder, num_records=300)
    lines = path.read_text().splitlines()
    for number, user in users.items():
        lines[number - 1] = lines[number - 1].replace("hi", user)
    path.write_text("\n".join(lines) + "\n")
    return with_template(folder, slow + CHAT), path


@pytest.mark.parametrize("num_processes", [1, 3])
def test_slow_records_are_left_out_and_counted_where_bad_lines_are(
    num_processes: int, tmp_path: Path
) -> None:
    tokenizer, path = slow_records(tmp_path, {1: "slow", 70: "slow", 300: "slow"})
    path.write_text(path.read_text() + "{\n")
    counts = tokenize(path, tokenizer, num_processes, skip_bad_lines=True)
    assert (counts.num_records, counts.num_bad, counts.num_rendered) == (301, 4, 297)
    places = {error.removeprefix(str(path)).split(" ")[0] for error in counts.bad}
    assert places <= {":1:", ":70:", ":300:", ":301:"}


def test_a_record_beyond_the_memory_is_left_out_and_counted(tmp_path: Path) -> None:
    tokenizer = with_backend(tmp_path, normalize(*[normalizers.Replace("q", "qq")] * 60))
    path = chat_data(tmp_path, num_records=3)
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("hi", "q")
    path.write_text("\n".join(lines))
    counts = tokenize(path, tokenizer, skip_bad_lines=True)
    assert (counts.num_records, counts.num_bad) == (3, 1)
    assert counts.bad[0].startswith(f"{path}:2: a record must be tokenized within ")


def test_a_template_that_never_ends_is_not_tried_with_every_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_MOST_LEFT_OUT", 2)
    tokenizer = with_template(tmp_path, WITHOUT_END["loops"] + CHAT)
    path = chat_data(tmp_path, num_records=300)
    message = r"data.jsonl:\d+: a record must be .*; 2 such records were left out already: the temp"
    with pytest.raises(ValueError, match=message):
        tokenize(path, tokenizer, 2, skip_bad_lines=True)


def test_a_slow_text_is_no_line_to_be_left_out(tmp_path: Path) -> None:
    tokenizer = with_backend(tmp_path, normalize(*[normalizers.Replace("h", "hh")] * 60))
    path = tmp_path / "x.txt"
    path.write_text("hi")
    with pytest.raises((ValueError, ChildProcessError), match=r"x\.txt:1") as caught:
        tokenize(path, tokenizer, skip_bad_lines=True)
    # it was tried once
    assert "left out already" not in str(caught.value)


Change = Callable[[tokenizers.Tokenizer], None]


def with_backend(folder: Path, change: Change) -> Tokenizer:
    model = save_byte_level(folder / "model", template=CHAT)
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    change(backend)
    backend.save(str(model / "tokenizer.json"))
    return Tokenizer.from_folder(model)


def normalize(*steps: normalizers.Normalizer) -> Change:
    def change(backend: tokenizers.Tokenizer) -> None:
        backend.normalizer = normalizers.Sequence(list(steps))

    return change


def split(pattern: str) -> Change:
    def change(backend: tokenizers.Tokenizer) -> None:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")

    return change


def test_a_tokenizer_that_doubles_a_letter_without_end_is_not_read(tmp_path: Path) -> None:
    change = normalize(*[normalizers.Replace("a", "aa")] * 60)
    with pytest.raises(ValueError, match=r"the tokenizer of .*/model must come to an end: it used"):
        with_backend(tmp_path, change)


@pytest.mark.parametrize("pattern", ["h", Regex("h|x")], ids=["text", "regular-expression"])
def test_a_decoder_that_doubles_a_letter_without_end_is_ended(pattern: str, tmp_path: Path) -> None:
    def change(backend: tokenizers.Tokenizer) -> None:
        steps = [decoders.Replace(pattern, "hh") for _ in range(60)]
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), *steps])

    tokenizer = with_backend(tmp_path, change)
    assert tokenizer.decode(tokenizer.encode("yo", add_special_tokens=False)) == "yo"
    with pytest.raises(ValueError, match=r"the tokenizer of .*/model must come to an end: it used"):
        tokenizer.decode(tokenizer.encode("hi", add_special_tokens=False))


def test_a_decoder_of_the_usual_kind_needs_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = [
        decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1)]
        ),
        decoders.ByteLevel(),
        decoders.Metaspace(),
        decoders.WordPiece(),
        None,
    ]
    for decoder in usual:

        def change(backend: tokenizers.Tokenizer, decoder: Any = decoder) -> None:
            backend.decoder = decoder

        tokenizer = with_backend(tmp_path, change)
        with monkeypatch.context() as patch:
            patch.setattr("data.tokenizer.in_guest", lambda *_: pytest.fail("it was forked"))
            assert tokenizer.decode([5, 6])


def test_marks_of_a_template_that_grow_without_end_are_refused(tmp_path: Path) -> None:
    change = normalize(*[normalizers.Replace("q", "qq")] * 60)
    tokenizer = with_backend(tmp_path, change)
    template = ChatTemplate("<|question|>", "the template", {})
    with pytest.raises(ValueError, match="the template, whose marks are tokenized, must come to"):
        marks_without_token(template, tokenizer)


BACKTRACKS = {
    # the library ends this one itself, and panics
    "normalizer": (normalize(normalizers.Replace(Regex("(h+)+$"), "x")), "h" * 60 + "b"),
    "split": (split("(h+)+$"), "h" * 60 + "b"),
    # each match takes less than where it does so, and there are many
    "split-many-times": (split("(h{1,30}){1,9}x|(h*h*h*h*y)"), "h" * 400),
    "normalizer-of-other-letters": (
        normalize(*[normalizers.Replace("h", "hh")] * 60),
        "hi",
    ),
}


@pytest.mark.parametrize("case", BACKTRACKS)
def test_a_tokenizer_that_takes_for_ever_is_ended_and_its_record_named(
    case: str, tmp_path: Path
) -> None:
    change, text = BACKTRACKS[case]
    tokenizer = with_backend(tmp_path, change)
    with pytest.raises((ValueError, ChildProcessError), match=r"data.jsonl:1(: |; run again)"):
        tokenize(chat_data(tmp_path, user=text), tokenizer)


def test_outside_of_a_confined_process_nothing_is_limited() -> None:
    Confinement(1)
    begin_record("x:1")
    end = time.process_time() + 1.5
    while time.process_time() < end:
        pass


def test_a_prompt_with_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    # so Python gives an argument that is not UTF-8
    with pytest.raises(ValueError, match=r"a prompt must be valid Unicode: got h\\udcffi; write"):
        encode_prompt("h\udcffi", with_template(tmp_path, CHAT), 1000)
