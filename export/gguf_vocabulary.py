"""The tokenizer in a GGUF file: tokens, kinds, merges or scores, and what llama.cpp does with them.

    model "gpt2"     byte-level BPE, divided into words by a pre-tokenizer that the file names
    model "llama"    SentencePiece: pieces with scores, from tokenizer.model

llama.cpp has its pre-tokenizers in its code, under names. Here a name is chosen by the steps that
tokenizer.json lists, which must be those of the name; llama.cpp's converter recognizes tokenizers
by a hash of some tokens, which every change of a vocabulary changes. A tokenizer that neither model
expresses is refused. Normalization (NFC) is not done by llama.cpp, and changes nothing in text that
is in NFC, as nearly all is.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer
from data.tokenizer_files import TOKENIZER_FILE
from export.chat_turns import begins_with
from export.sentencepiece_model import SENTENCEPIECE_FILE, Kind, read_pieces
from foreign.json_text import read_object
from foreign.reading import Reading

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Step = tuple[str, object]
_GPT_2: Step = ("ByteLevel", True)
_BYTES: Step = ("ByteLevel", False)
# llama.cpp's names, by the steps and by whether a word that is a token skips the merges
_PRE_TOKENIZERS: dict[tuple[tuple[Step, ...], bool], str] = {
    ((_GPT_2,), False): "gpt-2",
    ((("Digits", True), _GPT_2), False): "smollm",
    ((("Split", _LLAMA_3), _BYTES), True): "llama-bpe",
    ((("Split", _LLAMA_3), _BYTES), False): "dbrx",
    ((("Split", _QWEN_2), _BYTES), False): "qwen2",
    ((("Split", _TEKKEN), _BYTES), True): "tekken",
}
# SentencePiece's sign for a space
_SPACE = "\u2581"
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_IN_FRONT = {"type": "Prepend", "prepend": _SPACE}
# of tokens beside the pieces: below any piece's, so that no merge makes one
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
_NOT_GREEDY_OF_PHI_3 = {"<unk>", "<s>", "<|endoftext|>"}
# of Gemma: tokens that only look like text
_CONTROL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's fields in a GGUF file.

    Attributes:
        family: a word that the model's name must have so that llama.cpp treats its tokens as they
            are; empty for most.
        remarks: lines about what llama.cpp does otherwise.
    """

    fields: Mapping[str, Any]
    family: str = ""
    remarks: Sequence[str] = ()


def read_vocabulary(
    folder: Path, tokenizer: Tokenizer, pieces: Path, config: Mapping[str, Any], num_rows: int
) -> Vocabulary:
    """Express the tokenizer of a folder.

    Args:
        pieces: the tokenizer.model of the same tokenizer, which need not exist.
        config: the model's config.json, for special tokens that the tokenizer does not name.
        num_rows: of the embeddings; llama.cpp needs a token for each. Tokens beyond are left out.

    Raises:
        FileNotFoundError: the pieces are needed, and are not there.
        ValueError: GGUF cannot hold the tokenizer.
    """
    path = folder / TOKENIZER_FILE
    with Reading(path):
        content = read_object(path)
        added = {token["id"]: token for token in content["added_tokens"]}
        if content["model"].get("byte_fallback"):
            vocabulary = _sentencepiece(path, content, added, pieces, num_rows)
        else:
            vocabulary = _byte_level(path, content, added, num_rows)
    fields = {**vocabulary.fields, **_special_fields(path, tokenizer, config, num_rows)}
    ((most_frequent, number),) = Counter(fields["tokens"]).most_common(1)
    if number > 1:
        raise _refused(path, f"has the token {most_frequent!r} twice")
    if tokenizer.has_chat_template:
        fields["chat_template"] = tokenizer.chat_template().text
    family, remarks = _tokens_with_spaces(added)
    if tokenizer.adds_bos and not fields["add_bos_token"]:
        remarks.append(
            f"the chat template does not begin with {tokenizer.bos_token}: llama.cpp adds none "
            "either, so that conversations have the tokens of training"
        )
    return Vocabulary(fields, family, [*vocabulary.remarks, *remarks])


def _refused(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"--gguf must be for a tokenizer that GGUF can hold: {path} {reason}; leave --gguf out, "
        "and serve the merged folder"
    )


def _steps(path: Path, part: Any) -> tuple[Step, ...]:
    """List the steps of a pre-tokenizer, as far as they decide how text is divided."""
    if part is None:
        return ()
    kind = part["type"]
    if kind == "Sequence":
        return tuple(step for inner in part["pretokenizers"] for step in _steps(path, inner))
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return (("ByteLevel", part.get("use_regex", True)),)
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return (("Split", part["pattern"].get("Regex")),)
    if kind == "Digits":
        return (("Digits", part["individual_digits"]),)
    raise _refused(path, f"divides text by {kind}, and llama.cpp has no pre-tokenizer that does so")


