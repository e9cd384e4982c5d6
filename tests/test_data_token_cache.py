"""data/tokens/token_cache.py: tokens are made once, found again for the same content only, and
never half or damaged."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from support.chat_cases import CHATML, say
from test_data_tokenizer import save_byte_level

from data.samples import NO_LOSS, Sample
from data.tokenizer import Tokenizer
from data.tokens import token_cache
from data.tokens.pieces import ROW, TOKEN
from data.tokens.recipe import Recipe
from data.tokens.stored_samples import StoredSamples
from data.tokens.token_cache import Tokens, cache_folder, cached_tokens
from data.tokens.tokenization import tokenize_files

RECIPE = Recipe("auto", 64, "completions", 1000, datetime(2024, 7, 26), False)
RECORDS = [{"prompt": f"say {i}", "completion": "hello"} for i in range(5)]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(save_byte_level(tmp_path / "tokenizer"), chat_template="chatml")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def tokens(path: Path, tokenizer: Tokenizer, recipe: Recipe = RECIPE) -> Tokens:
    return cached_tokens([path], tokenizer, recipe, 1, lambda num_records: None)


def made() -> list[Path]:
    return [path for path in cache_folder().iterdir() if path.is_dir()]


def test_what_was_made_is_found_and_is_the_same(path: Path, tokenizer: Tokenizer) -> None:
    first, again = tokens(path, tokenizer), tokens(path, tokenizer)
    assert (first.is_cached, again.is_cached) == (False, True)
    assert list(first.samples) == list(again.samples)
    assert (first.sha256, first.counts, first.format) == (
        again.sha256,
        again.counts,
        "prompt-completion",
    )
    # a name is no content
    moved = path.rename(path.with_name("y.jsonl"))
    assert tokens(moved, tokenizer).is_cached
    assert len(made()) == 1


def test_a_system_prompt_is_no_setting_that_is_passed_over(
    path: Path, tokenizer: Tokenizer
) -> None:
    tokens(path, tokenizer)
    with pytest.raises(ValueError, match="--system-prompt must be given with conversations"):
        tokens(path, tokenizer, replace(RECIPE, system_prompt="Be kind."))


@pytest.mark.parametrize(
    "change",
    [
        {"data_format": "prompt-completion"},
        {"field_names": {"completion": "prompt", "prompt": "completion"}},
        {"ignored_fields": ("id",)},
        {"max_length": 63},
        {"train_on": "all"},
        {"vocab_size": 999},
        {"skip_bad_lines": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_makes_it_another(path: Path, tokenizer: Tokenizer, change: dict) -> None:
    tokens(path, tokenizer)
    assert not tokens(path, tokenizer, replace(RECIPE, **change)).is_cached


def test_fields_that_are_named_are_part_of_what_is_found(path: Path, tokenizer: Tokenizer) -> None:
    swapped = replace(RECIPE, field_names={"completion": "prompt", "prompt": "completion"})
    first = tokens(path, tokenizer)
    other = tokens(path, tokenizer, swapped)
    assert list(first.samples) != list(other.samples)
    assert tokens(path, tokenizer, swapped).is_cached
    assert list(tokens(path, tokenizer).samples) == list(first.samples)


def test_other_source_code_in_any_file_of_the_room_makes_it_another(
    path: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = token_cache._ROOM
    assert {"tokenizer.py", "chat/template.py"} < {
        file.relative_to(room).as_posix() for file in room.rglob("*.py")
    }
    monkeypatch.setattr(token_cache, "_ROOM", tmp_path / "data")
    code = tmp_path / "data" / "chat" / "template.py"
    code.parent.mkdir(parents=True)
    code.write_text("a")
    tokens(path, tokenizer)
    assert tokens(path, tokenizer).is_cached
    code.write_text("b")
    assert not tokens(path, tokenizer).is_cached


def test_other_bytes_or_another_tokenizer_make_it_another(
    path: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokens(path, tokenizer)
    for adds_eos, template in ((True, None), (False, CHATML + " ")):
        folder = save_byte_level(tmp_path / "other", adds_eos=adds_eos, template=template)
        assert not tokens(path, Tokenizer.from_folder(folder)).is_cached
    path.write_text(path.read_text() + "\n")
    assert not tokens(path, tokenizer).is_cached


@pytest.mark.parametrize(
    ("template", "is_same_at_five", "is_same_tomorrow"),
    [
        (CHATML, True, True),
        ("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", True, False),
        ("{{ strftime_now('%H') }}", False, True),
        ("{% set f = '%d' %}{{ strftime_now(f) }}", False, False),
        ("{% set clock = strftime_now %}{{ clock('%Y') }}", False, False),
        ("{% if %}", False, False),
    ],
    ids=["no-clock", "day", "hour", "variable", "alias", "invalid"],
)
def test_the_time_counts_as_far_as_templates_read_it(
    path: Path, tmp_path: Path, template: str, is_same_at_five: bool, is_same_tomorrow: bool
) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path / "tokenizer", template=template))
    tokens(path, tokenizer)
    later = replace(RECIPE, now=datetime(2024, 7, 26, 5))
    assert tokens(path, tokenizer, later).is_cached == is_same_at_five
    tomorrow = replace(RECIPE, now=datetime(2024, 7, 27))
    assert tokens(path, tokenizer, tomorrow).is_cached == is_same_tomorrow


@pytest.mark.parametrize("name", ["input_ids.bin", "labels.bin", "rows.bin", "index.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "longer"])
def test_a_damaged_cache_is_made_again(
    path: Path, tokenizer: Tokenizer, name: str, damage: str
) -> None:
    first = tokens(path, tokenizer)
    expected = list(first.samples)
    (folder,) = made()
    file = folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    changed = {"flipped": content, "cut": content[:-9], "longer": content + b"x" * 4}
    file.unlink() if damage == "gone" else file.write_bytes(changed[damage])
    again = tokens(path, tokenizer)
    assert list(again.samples) == expected
    assert again.counts == first.counts
    assert (again.is_cached, again.sha256) == (False, first.sha256)
    assert tokens(path, tokenizer).is_cached


def test_a_fault_leaves_nothing_behind(path: Path, tokenizer: Tokenizer) -> None:
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:6"):
        tokens(path, tokenizer)
    assert made() == []


@pytest.mark.parametrize("hides", ["nothing", "the time", "the content"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, hides: str
) -> None:
    original, before = path.read_text(), path.stat()

    def rewrite_and_tokenize(*arguments: Any) -> Any:
        path.write_text(original.replace("say", "cry"))
        name, pieces = tokenize_files(*arguments)
        pieces = list(pieces)
        if hides == "the time":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if hides == "the content":
            path.write_text(original)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        return name, iter(pieces)

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "tokenize_files", rewrite_and_tokenize)
        with pytest.raises(OSError, match=r"must stay as it is while .*x\.jsonl has changed since"):
            tokens(path, tokenizer)
    assert made() == []
    path.write_text(original)
    found = tokens(path, tokenizer)
    assert not found.is_cached
    prompt = tokenizer.decode(found.samples[0].input_ids)
    assert ("say" in prompt, "cry" in prompt) == (True, False)


def test_what_a_killed_process_left_is_not_taken_for_whole(
    path: Path, tokenizer: Tokenizer
) -> None:
    expected = list(tokens(path, tokenizer).samples)
    (folder,) = made()
    partial = folder.rename(folder.with_name(f"{folder.name}.partial"))
    (partial / "more").write_bytes(b"")
    assert list(tokens(path, tokenizer).samples) == expected
    assert made() == [folder]


def test_processes_that_want_the_same_make_it_once(path: Path, tmp_path: Path) -> None:
    folder = save_byte_level(tmp_path / "shared")
    path.write_text(path.read_text() * 2000)
    code = """
