"""data/tokenizer.py, and the small tokenizers that the other data tests share."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.tokenizer import Tokenizer

BYTE_LEVEL_SPECIALS = ["<|begin|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|header|>"]


def save_byte_level(
    folder: Path,
    *,
    adds_bos: bool = True,
    adds_eos: bool = False,
    config: dict[str, object] | None = None,
    template: str | None = None,
) -> Path:
    """A byte-level BPE tokenizer in the way of Llama 3 and Qwen; its post-processor trims
    offsets."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=BYTE_LEVEL_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello there, how are you? hello hello"], trainer)
    members: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    begin, end = ("<|begin|> " if adds_bos else ""), (" <|end_of_text|>" if adds_eos else "")
    if begin or end:
        specials = [(token, backend.token_to_id(token)) for token in BYTE_LEVEL_SPECIALS[:2]]
        members.append(processors.TemplateProcessing(f"{begin}$A{end}", special_tokens=specials))
    backend.post_processor = processors.Sequence(members)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    default = {"bos_token": "<|begin|>", "eos_token": "<|end_of_text|>"}
    content = json.dumps(default if config is None else config)
    (folder / "tokenizer_config.json").write_text(content)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def save_metaspace(folder: Path) -> Path:
    """A sentencepiece-like BPE tokenizer with byte fallback, in the way of Llama 2 and Mistral."""
    characters = "\u2581abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ[]/.,:!?<|>_#"
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *characters]
    merges = [("h", "i"), ("\u2581", "hi"), ("y", "o"), ("\u2581", "yo"), (".", "<"), ("!", "!")]
    names += ["".join(pair) for pair in merges]
    vocabulary = {name: i for i, name in enumerate(names)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(config))
    return folder


def test_special_tokens_are_read_as_text_and_as_objects(tmp_path: Path) -> None:
    byte_level = Tokenizer.from_folder(save_byte_level(tmp_path / "a"))
    assert (byte_level.bos_token, byte_level.bos_token_id) == ("<|begin|>", 0)
    assert (byte_level.eos_token, byte_level.eos_token_id) == ("<|end_of_text|>", 1)
    metaspace = Tokenizer.from_folder(save_metaspace(tmp_path / "b"))
    assert (metaspace.bos_token, metaspace.bos_token_id) == ("<s>", 1)
    assert (metaspace.eos_token, metaspace.eos_token_id) == ("</s>", 2)


def test_missing_special_tokens_are_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, config={"bos_token": None}))
    assert tokenizer.bos_token is None
    assert tokenizer.bos_token_id is None
    assert tokenizer.eos_token is None
    assert tokenizer.eos_token_id is None
    assert not tokenizer.adds_bos


@pytest.mark.parametrize("adds_bos", [True, False])
def test_adds_bos_is_what_encoding_does_not_what_the_config_says(
    tmp_path: Path, adds_bos: bool
) -> None:
    config = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "add_bos_token": not adds_bos}
    folder = save_byte_level(tmp_path, adds_bos=adds_bos, config=config)
    assert Tokenizer.from_folder(folder).adds_bos is adds_bos


@pytest.mark.parametrize("save", [save_byte_level, save_metaspace])
def test_text_survives_encode_and_decode(tmp_path: Path, save) -> None:
    tokenizer = Tokenizer.from_folder(save(tmp_path))
    text = "hello there\n\n  caf\u00e9 \U0001f9ff!"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True)) == text


def test_vocab_size_bounds_every_id(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_metaspace(tmp_path))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert tokenizer.vocab_size == 1 + max(content["model"]["vocab"].values())


@pytest.mark.parametrize("save", [save_byte_level, save_metaspace])
def test_offsets_cover_whitespace_and_every_character(tmp_path: Path, save) -> None:
    tokenizer = Tokenizer.from_folder(save(tmp_path))
    text = "hello  there \n\n \U0001f9ff you "
    ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=True)
    assert len(ids) == len(offsets)
    assert offsets[0] == (0, 0)
    covered = {i for start, end in offsets[1:] for i in range(start, end)}
    assert covered == set(range(len(text)))
    assert all(start < end for start, end in offsets[1:])


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello there, you", True)) == "hello there, you"
    assert len(tokenizer.encode("a", False)) == 1


def test_a_conversation_with_tools_has_the_template_for_tools(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, config={"chat_template": named}))
    assert tokenizer.chat_template().text == "d"
    assert tokenizer.chat_template(has_tools=True).text == "t"
    assert tokenizer.chat_template(has_tools=True).name.endswith("config.json named 'tool_use'")


def test_no_template_for_a_conversation_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path / "a"))
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match=r"got none in .*; give one with --chat-template"):
        tokenizer.chat_template()
    config: dict[str, object] = {"chat_template": [{"name": "rag", "template": "r"}]}
    folder = save_byte_level(tmp_path / "b", config=config)
    with pytest.raises(ValueError, match=r"must be named default: got rag; choose one by its name"):
        Tokenizer.from_folder(folder).chat_template()
    assert Tokenizer.from_folder(folder, "rag").chat_template().text == "r"


def test_a_template_that_was_asked_for_must_be_jinja(tmp_path: Path) -> None:
    folder = save_byte_level(tmp_path, template="{% if %}")
    Tokenizer.from_folder(folder)
    with pytest.raises(ValueError, match=r"chat_template\.jinja must be valid Jinja"):
        Tokenizer.from_folder(folder, "default")