def _byte_level(
    path: Path, content: Mapping[str, Any], added: Mapping[int, Any], num_rows: int
) -> Vocabulary:
    model = content["model"]
    if model["type"] != "BPE":
        raise _refused(path, f"is a {model['type']} model, not BPE")
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _refused(path, f"has {name} {model[name]!r}, which byte-level BPE has not")
    if (content["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _refused(path, f"normalizes text by {content['normalizer']['type']}")
    steps = _steps(path, content["pre_tokenizer"])
    key = steps, bool(model.get("ignore_merges"))
    if key not in _PRE_TOKENIZERS:
        raise _refused(path, f"divides text by {steps!r}, which has no name in llama.cpp")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if spaced := next((merge for merge in merges if merge.count(" ") != 1), None):
        raise _refused(path, f"merges {spaced!r}, a pair with a space in it")
    tokens = {i: text for text, i in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, Kind.NORMAL)
    for i, token in added.items():
        tokens[i], kinds[i] = _added(token)
    return Vocabulary(
        {
            "model": "gpt2",
            "pre": _PRE_TOKENIZERS[key],
            "tokens": [tokens.get(i, _unused(i)) for i in range(num_rows)],
            "token_type": [int(kinds.get(i, Kind.UNUSED)) for i in range(num_rows)],
            "merges": merges,
        }
    )


def _sentencepiece(
    path: Path, content: Mapping[str, Any], added: Mapping[int, Any], pieces: Path, num_rows: int
) -> Vocabulary:
    has_space_in_front, remarks = _space_in_front(path, content)
    if not pieces.is_file():
        raise FileNotFoundError(
            f"--gguf must find {SENTENCEPIECE_FILE}, which has the scores of the tokenizer's "
            f"pieces: there is none in {pieces.parent}; download it from the model's repository"
        )
    tokens, scores, kinds = {}, {}, {}
    vocabulary = content["model"]["vocab"]
    for i, piece in enumerate(read_pieces(pieces)[:num_rows]):
        if i not in added and vocabulary.get(piece.text) != i:
            raise ValueError(
                f"{pieces} must have the pieces of {path}: {piece.text!r} is {i:,} in the one and "
                f"{vocabulary.get(piece.text)} in the other; download both again"
            )
        tokens[i], scores[i], kinds[i] = piece
        if piece.kind == Kind.USER_DEFINED:
            # what is no added token is merged from its parts like any piece
            kinds[i] = Kind.NORMAL
    for i, token in added.items():
        tokens[i], kinds[i] = _added(token)
        scores[i] = _ADDED_SCORE
    if missing := [text for text, i in vocabulary.items() if i < num_rows and i not in tokens]:
        raise ValueError(
            f"{pieces} must have the pieces of {path}: {missing[0]!r} is missing; download both "
            "again"
        )
    return Vocabulary(
        {
            "model": "llama",
            "pre": "default",
            "tokens": [tokens.get(i, _unused(i)) for i in range(num_rows)],
            "scores": [scores.get(i, _UNUSED_SCORE) for i in range(num_rows)],
            "token_type": [int(kinds.get(i, Kind.UNUSED)) for i in range(num_rows)],
            "add_space_prefix": has_space_in_front,
        },
        remarks=remarks,
    )


def _space_in_front(path: Path, content: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Find whether each stretch of text between special tokens gets a space in front."""
    normalizer, divides = content["normalizer"], content["pre_tokenizer"]
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    # Gemma's tokens have no space inside, so that it changes nothing where words end
    is_whole = divides is None or divides == {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    if is_whole and steps == [_IN_FRONT, _SPACES]:
        return True, []
    if is_whole and steps == [_SPACES]:
        return False, []
    if steps or divides is None or divides["type"] != "Metaspace" or divides.get("split"):
        kinds = [step["type"] for step in (*steps, divides) if step]
        raise _refused(path, f"prepares text by {', '.join(kinds) or 'nothing'}")
    scheme = divides["prepend_scheme"]
    if scheme != "first":
        return scheme == "always", []
    return False, [
        "GGUF has no tokenizer that puts a space before the first word only: llama.cpp puts none "
        "there, as in conversations, which begin with a special token"
    ]


def _unused(token_id: int) -> str:
    return f"[PAD{token_id}]"


def _added(token: Mapping[str, Any]) -> tuple[str, Kind]:
    """The text and kind of an added token; llama.cpp prints no control tokens."""
    text = token["content"]
    looks_special = (text.startswith("<|") and text.endswith("|>")) or text in _CONTROL
    looks_unused = text.startswith("<unused") and text.endswith(">")
    if token["special"] or looks_special or looks_unused:
        return text, Kind.CONTROL
    return text.replace(_SPACE, " "), Kind.USER_DEFINED


def _special_fields(
    path: Path, tokenizer: Tokenizer, config: Mapping[str, Any], num_rows: int
) -> dict[str, Any]:
    """The ids of special tokens, and which of them a text gets."""
    before, after = tokenizer.added_around
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise _refused(path, f"adds {before} before a text and {after} behind it, not BOS and EOS")
    fields: dict[str, Any] = {}
    for name, word in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token = tokenizer.special_tokens.get(f"{name}_token")
        known = None if token is None else tokenizer.added_ids.get(token)
        i = config.get(f"{name}_token_id") if known is None else known
        if type(i) is int and 0 <= i < num_rows:
            fields[f"{word}_token_id"] = i
    adds_bos = bool(before) and not _has_conversations_without_bos(tokenizer)
    return {**fields, "add_bos_token": adds_bos, "add_eos_token": bool(after)}


def _has_conversations_without_bos(tokenizer: Tokenizer) -> bool:
    """Whether the chat template does not begin with BOS: llama.cpp would put one in front."""
    if not tokenizer.has_chat_template or not tokenizer.bos_token:
        return False
    return not begins_with(tokenizer.chat_template(), tokenizer.bos_token)


def _tokens_with_spaces(added: Mapping[int, Any]) -> tuple[str, list[str]]:
    """Find tokens that take in the spaces beside them: as Phi-3's do, which llama.cpp knows by the
    model's name; or others, about which a line tells."""
    greedy = [t["content"] for t in added.values() if t["lstrip"] or t["rstrip"]]
    if not greedy:
        return "", []
    others = {token["content"] for token in added.values()} - set(greedy)
    if others == _NOT_GREEDY_OF_PHI_3 and not any(t["lstrip"] for t in added.values()):
        return "Phi-3", []
    return "", [
        f"GGUF cannot say that tokens take in the spaces beside them, as {greedy[0]} does: "
        "text with spaces there may become other tokens in llama.cpp"
    ]
