"""The files of a checkpoint's tokenizer, and the errors about their content."""

from pathlib import Path
from types import TracebackType

import tokenizers

from foreign.json_text import read_object
from foreign.reading import is_panic

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
FILES = (TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE)
# sentencepiece's, Mistral's, tiktoken's and GPT-2's
OLD_FILES = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "merges.txt")


class Library:
    """Turns what the tokenizers library raises over a file into a ValueError that names it."""

    def __init__(self, folder: Path, does: str) -> None:
        self._must = (
            f"{folder / TOKENIZER_FILE} must be a tokenizer that the tokenizers library "
            f"{tokenizers.__version__} {does}"
        )

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # it raises Exception itself, no subclass, for every fault of the file, and panics
        if kind is Exception or is_panic(error):
            raise ValueError(
                f"{self._must}: got {error}; download it again or upgrade tokenizers"
            ) from error


def check_is_there(folder: Path) -> Path:
    """The path of a folder's tokenizer.json.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must hold a {TOKENIZER_FILE}: {_what_is_there(folder)}; "
            f"{_how_to_get_one(folder)}"
        )
    return path


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return "got no such folder"
    names = sorted(p.name for p in folder.iterdir())
    return (
        f"got {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "got nothing"
    )


def _how_to_get_one(folder: Path) -> str:
    old = [n for n in OLD_FILES if (folder / n).is_file()]
    if not old:
        return "download the checkpoint's tokenizer files"
    return (
        f"{' and '.join(old)} alone {'is' if len(old) == 1 else 'are'} not enough: convert to "
        "tokenizer.json, for instance with "
        "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def read_config(path: Path) -> dict[str, object]:
    return read_object(path, "download it again") if path.is_file() else {}


def special_tokens_of(config: dict[str, object], older: dict[str, object]) -> dict[str, str]:
    """The special tokens by name; special_tokens_map.json counts first where the configuration
    does not list the added tokens, as in transformers."""
    ascending = (older, config) if "added_tokens_decoder" in config else (config, older)
    return {
        name: text
        for content in ascending
        for name, token in content.items()
        if name.endswith("_token") and (text := _token_text(token)) is not None
    }


def _token_text(token: object) -> str | None:
    # older checkpoints write {"content": "</s>", "lstrip": false, ...}
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def check_added_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, object], folder: Path
) -> None:
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise ValueError(
            f"added_tokens_decoder in {folder / CONFIG_FILE} must be an object of token ids: got "
            f"{type(listed).__name__}"
        )
    for key, token in listed.items():
        text = _token_text(token)
        # more digits than an id has are none to the library, and a number to nobody
        is_id = key.isdecimal() and len(key) < 10
        known = backend.id_to_token(int(key)) if is_id else None
        if text is None or known != text:
            raise ValueError(
                f"the added tokens of {folder / CONFIG_FILE} must be those of {TOKENIZER_FILE}: "
                f"got {text!r} for id {key}, which there is {known!r}; save the tokenizer again, "
                "for instance with "
                "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
