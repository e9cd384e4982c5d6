"""A checkpoint's tokenizer, read from its folder.

A thin layer over tokenizers.Tokenizer, which does the work: token ids are its own. What
transformers' AutoTokenizer would add to it is read here from the JSON files beside tokenizer.json:
the special tokens by name and the chat templates. Four things differ on purpose:

- tokenizer.json is the truth. Whether BOS is added is probed, not read from add_bos_token (nor does
  transformers 5 beside a tokenizer.json), and no normalizer or post-processor is rebuilt from the
  class name in tokenizer_config.json.
- Added tokens that only tokenizer_config.json knows are an error, where transformers adds them.
- A truncation or padding section in tokenizer.json is switched off: lengths belong to the data set.
- Offsets are whole. Byte-level post-processors trim leading spaces from them by default, which
  would leave whitespace tokens without characters, so that no mask could claim them.

Left out: tokenizers without a tokenizer.json (sentencepiece's tokenizer.model, tiktoken), adding
tokens.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import tokenizers

from data.chat.template import ChatTemplate
from data.chat.template_files import (
    DEFAULT,
    PROCESSOR_TEMPLATE_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    NamedText,
    choose_templates,
)
from data.tokenizer_files import (
    CONFIG_FILE,
    FILES,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILE,
    Library,
    check_added_tokens,
    check_is_there,
    read_config,
    special_tokens_of,
)
from foreign.guest import allow, in_guest
from foreign.json_text import parse_json
from foreign.reading import Reading

# the library counts up to the largest id, and no embedding has as many rows
_MOST_IDS = 1 << 24


class Tokenizer:
    """Text to token ids and back, with the checkpoint's special tokens and chat templates.

    Attributes:
        special_tokens: the tokens that the checkpoint names, "bos_token" and the like, as text.
        adds_bos: whether encode(..., add_special_tokens=True) starts with BOS, found by encoding a
            letter.
        added_around: the ids that encode(..., add_special_tokens=True) puts before and behind those
            of a text.
        divides_words: whether a text is divided into words, each of which is encoded by itself.
        special_ids: the ids of the added tokens that tokenizer.json marks as special, and BOS and
            EOS.
        added_ids: of all added tokens, special or not, by their text.
        closing_ids, closing_tokens: the special tokens, BOS left out, that can end a turn.
        has_eos_as_one_token: whether EOS that is spelled out in a text becomes its id.
        vocab_size: one more than the largest id, so that it bounds every id where the vocabulary
            has holes.
        own_vocab_size: the same without added tokens; a model may have no row for an added token
            that no text has, such as a token for padding.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        templates: Mapping[str, NamedText],
        folder: Path,
        is_template_override: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        _keep_whole_offsets(backend)
        self._backend = backend
        self._folder = folder
        self._name = f"the tokenizer of {folder}"
        decoder = backend.decoder and parse_json(backend.decoder.__getstate__(), self._name)
        self._decodes_at_once = _is_bounded(decoder)
        self._encoding = Library(folder, "encodes with")
        self._decoding = Library(folder, "decodes with")
        self._is_template_override = is_template_override
        self._templates = {
            name: ChatTemplate(text, origin, special_tokens)
            for name, (text, origin) in templates.items()
        }
        self.special_tokens = special_tokens
        self.bos_token = special_tokens.get("bos_token")
        self.eos_token = special_tokens.get("eos_token")
        self.bos_token_id = self._named_id("bos_token", self.bos_token)
        self.eos_token_id = self._named_id("eos_token", self.eos_token)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab_size > _MOST_IDS:
            raise ValueError(
                f"{folder / TOKENIZER_FILE} must have ids below {_MOST_IDS:,}: got "
                f"{self.vocab_size - 1:,}; download it again"
            )
        own = backend.get_vocab(with_added_tokens=False)
        added = backend.get_added_tokens_decoder()
        self.own_vocab_size = 1 + max((i for i in own.values() if i not in added), default=-1)
        self.added_ids = {token.content: i for i, token in added.items()}
        special = {i for i, t in added.items() if t.special}
        named = {i for i in (self.bos_token_id, self.eos_token_id) if i is not None}
        self.special_ids = frozenset(special | named)
        # BOS opens a text: it cannot close a turn, unless it is EOS as well
        closing = self.special_ids - ({self.bos_token_id} - {self.eos_token_id})
        self.closing_ids = closing
        self.closing_tokens = tuple(t for i in closing if (t := backend.id_to_token(i)) is not None)
        # a normalizer may make a letter of any length
        spelled, self._letter, probe, words = in_guest(self._probes, self._name)
        self.has_eos_as_one_token = spelled == [self.eos_token_id]
        self._is_blank: dict[int, bool] = {}
        self.adds_bos = self.bos_token_id is not None and probe[:1] == [self.bos_token_id]
        size = len(self._letter)
        places = (i for i in range(len(probe) + 1) if probe[i : i + size] == self._letter)
        if (before := next(places, None)) is None or not size:
            raise ValueError(
                f"{folder / TOKENIZER_FILE} must make tokens of a text and add special tokens "
                f"around them: got {self._letter[:8]} for a letter, {probe[:8]} with special tokens"
            )
        self.added_around = probe[:before], probe[before + size :]
        self.divides_words = len(set(words)) > 1

    def _probes(self) -> tuple[list[int], list[int], list[int], Sequence[int | None]]:
        """EOS spelled out, a letter, a letter with special tokens, the words of a text."""
        return (
            self.encode(self.eos_token or "", add_special_tokens=False),
            self.encode("a", add_special_tokens=False),
            self.encode("a", add_special_tokens=True),
            self.encode_with_words("a a\na")[2],
        )

    @classmethod
    def from_folder(cls, folder: Path, chat_template: str = "") -> "Tokenizer":
        """Read tokenizer.json and the files beside it.

        Args:
            chat_template: the template to use in place of the checkpoint's: the name of a bundled
                template, the path of a file, or the name of one of the checkpoint's.

        Raises:
            FileNotFoundError: the folder has no tokenizer.json.
            ValueError: a file cannot be read as what it should be, there is no such template, or
                the files disagree about BOS, EOS or an added token.
        """
        folder = Path(folder)
        path = check_is_there(folder)
        with Library(folder, "reads"):
            backend = tokenizers.Tokenizer.from_file(str(path))
        config = read_config(folder / CONFIG_FILE)
        with Reading(f"the tokenizer of {folder}", "download it again"):
            check_added_tokens(backend, config, folder)
            tokenizer = cls(
                backend,
                special_tokens=special_tokens_of(config, read_config(folder / SPECIAL_TOKENS_FILE)),
                templates=choose_templates(chat_template, folder, config, folder / CONFIG_FILE),
                folder=folder,
                is_template_override=bool(chat_template),
            )
        if chat_template:
            template = tokenizer.chat_template()
            in_guest(template.check_syntax, template.name)
        return tokenizer

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def chat_template(self, has_tools: bool = False) -> ChatTemplate:
        """The template for a conversation with or without tools, chosen as transformers does.

        Raises:
            ValueError: there is none, or several of which none is the default.
        """
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if DEFAULT in self._templates:
            return self._templates[DEFAULT]
        if self._templates:
            raise ValueError(
                f"one of the chat templates in {self._folder} must be named {DEFAULT}: got "
                f"{', '.join(self._templates)}; choose one by its name with --chat-template"
            )
        raise ValueError(
            f"conversations need a chat template: got none in {self._folder}; give one with "
            "--chat-template, for instance --chat-template chatml"
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; special tokens spelled out in the text become their ids."""
        return self._encode(text, add_special_tokens).ids

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, the half-open range of characters it stands for.

        Tokens that the post-processor adds have the empty range (0, 0). Tokens that share a
        character (the bytes of an emoji) all have the character's range.
        """
        encoding = self._encode(text, add_special_tokens)
        return encoding.ids, encoding.offsets

    def encode_with_words(self, text: str) -> tuple[list[int], list[int], list[int | None]]:
        """Token ids of a text alone, and for each the character it starts at and the number of its
        word."""
        encoding = self._encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets], encoding.word_ids

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        allow(len(text))
        with self._encoding:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def is_blank(self, token_id: int) -> bool:
        """Whether a token is nothing but whitespace."""
        if token_id not in self._is_blank:
            # beside a letter, because decoders strip the whitespace that a text begins with
            text = self.decode([*self._letter, token_id], skip_special_tokens=False)
            self._is_blank[token_id] = not text.removeprefix("a").strip()
        return self._is_blank[token_id]

    def fingerprint(self, now: datetime) -> str:
        """The SHA-256, in hexadecimal, of all that decides the tokens of a text or a conversation.

        Args:
            now: the part of it that the templates can read.
        """
        parts = {
            "library": tokenizers.__version__,
            "backend": self._backend.to_str(),
            "special_tokens": dict(self.special_tokens),
            "templates": {
                name: [template.text, template.clock(now)]
                for name, template in self._templates.items()
            },
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def check_rows(self, ids: list[int], vocab_size: int, what: str) -> None:
        """Refuse a token that was added to the tokenizer and not to the model.

        Args:
            vocab_size: rows of the model's embedding.
            what: begins the message.

        Raises:
            ValueError: there is one.
        """
        if (highest := max(ids, default=0)) >= vocab_size:
            token = self.decode([highest], skip_special_tokens=False)
            raise ValueError(
                f"{what} must have tokens of the model's vocabulary of {vocab_size:,}: got "
                f"{token!r} (id {highest:,}), which was added to the tokenizer alone; leave it out"
            )

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        def decode() -> str:
            with self._decoding:
                return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

        return decode() if self._decodes_at_once else in_guest(decode, self._name)

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files byte for byte; a template given in their place becomes the
        template.

        Raises:
            FileNotFoundError: the folder that the tokenizer was read from is gone.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = [self._folder / name for name in FILES]
        if not self._is_template_override:
            files += [self._folder / name for name in (TEMPLATE_FILE, PROCESSOR_TEMPLATE_FILE)]
            files += sorted((self._folder / TEMPLATE_FOLDER).glob("*.jinja"))
        for source in files:
            target = folder / source.relative_to(self._folder)
            is_present = source.is_file() or source.name == TOKENIZER_FILE
            if is_present and source.resolve() != target.resolve():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)
        if self._is_template_override:
            (folder / TEMPLATE_FILE).write_bytes(self._templates[DEFAULT].text.encode())

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


def _is_bounded(decoder: object) -> bool:
    """Whether a decoder is fast and its text no longer than the tokens."""
    if decoder is None:
        return True
    assert isinstance(decoder, dict)
    if decoder["type"] == "Sequence":
        return all(map(_is_bounded, decoder["decoders"]))
    # Llama 2's writes a space for U+2581
    replaced = decoder.get("pattern", {}).get("String", "")
    return decoder["type"] != "Replace" or len(decoder["content"]) <= len(replaced)


def _keep_whole_offsets(backend: tokenizers.Tokenizer) -> None:
    processor = backend.post_processor
    if processor is None:
        return
    is_sequence = isinstance(processor, tokenizers.processors.Sequence)
    # iterating a Sequence yields views of its members, so the assignment reaches the backend
    for member in processor if is_sequence else (processor,):
        if hasattr(member, "trim_offsets"):
            member.trim_offsets = False