import sys
from datetime import datetime
from pathlib import Path
from data.tokens.recipe import Recipe
from data.tokens.token_cache import cached_tokens
from data.tokenizer import Tokenizer
recipe = Recipe("auto", 64, "completions", 1000, datetime(2024, 7, 26), False)
tokenizer = Tokenizer.from_folder(Path(sys.argv[1]))
tokens = cached_tokens([Path(sys.argv[2])], tokenizer, recipe, 1, lambda n: None)
print(tokens.is_cached, len(tokens.samples), tokens.sha256)
"""
    command = [sys.executable, "-c", code, str(folder), str(path)]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = sorted(process.communicate()[0].split() for process in both)
    assert [line[0] for line in said] == ["False", "True"]
    assert said[0][1:] == said[1][1:]


def test_a_cache_that_cannot_be_written_says_so(
    path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    with pytest.raises(OSError, match=r"must be written to .*Not a directory.*XDG_CACHE_HOME"):
        tokens(path, tokenizer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*make room"):
        tokens(path, tokenizer)
    assert made() == []


def test_a_cache_that_is_deleted_while_it_is_used_is_read_to_its_end(
    path: Path, tokenizer: Tokenizer
) -> None:
    samples = tokens(path, tokenizer).samples
    before = list(samples)
    shutil.rmtree(cache_folder())
    assert list(samples) == before


@pytest.mark.parametrize("name", ["input_ids.bin", "labels.bin"])
def test_a_cache_that_is_cut_while_it_is_used_ends_in_a_message(
    path: Path, tokenizer: Tokenizer, name: str
) -> None:
    samples = tokens(path, tokenizer).samples
    (folder,) = made()
    os.truncate(folder / name, (folder / name).stat().st_size - 4)
    assert samples[0].input_ids
    with pytest.raises(OSError, match=rf"{name} must stay as it is .* cut since; start again"):
        samples[len(samples) - 1]
    again = tokens(path, tokenizer)
    assert not again.is_cached
    assert len(list(again.samples)) == len(RECORDS)


def test_conversations_are_counted_for_their_templates(path: Path, tokenizer: Tokenizer) -> None:
    path.write_text(json.dumps({"messages": say("a", "b")}))
    counts = tokens(path, tokenizer).counts
    assert (counts.num_rendered, counts.num_rendered_with_tools) == (1, 0)


def test_samples_are_a_sequence_made_on_demand() -> None:
    rows = np.zeros(3, ROW)
    rows["length"] = [2, 3, 1]
    ids = np.arange(6, dtype=TOKEN)
    labels = np.where(ids % 2 == 0, NO_LOSS, ids).astype(TOKEN)
    samples = StoredSamples(ids, labels, rows)
    assert list(samples) == [
        Sample([0, 1], [NO_LOSS, 1]),
        Sample([2, 3, 4], [NO_LOSS, 3, NO_LOSS]),
        Sample([5], [5]),
    ]
    assert samples[-1] == samples[2]
    assert samples[1:] == list(samples)[1:]
    assert samples[:0] == []
    with pytest.raises(IndexError):
        samples[3]
    chosen = samples.select(np.array([True, False, True]))
    assert list(chosen) == [samples[0], samples[2]]
    assert chosen.lengths.tolist() == [2, 1]
