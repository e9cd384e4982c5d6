"""Tiny checkpoints with tokenizers that GGUF can hold, written without the product's code."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint

BUNDLED = ROOT / "bundled" / "model"
# rows of the embeddings, some more than the bundled tokenizer has tokens
NUM_ROWS = 776
# what llama.cpp's architectures need that other tests' checkpoints have not
CHANGES: dict[str, dict[str, Any]] = {
    "llama3-rope": {"head_dim": 8, "num_key_value_heads": 2},
    "gemma2": {"query_pre_attn_scalar": 12},
}


def write_model(
    folder: Path, variant: str, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Write a checkpoint of one of VARIANTS with the bundled tokenizer beside it."""
    fields = FIELDS | VARIANTS[variant] | CHANGES.get(variant, {}) | {"vocab_size": NUM_ROWS}
    fields |= changes
    write_checkpoint(folder, fields, random_tensors(fields, dtype))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    return folder


def change_tokenizer(folder: Path, **changes: Any) -> None:
    """Replace parts of a folder's tokenizer.json; of the model, only the given fields."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= changes.pop("model", {})
    path.write_text(json.dumps(content | changes))


# text, score and kind (2 unknown, 3 control, 4 of a user, 6 a byte), as SentencePiece has them
PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
PIECES += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
PIECES += [("\u2581a", 0.0, 1), ("bc", -1.0, 1), ("\u2581abc", -2.5, 4)]
PIECES += [(letter, -3.0 - i, 1) for i, letter in enumerate("\u2581abcdef")]
IN_FRONT = {"type": "Prepend", "prepend": "\u2581"}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def write_sentencepiece(folder: Path, added: Sequence[dict[str, Any]] = ()) -> None:
    """Replace a folder's tokenizer by one of PIECES, and write its tokenizer.model."""
    tokens = {text: i for i, (text, *_) in enumerate(PIECES)}
    special = [added_token(i, PIECES[i][0], special=True) for i in range(3)]
    more = [
        added_token(**{"id": len(PIECES) + i, "special": True, **token})
        for i, token in enumerate(added)
    ]
    ids = {token["content"]: token["id"] for token in more}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special + more,
        "normalizer": {"type": "Sequence", "normalizers": [IN_FRONT, SPACES]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": tokens | {text: i for text, i in ids.items() if text not in tokens},
            "merges": [["\u2581", "a"], ["b", "c"], ["\u2581a", "bc"]],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())


def added_token(id: int, content: str, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": id, "content": content, **dict.fromkeys(names, False), **flags}


def sentencepiece_model(pieces: Sequence[tuple[str, float, int]] = tuple(PIECES)) -> bytes:
    """A ModelProto of these pieces, and a field that no reader here knows."""
    messages = []
    for text, score, kind in pieces:
        message = field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        # the kind of most pieces is left out
        messages.append(message + (b"\x18" + bytes([kind]) if kind != 1 else b""))
    return b"".join(field(1, message) for message in messages) + field(2, b"\x08\x01")


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])
