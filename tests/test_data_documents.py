"""data/tokens/documents.py: the pieces that a text encoded as a whole gives, in the memory of a
window."""

import gzip
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from support.data_loads import tokenized, tokenized_in_windows
from support.small_process import in_small_process
from test_data_tokenizer import save_byte_level, save_metaspace

from data.formats.examples import Text
from data.reading import texts
from data.samples import NO_LOSS, Sample, to_sample
from data.tokenizer import Tokenizer
from data.tokens import documents
from data.tokens.documents import cut
from data.tokens.pieces import Counts
from data.tokens.recipe import Recipe
from data.tokens.tokenization import tokenize_files
from foreign import guest
from foreign.guest import in_guest

NOW = datetime(2024, 7, 26)
# of the small windows
CHARACTERS, OVERLAP = 400, 96
TOKENIZERS = ("byte-level", "metaspace", "llama-3", "mistral-v3", "phi-3-mini", "qwen3", "smollm2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    ours = {
        "byte-level": save_byte_level(folder / "byte-level", adds_bos=True),
        "metaspace": save_metaspace(folder / "metaspace"),
    }
    return {name: assets / "tokenizers" / name for name in TOKENIZERS} | ours


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.from_folder(folder) for name, folder in folders.items()}


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_TEXT_CHARACTERS", CHARACTERS)
    monkeypatch.setattr(documents, "_OVERLAP", OVERLAP)


def as_a_whole(text: str, tokenizer: Tokenizer, max_length: int) -> list[Sample]:
    """The pieces of a text that is encoded at once."""
    sample = to_sample(Text(text), tokenizer, train_on="completions")
    pieces = []
    for start in range(0, len(sample.input_ids) - 1, max_length - 1):
        ids, labels = (
            values[start : start + max_length] for values in (sample.input_ids, sample.labels)
        )
        pieces.append(Sample(ids, [NO_LOSS, *labels[1:]] if start else labels))
    return pieces if sample.num_target_tokens else []


def recipe_of(max_length: int, **changes: Any) -> Recipe:
    recipe = Recipe("auto", max_length, "completions", 200_000, NOW, False)
    return replace(recipe, **changes)


def load(
    path: Path, tokenizer: Tokenizer, max_length: int = 17, processes: int = 1, **changes: Any
) -> tuple[list[Sample], Counts]:
    return tokenized([path], tokenizer, recipe_of(max_length, **changes), processes)


def load_in_small_windows(
    path: Path, tokenizer: Path, max_length: int
) -> tuple[list[Sample], Counts]:
    """The same as load(), with small windows, by a process that takes little time to fork."""
    given = (CHARACTERS, OVERLAP, path, tokenizer, recipe_of(max_length))
    return in_small_process(tokenized_in_windows, *given)


SPECIAL = ("</s>", "<s>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>")
ATOMS = (
    *(" ", "\n", "\r\n", "\t", " \n ", "\u00a0", "\n\n"),
    *("hello there, how are you?", "don't", "x", "=", "1234567", "#!", "Hello"),
    *("\u4f60\u597d\uff0c", "e\u0301", "\U0001f9ff", "\U0001f469\u200d\U0001f467", "\u0915\u094d"),
    *SPECIAL,
)


def text_of(seed: int) -> str:
    chance = random.Random(seed)
    runs = (chance.choice(ATOMS) * chance.choice([1, 1, 1, 3, 40]) for _ in range(400))
    ends = ("".join(chance.choices(SPECIAL, k=chance.randrange(3))) for _ in range(2))
    return "".join(runs).join(ends)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_windows_give_the_tokens_of_the_whole(
    tmp_path: Path, folders: dict[str, Path], tokenizers: dict[str, Tokenizer], name: str
) -> None:
    path = tmp_path / "x.txt"
    for seed in range(6):
        text = text_of(seed)
        path.write_bytes(text.encode())
        samples, counts = load_in_small_windows(path, folders[name], 17)
        assert samples == as_a_whole(text, tokenizers[name], 17)
        assert (counts.num_records, counts.num_dropped) == (1, 0)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.usefixtures("small_windows")
