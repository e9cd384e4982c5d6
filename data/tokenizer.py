"""A checkpoint's tokenizer, read from its folder.

A thin layer over tokenizers.Tokenizer, which does the work. What transformers' AutoTokenizer would
add to it is read here from the JSON files beside tokenizer.json: the names of BOS and EOS and the
chat template. Three things differ on purpose:

- tokenizer.json is the truth. Whether BOS is added is probed, not read from add_bos_token, and no
  normalizer or post-processor is rebuilt from the class name in tokenizer_config.json.
- A truncation or padding section in tokenizer.json is switched off: lengths belong to the data set.
- Offsets are whole. Byte-level post-processors trim leading spaces from them by default, which
  would leave whitespace tokens without characters, so that no mask could claim them.

Left out: tokenizers without a tokenizer.json (sentencepiece's tokenizer.model, tiktoken), adding
tokens.
"""

import json
import shutil
from pathlib import Path

import tokenizers

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
_FILES = (TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILE)


class Tokenizer:
    """Text to token ids and back, with the checkpoint's special tokens and chat template.

    Attributes:
        adds_bos: whether encode(..., add_special_tokens=True) starts with BOS, found by encoding a
            letter.
        special_ids: the ids of the added tokens that tokenizer.json marks as special, and BOS and
            EOS.
        closing_tokens: the texts of the special tokens, BOS left out, that can end a turn.
        vocab_size: one more than the largest id, so that it bounds every id where the vocabulary
            has holes.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None,
        eos_token: str | None,
        chat_template: str | None,
        folder: Path,
        is_template_override: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        _keep_whole_offsets(backend)
        self._backend = backend
        self._folder = folder
        self._is_template_override = is_template_override
        self.chat_template = chat_template
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.bos_token_id = self._named_id("bos_token", bos_token)
        self.eos_token_id = self._named_id("eos_token", eos_token)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        special = {i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        named = {i for i in (self.bos_token_id, self.eos_token_id) if i is not None}
        self.special_ids = frozenset(special | named)
        # BOS opens a text: it cannot close a turn, unless it is EOS as well
        closing = self.special_ids - ({self.bos_token_id} - {self.eos_token_id})
        self.closing_tokens = tuple(t for i in closing if (t := backend.id_to_token(i)) is not None)
        probe = self.encode("a", add_special_tokens=True)
        self.adds_bos = self.bos_token_id is not None and probe[:1] == [self.bos_token_id]

    @classmethod
    def from_folder(cls, folder: Path, chat_template: str | None = None) -> "Tokenizer":
        """Read tokenizer.json and the JSON files beside it.

        Args:
            chat_template: the text of a template that takes the place of the checkpoint's own.

        Raises:
            FileNotFoundError: the folder has no tokenizer.json.
            ValueError: a file cannot be read as what it should be, or BOS or EOS is not in the
            vocabulary.
        """
        folder = Path(folder)
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} must hold a {TOKENIZER_FILE}: {_what_is_there(folder)}; "
                f"{_how_to_get_one(folder)}"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        # tokenizers raises Exception itself, no subclass, for every fault of the file
        except Exception as error:
            raise ValueError(
                f"{path} must be a tokenizer that the tokenizers library {tokenizers.__version__} "
                f"reads: got {error}; download it again or upgrade tokenizers"
            ) from error
        config = _read_object(folder / CONFIG_FILE)
        special = _read_object(folder / SPECIAL_TOKENS_FILE)
        return cls(
            backend,
            bos_token=_token_text("bos_token", config, special),
            eos_token=_token_text("eos_token", config, special),
            chat_template=_folder_template(folder, config)
            if chat_template is None
            else chat_template,
            folder=folder,
            is_template_override=chat_template is not None,
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; special tokens spelled out in the text become their ids."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, the half-open range of characters it stands for.

        Tokens that the post-processor adds have the empty range (0, 0). Tokens that share a
        character (the bytes of an emoji) all have the character's range.
        """
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files byte for byte; a template given in their place becomes the
        template.

        Raises:
            FileNotFoundError: the folder that the tokenizer was read from is gone.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            source = self._folder / name
            is_replaced = name == TEMPLATE_FILE and self._is_template_override
            is_present = source.is_file() or name == TOKENIZER_FILE
            if is_replaced or not is_present or source.resolve() == (folder / name).resolve():
                continue
            shutil.copyfile(source, folder / name)
        if self._is_template_override and self.chat_template is not None:
            (folder / TEMPLATE_FILE).write_bytes(self.chat_template.encode())

    def _named_id(self, name: str, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ValueError(
                f"{name} must be in the vocabulary of {self._folder / TOKENIZER_FILE}: got "
                f"{token!r}; correct it in {CONFIG_FILE}"
            )
        return token_id


def _keep_whole_offsets(backend: tokenizers.Tokenizer) -> None:
    processor = backend.post_processor
    if processor is None:
        return
    is_sequence = isinstance(processor, tokenizers.processors.Sequence)
    # iterating a Sequence yields views of its members, so the assignment reaches the backend
    for member in processor if is_sequence else (processor,):
        if hasattr(member, "trim_offsets"):
            member.trim_offsets = False


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return "got no such folder"
    names = sorted(p.name for p in folder.iterdir())
    return (
        f"got {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "got nothing"
    )


def _how_to_get_one(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            "a tokenizer.model alone is not enough: convert it to tokenizer.json, for instance "
            "with transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return "download the checkpoint's tokenizer files"


def _read_object(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: got {error}; download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object: got {type(content).__name__}")
    return content


def _token_text(name: str, *files: dict[str, object]) -> str | None:
    for content in files:
        token = content.get(name)
        # older checkpoints write {"content": "</s>", "lstrip": false, ...}
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def _folder_template(folder: Path, config: dict[str, object]) -> str | None:
    path = folder / TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8: got {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        if "default" not in named:
            raise ValueError(
                f"chat_template in {folder / CONFIG_FILE} must have one named default: got "
                f"{', '.join(map(str, named)) or 'none'}; choose one with --chat-template PATH"
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"chat_template in {folder / CONFIG_FILE} must be text: got {type(template).__name__}; "
            "give one with --chat-template"
        )
    return template
