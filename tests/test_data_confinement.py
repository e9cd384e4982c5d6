"""data/confinement.py: templates and tokenizers that take all time or all memory end in a message
that names the record, and in no process that stays."""

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from test_data_tokenizer import save_byte_level
from test_foreign_guest import children
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from data.chat_template import ChatTemplate
from data.confinement import Confinement, begin_record
from data.prompt import encode_prompt
from data.template_marks import marks_without_token
from data.tokenization import Recipe, tokenize_files
from data.tokenizer import Tokenizer
from foreign import guest

# wall clock, on a machine that others use as well
PATIENCE_S = 60
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(guest, "SECONDS", 1.0)
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


def tokenize(path: Path, tokenizer: Tokenizer, num_processes: int = 1) -> int:
    recipe = Recipe("auto", "text", 64, "completions", 1000, datetime(2024, 7, 26), False)
    _, pieces = tokenize_files([path], tokenizer, recipe, num_processes)
    return sum(len(piece.rows) for piece in pieces)


def with_template(folder: Path, template: str) -> Tokenizer:
    return Tokenizer.from_folder(save_byte_level(folder / "model", template=template))


GROWS = "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = GROWN %}{% endfor %}"
WITHOUT_END = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "power": "{% set n = messages | length + 7 %}{{ 10 ** (10 ** n) > 1 }}",
    # worked out where the template is compiled
    "constant-power": "{{ 10 ** (10 ** 9) > 1 }}",
    "text": "{% for i in range(9999) %}{% for j in range(9999) %}a{% endfor %}{% endfor %}",
}
WITHOUT_BOUNDS = {
    "centre": "{{ 'a'.center(10 ** 11) }}",
    "centre-filter": "{{ 'a' | center(10 ** 11) }}",
    "product": "{{ 'a' * 10 ** 11 }}",
    "list": "{{ [0] * 10 ** 11 }}",
    "width": "{{ '%100000000000d' % 1 }}",
    "format-width": "{{ '{:>100000000000}'.format(1) }}",
    "indent": "{{ 'a\nb' | indent(10 ** 11) }}",
    "json-indent": "{{ [1] | tojson(indent=10 ** 11) }}",
    "sum-of-itself": GROWS.replace("GROWN", "ns.s + ns.s"),
    "joined-to-itself": GROWS.replace("GROWN", "ns.s ~ ns.s"),
    "list-of-itself": GROWS.replace("GROWN", "ns.s | list + ns.s | list"),
    "joined-by-itself": GROWS.replace("GROWN", "ns.s.join(ns.s * 3)"),
    "replaced-by-itself": GROWS.replace("GROWN", "ns.s.replace('', ns.s)"),
}


@pytest.mark.parametrize("case", WITHOUT_END)
def test_a_template_without_end_is_ended_and_its_record_named(case: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, WITHOUT_END[case] + CHAT)
    with pytest.raises(ValueError, match=r"data.jsonl:1: a record must be tokenized within 1 sec"):
        tokenize(chat_data(tmp_path), tokenizer)


@pytest.mark.parametrize("case", WITHOUT_BOUNDS)
def test_a_template_without_bounds_is_refused(case: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, WITHOUT_BOUNDS[case] + CHAT)
    with pytest.raises((ValueError, ChildProcessError), match=r"data.jsonl:1: (the conv|a record)"):
        tokenize(chat_data(tmp_path), tokenizer)


@pytest.mark.parametrize("case", ["loops", "power", "constant-power"])
def test_a_prompt_in_a_template_without_end_is_refused(case: str, tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, WITHOUT_END[case] + CHAT)
    with pytest.raises(ValueError, match=r"the prompt, .* must come to an end: it has taken 1 sec"):
        encode_prompt("hi", tokenizer, 1000)


DEEP = {
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "conditions": "{% if true %}" * 300 + "{% endif %}" * 300,
    "loops": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "signs": "{{ " + "-" * 50_000 + "1 }}",
    "filters": "{{ 'a'" + " | upper" * 20_000 + " }}",
}


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
    slow = "{% if messages[0].content == 'slow' %}" + WITHOUT_END["loops"] + "{% endif %}"
    tokenizer = with_template(tmp_path, slow + CHAT)
    path = chat_data(tmp_path, num_records=300)
    lines = path.read_text().splitlines()
    lines[number - 1] = lines[number - 1].replace("hi", "slow")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"data.jsonl:{number}: a record must be tokenized with"):
        tokenize(path, tokenizer, num_processes=3)


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
    with pytest.raises(ValueError, match=r"the tokenizer of .*/model must come to an end: it has"):
        with_backend(tmp_path, change)


@pytest.mark.parametrize("pattern", ["h", Regex("h|x")], ids=["text", "regular-expression"])
def test_a_decoder_that_doubles_a_letter_without_end_is_ended(pattern: str, tmp_path: Path) -> None:
    def change(backend: tokenizers.Tokenizer) -> None:
        steps = [decoders.Replace(pattern, "hh") for _ in range(60)]
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), *steps])

    tokenizer = with_backend(tmp_path, change)
    assert tokenizer.decode(tokenizer.encode("yo", add_special_tokens=False)) == "yo"
    with pytest.raises(ValueError, match=r"the tokenizer of .*/model must come to an end: it has"):
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
