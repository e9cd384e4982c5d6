"""export/gguf_vocabulary.py: tokens, kinds, merges and scores are the tokenizer's; what GGUF cannot
hold is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.gguf_cases import (
    BUNDLED,
    IN_FRONT,
    NUM_ROWS,
    PIECES,
    SPACES,
    added_token,
    change_tokenizer,
    sentencepiece_model,
    write_model,
    write_sentencepiece,
)

from data.tokenizer import Tokenizer
from export.gguf_vocabulary import Vocabulary, read_vocabulary

LLAMA_3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
TEKKEN = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|"
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|"
    "\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
CONTROL, NORMAL, USER_DEFINED, UNUSED = 3, 1, 4, 5


def read(folder: Path, **config: Any) -> Vocabulary:
    tokenizer = Tokenizer.from_folder(folder)
    return read_vocabulary(folder, tokenizer, folder / "tokenizer.model", config, NUM_ROWS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", "tied")


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def test_byte_level_tokens_merges_and_special_ids_are_the_tokenizers(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    fields = read(folder).fields
    assert fields["model"] == "gpt2"
    assert len(fields["tokens"]) == len(fields["token_type"]) == NUM_ROWS
    for text, i in content["model"]["vocab"].items():
        assert fields["tokens"][i] == text
        assert fields["token_type"][i] == (CONTROL if i < 2 else NORMAL)
    assert fields["tokens"][768:] == [f"[PAD{i}]" for i in range(768, 776)]
    assert fields["token_type"][768:] == [UNUSED] * 8
    assert fields["merges"] == [" ".join(pair) for pair in content["model"]["merges"]]
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (0, 1)
    assert (fields["add_bos_token"], fields["add_eos_token"]) == (True, False)
    template = json.loads((BUNDLED / "tokenizer_config.json").read_text())["chat_template"]
    assert fields["chat_template"] == template


@pytest.mark.parametrize(
    ("name", "pre_tokenizer", "ignore_merges"),
    [
        ("gpt-2", byte_level(True), False),
        (
            "smollm",
            sequence({"type": "Digits", "individual_digits": True}, byte_level(True)),
            False,
        ),
        ("llama-bpe", sequence(split(LLAMA_3), byte_level(False)), True),
        ("dbrx", sequence(split(LLAMA_3), byte_level(False)), False),
        ("qwen2", sequence(split(QWEN_2), byte_level(False)), False),
        ("tekken", sequence(split(TEKKEN), byte_level(False)), True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pre_tokenizer_is_named_by_its_steps(
    folder: Path, name: str, pre_tokenizer: dict[str, Any], ignore_merges: bool
) -> None:
    change_tokenizer(
        folder,
        pre_tokenizer=pre_tokenizer,
        normalizer={"type": "NFC"},
        model={"ignore_merges": ignore_merges},
    )
    assert read(folder).fields["pre"] == name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": sequence(split("x"), byte_level(False))}, "has no name in llama.cpp"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "divides text by Whitespace, and llama.cpp"),
        ({"pre_tokenizer": None}, "has no name in llama.cpp"),
        ({"model": {"ignore_merges": True}}, "has no name in llama.cpp"),
        ({"pre_tokenizer": byte_level(True) | {"add_prefix_space": True}}, "by ByteLevel"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizes text by Lowercase"),
        ({"model": {"dropout": 0.1}}, "has dropout 0.1, which byte-level BPE has not"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tokenizer_that_gguf_cannot_hold_is_refused_by_name(
    folder: Path, changes: dict[str, Any], reason: str
) -> None:
    change_tokenizer(folder, **changes)
    with pytest.raises(ValueError, match=f"--gguf must be for a tokenizer .*{reason}.* leave --gg"):
        read(folder)


def test_a_token_that_stands_twice_is_refused(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    # the name of an unused row
    twice = added_token(770, "[PAD771]")
    change_tokenizer(folder, added_tokens=[*content["added_tokens"], twice])
    with pytest.raises(ValueError, match=r"has the token '\[PAD771\]' twice"):
        read(folder)


def test_a_word_model_is_refused(folder: Path) -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text()) | {"model": model, "added_tokens": []}
    path.write_text(json.dumps(content | {"post_processor": None, "pre_tokenizer": None}))
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a WordLevel model, not BPE"):
        read(folder)


def test_added_tokens_have_their_kinds_and_those_without_a_row_are_left_out(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    more = [
        added_token(768, "<tool>"),
        added_token(769, "<|fim|>"),
        added_token(770, "<end>", special=True),
        added_token(NUM_ROWS, "<pad>", special=True),
    ]
    change_tokenizer(folder, added_tokens=content["added_tokens"] + more)
    fields = read(folder).fields
    assert fields["tokens"][768:772] == ["<tool>", "<|fim|>", "<end>", "[PAD771]"]
    assert fields["token_type"][768:772] == [USER_DEFINED, CONTROL, CONTROL, UNUSED]
    assert len(fields["tokens"]) == NUM_ROWS


def test_special_tokens_that_the_tokenizer_does_not_name_are_the_configs(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    change_tokenizer(folder, post_processor=None)
    fields = read(folder, bos_token_id=5, eos_token_id=7, pad_token_id=NUM_ROWS).fields
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (5, 1)
    assert "padding_token_id" not in fields
    assert fields["add_bos_token"] is False


def test_what_is_added_around_a_text_is_bos_and_eos_or_it_is_refused(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    processor = content["post_processor"]
    end = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"<|im_end|>": {"id": "<|im_end|>", "ids": [1], "tokens": ["<|im_end|>"]}}
    processor["special_tokens"] |= tokens
    processor["single"] = [text, end]
    change_tokenizer(folder, post_processor=processor)
    fields = read(folder).fields
    assert (fields["add_bos_token"], fields["add_eos_token"]) == (False, True)
    processor["single"] = [end, text]
    change_tokenizer(folder, post_processor=processor)
    with pytest.raises(ValueError, match=r"adds \[1\] before a text and \[\] behind it"):
        read(folder)


def test_bos_is_not_added_where_conversations_are_without(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    vocabulary = read(folder)
    assert vocabulary.fields["add_bos_token"] is False
    assert "the chat template does not begin with <|im_start|>" in vocabulary.remarks[0]
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert read(folder).fields["add_bos_token"] is True


def test_tokens_that_take_in_spaces_are_said_and_phi_3s_are_named(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    end = added_token(768, "<end>", special=True, rstrip=True)
    change_tokenizer(folder, added_tokens=[*content["added_tokens"], end])
    vocabulary = read(folder)
    assert vocabulary.family == ""
    assert "take in the spaces beside them, as <end> does" in vocabulary.remarks[0]
    phi = [
        added_token(768, "<|endoftext|>", special=True),
        added_token(769, "<|end|>", special=True, rstrip=True),
    ]
    write_sentencepiece(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    added = content["added_tokens"] + phi
    added[2]["rstrip"] = True
    change_tokenizer(folder, added_tokens=added)
    vocabulary = read(folder)
    assert (vocabulary.family, list(vocabulary.remarks)) == ("Phi-3", [])


def test_pieces_have_their_scores_and_kinds(folder: Path) -> None:
    write_sentencepiece(folder, [{"content": "<tool\u2581call>", "special": False}])
    fields = read(folder).fields
    num_pieces = len(PIECES)
    assert (fields["model"], fields["pre"]) == ("llama", "default")
    assert fields["tokens"][:num_pieces] == [text for text, *_ in PIECES]
    # the three special tokens are added tokens, too: no merge may make one
    assert fields["scores"][:num_pieces] == [-1000.0] * 3 + [score for _, score, _ in PIECES[3:]]
    kinds = [kind if kind == 6 else NORMAL for *_, kind in PIECES[3:]]
    assert fields["token_type"][:num_pieces] == [CONTROL] * 3 + kinds
    assert fields["tokens"][num_pieces : num_pieces + 2] == [
        "<tool call>",
        f"[PAD{num_pieces + 1}]",
    ]
    assert fields["token_type"][num_pieces : num_pieces + 2] == [USER_DEFINED, UNUSED]
    assert fields["scores"][num_pieces : num_pieces + 2] == [-1000.0, -10000.0]
    assert fields["add_space_prefix"] is True
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["unknown_token_id"]) == (1, 2, 0)
    assert fields["add_bos_token"] is True


def metaspace(scheme: str) -> dict[str, Any]:
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": scheme,
            "split": False,
        },
    }


GEMMA = {
    "normalizer": SPACES,
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
}


@pytest.mark.parametrize(
    ("changes", "has_space", "num_remarks"),
    [
        (GEMMA, False, 0),
        (metaspace("always"), True, 0),
        (metaspace("never"), False, 0),
        (metaspace("first"), False, 1),
    ],
    ids=["gemma", "always", "never", "first"],
)
def test_a_space_in_front_is_the_tokenizers(
    folder: Path, changes: dict[str, Any], has_space: bool, num_remarks: int
) -> None:
    write_sentencepiece(folder)
    change_tokenizer(folder, **changes)
    vocabulary = read(folder)
    assert vocabulary.fields["add_space_prefix"] is has_space
    assert len(vocabulary.remarks) == num_remarks


def test_pieces_are_refused_that_are_missing_or_another_tokenizers(folder: Path) -> None:
    write_sentencepiece(folder)
    path = folder / "tokenizer.model"
    others = [*PIECES[:-1], ("x", -9.0, 1)]
    path.write_bytes(sentencepiece_model(others))
    with pytest.raises(ValueError, match="'x' is 268 in the one and None in the other; download b"):
        read(folder)
    path.write_bytes(sentencepiece_model(PIECES[:-1]))
    with pytest.raises(ValueError, match=r"must have the pieces of .*: 'f' is missing"):
        read(folder)
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"--gguf must find tokenizer\.model, which has the s"
    ):
        read(folder)
    write_sentencepiece(folder)
    lower = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, IN_FRONT, SPACES]}
    change_tokenizer(folder, normalizer=lower)
    with pytest.raises(ValueError, match="prepares text by Lowercase, Prepend, Replace"):
        read(folder)