def test_special_tokens_follow_the_configuration_or_the_older_map(tmp_path: Path) -> None:
    config: dict[str, object] = {"eos_token": "<|im_end|>", "pad_token": None}
    folder = save_byte_level(tmp_path, config=config)
    older = {"eos_token": "<|end_of_text|>", "unk_token": {"content": "<|header|>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps(older))
    unk = {"unk_token": "<|header|>"}
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.special_tokens == {"eos_token": "<|end_of_text|>", **unk}
    listed = config | {"added_tokens_decoder": {"3": {"content": "<|im_end|>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(listed))
    assert Tokenizer.from_folder(folder).special_tokens == {"eos_token": "<|im_end|>", **unk}


@pytest.mark.parametrize(
    ("listed", "match"),
    [
        ({"300": {"content": "<|new|>"}}, r"got '<\|new\|>' for id 300, which there is None"),
        ({"2": {"content": "<|im_end|>"}}, r"for id 2, which there is '<\|im_start\|>'"),
        ({"x": {"content": "<|im_end|>"}}, "for id x, which there is None"),
        ({"2": 3}, "got None for id 2"),
        ([1], "must be an object of token ids: got list"),
    ],
)
def test_added_tokens_that_the_files_disagree_about_are_refused(
    tmp_path: Path, listed: object, match: str
) -> None:
    folder = save_byte_level(tmp_path, config={"added_tokens_decoder": listed})
    with pytest.raises(ValueError, match=match):
        Tokenizer.from_folder(folder)


def test_save_copies_bytes(tmp_path: Path) -> None:
    folder = save_byte_level(tmp_path / "in")
    (folder / "chat_template.jinja").write_bytes(b"a\r\nb")
    (folder / "chat_template.json").write_bytes(b'{"chat_template": "of the processor"}\r')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_bytes(b"r\r")
    (folder / "unrelated.txt").write_text("x")
    Tokenizer.from_folder(folder).save(tmp_path / "out")
    names = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/rag.jinja",
    }
    saved = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {p.relative_to(tmp_path / "out").as_posix() for p in saved} == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_save_writes_the_template_override_and_reads_back(tmp_path: Path) -> None:
    folder = save_byte_level(tmp_path / "in")
    (folder / "chat_template.jinja").write_text("old")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("old too")
    (tmp_path / "x.jinja").write_text("new\n")
    Tokenizer.from_folder(folder, str(tmp_path / "x.jinja")).save(tmp_path / "out")
    saved = Tokenizer.from_folder(tmp_path / "out")
    assert saved.chat_template().text == saved.chat_template(has_tools=True).text == "new\n"
    assert (folder / "chat_template.jinja").read_text() == "old"


def test_save_into_its_own_folder_changes_nothing(tmp_path: Path) -> None:
    folder = save_byte_level(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    Tokenizer.from_folder(folder).save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_missing_tokenizer_file_names_folder_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere must hold a tokenizer\.json"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model alone is not enough: convert"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "vocab.json").write_bytes(b"")
    (tmp_path / "merges.txt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json and merges\.txt alone are not enoug"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "[", "{}", '{"model": 3}', "\x00"])
def test_unreadable_tokenizer_file_is_a_value_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json must be a tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("tokenizer_config.json", b"{", "must be JSON"),
        ("tokenizer_config.json", b"[1]", "must hold a JSON object: got a list"),
        ("special_tokens_map.json", b"\xff", "must be JSON"),
        ("chat_template.jinja", b"\xff", "must be UTF-8"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "must be text or a list .* got int"),
        ("tokenizer_config.json", b'{"eos_token": "<nope>"}', "got '<nope>'"),
    ],
)
def test_unreadable_files_beside_it_are_value_errors(
    tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    save_byte_level(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        Tokenizer.from_folder(tmp_path)


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an-id-beyond-reason": (
        lambda content: content["model"]["vocab"].update(zz=1 << 31),
        "must have ids below 16,777,216: got 2,147,483,648",
    ),
    "a-post-processor-of-no-token": (
        lambda content: content.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}],
                "pair": [],
                "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [], "tokens": []}},
            }
        ),
        "must make tokens of a text and add special tokens",
    ),
    "no-unknown-token": (
        lambda content: content.update(
            model={"type": "WordLevel", "vocab": dict(BEGIN), "unk_token": "[UNK]"}
        ),
        "encodes with: got WordLevel error: Missing",
    ),
}
BEGIN = {"<|begin|>": 0, "<|end_of_text|>": 1}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_cannot_encode_is_a_value_error(case: str, tmp_path: Path) -> None:
    change, message = TOKENIZERS[case]
    change_tokenizer(save_byte_level(tmp_path), change)
    with pytest.raises(ValueError, match=rf"tokenizer\.json must .*{message}|{message}"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "added",
    [[1], "x", {"x": {"content": "a"}}, {"9" * 5000: {"content": "a"}}, {"5": []}, {"-1": {}}],
    ids=lambda value: str(value)[:20],
)
def test_added_tokens_of_no_tokenizer_are_a_value_error(added: object, tmp_path: Path) -> None:
    config = {"added_tokens_decoder": added}
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        Tokenizer.from_folder(save_byte_level(tmp_path, config=config))