def test_windows_without_a_place_to_cut_are_encoded_as_one(
    tmp_path: Path,
    tokenizers: dict[str, Tokenizer],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def counted(work: Callable[[], documents.Encoded], what: str) -> documents.Encoded:
        encoded = in_guest(work, what)
        sizes.append(len(encoded.window.text))
        return encoded

    monkeypatch.setattr(documents, "in_guest", counted)
    text = "one two " * 60 + "ab" * 3000 + " three four" * 60
    path = tmp_path / "x.txt"
    path.write_text(text)
    assert load(path, tokenizers[name])[0] == as_a_whole(text, tokenizers[name], 17)
    # each is twice as long as the one before
    assert 1 <= len(sizes) <= 5
    assert sum(sizes) < 4 * len(text)


@pytest.mark.usefixtures("small_windows")
def test_windows_that_are_encoded_as_one_are_confined(
    tmp_path: Path, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, encode = os.getpid(), Tokenizer.encode_with_words

    def without_end(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int], list[Any]]:
        assert os.getpid() != parent
        guest.allow(len(text))
        while len(text) > 600:
            pass
        return encode(tokenizer, text)

    monkeypatch.setattr(guest, "SECONDS", 0.5)
    monkeypatch.setattr(Tokenizer, "encode_with_words", without_end)
    path = tmp_path / "x.txt"
    path.write_text("one two " * 60 + "ab" * 3000)
    message = (
        r"x\.txt:1: the tokenizer, given [\d,]+ characters at once, must come to an end: it used"
    )
    with pytest.raises(ValueError, match=message):
        load(path, tokenizers["byte-level"])


@pytest.mark.parametrize("name", ["byte-level", "metaspace", "llama-3", "smollm2"])
def test_bos_is_there_once_and_eos_ends_the_text_alone(
    tmp_path: Path, folders: dict[str, Path], tokenizers: dict[str, Tokenizer], name: str
) -> None:
    tokenizer = tokenizers[name]
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    path = tmp_path / "x.txt"
    for text in (
        *("yo", eos, bos, bos + bos, bos + eos, eos * 3, eos + "yo", bos * 3 + "yo" + eos * 3),
        *(bos * 200 + "yo", bos * 200, "yo" + eos * 200, eos * 200 + "yo", eos * 200),
        "yo" + eos * 200 + "yo" + bos * 200 + "yo",
    ):
        path.write_text(text)
        for max_length in (2, 3, 17):
            samples, counts = load_in_small_windows(path, folders[name], max_length)
            assert samples == as_a_whole(text, tokenizer, max_length), text
            assert (counts.num_records, counts.num_without_target) == (1, not samples)


@pytest.mark.parametrize("length", [2, 3, 4, 9, 10, 11])
def test_pieces_of_a_document_predict_every_token_once(
    tokenizers: dict[str, Tokenizer], length: int
) -> None:
    tokenizer = tokenizers["byte-level"]
    ids = list(range(10, 18))
    pieces = [p for part in cut([ids[:3], [], ids[3:]], tokenizer, length) for p in part]
    assert all(2 <= len(piece.input_ids) <= length for piece in pieces)
    assert all(piece.labels == [NO_LOSS, *piece.input_ids[1:]] for piece in pieces)
    assert [label for piece in pieces for label in piece.labels[1:]] == [*ids, 1]
    starts = [piece.input_ids[0] for piece in pieces[1:]]
    assert starts == [piece.input_ids[-1] for piece in pieces[:-1]]


@pytest.mark.usefixtures("small_windows")
def test_the_number_of_processes_changes_no_document(
    tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(text_of(7).encode())
    one, two, three = (load(path, tokenizers["smollm2"], processes=n) for n in (1, 2, 3))
    assert one == two == three


@pytest.mark.usefixtures("small_windows")
def test_documents_keep_their_place_among_other_records(
    tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers["byte-level"]
    paths = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt.gz", "d.txt")]
    texts = [text_of(seed) for seed in range(4)]
    paths[0].write_bytes(texts[0].encode())
    paths[1].write_text('{"text": "one"}\n{"text": "two"}\n')
    paths[2].write_bytes(gzip.compress(texts[2].encode()))
    paths[3].write_bytes(texts[3].encode())
    expected = [sample for path in paths for sample in load(path, tokenizer)[0]]
    given = Recipe("text", 17, "completions", 1000, NOW, False)
    for processes in (1, 2):
        pieces = list(tokenize_files(paths, tokenizer, given, processes)[1])
        ids = np.concatenate([piece.input_ids for piece in pieces])
        assert ids.tolist() == [i for sample in expected for i in sample.input_ids]
        assert sum(piece.counts.num_records for piece in pieces) == 5


@pytest.mark.usefixtures("small_windows")
def test_faults_of_a_long_text_have_their_line(
    tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    content = b"caf\xc3\xa9 au lait\n" * 300
    tokenizer = tokenizers["byte-level"]
    path = tmp_path / "x.txt"
    path.write_bytes(content + b"\xe9\n" + content)
    with pytest.raises(ValueError, match=r"x\.txt:301: the file must be UTF-8: got the byte 0xe9"):
        load(path, tokenizer)
    path.write_bytes(content + b"\xc3")
    with pytest.raises(ValueError, match=r"x\.txt:301: .*byte 0xc3 \(unexpected end of data"):
        load(path, tokenizer)
    broken = tmp_path / "x.txt.gz"
    broken.write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(ValueError, match=r"x\.txt\.gz:30[01]: the file must be whole"):
        load(broken, tokenizer)


@pytest.mark.usefixtures("small_windows")
def test_a_text_that_is_no_record_of_its_format_is_refused_once(
    tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(text_of(1).encode())
    tokenizer = tokenizers["byte-level"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data_format": "messages"}, "a messages record must have the field 'messages': got text"),
        ({"ignored_fields": ("text",)}, "a text record must have the field 'text'"),
    ]
    for changes, match in cases:
        with pytest.raises(ValueError, match=rf"x\.txt:1: {match}"):
            load(path, tokenizer, **changes)
        samples, counts = load(path, tokenizer, skip_bad_lines=True, **changes)
        assert (samples, counts.num_records, counts.num_bad) == ([], 1, 1)


def test_a_token_without_a_row_in_the_model_is_refused(
    tmp_path: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("hello there<|im_end|>")
    with pytest.raises(ValueError, match=r"x\.txt:1: a sample must have tokens of the model's"):
        load(path, tokenizers["byte-level"], vocab_size=3)


def test_memory_does_not_grow_with_a_text(tmp_path: Path, assets: Path) -> None:
    """A text of 8 MB took 1.2 GB where it was encoded as a whole."""
    path = tmp_path / "x.txt"
    text = (assets / "data" / "tinystories_val.txt").read_text()
    code = """
import resource, sys
from pathlib import Path
from data.tokenizer import Tokenizer
from data.dataset import load_dataset
tokenizer = Tokenizer.from_folder(Path(sys.argv[1]))
# of this process, and of those that tokenize for it
WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
def peak(): return max(resource.getrusage(who).ru_maxrss for who in WHO) * 1024
before = peak()
dataset = load_dataset([Path(sys.argv[2])], tokenizer, vocab_size=1000, num_processes=1)
print(dataset.num_tokens, peak() - before)
"""
    growths = []
    for times in (2, 10):
        path.write_text(text * times)
        done = subprocess.run(
            [sys.executable, "-c", code, str(assets / "stories260K"), str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        num_tokens, growth = map(int, done.stdout.split())
        assert num_tokens > 250_000 * times
        growths.append(growth)
    # a window takes 30 MB; a piece of 2,048 tokens has a row of 26 bytes, as any sample
    assert max(growths) < 64 << 20
    assert growths[1] < growths[0] + (16 << 20)
