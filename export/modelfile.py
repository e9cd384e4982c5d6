"""A Modelfile, from which Ollama makes a model of a GGUF file: `ollama create NAME -f Modelfile`.

    FROM ./model-f16.gguf
    TEMPLATE "..."             the chat template in Go's template language, where it has fixed turns
    SYSTEM "..."               the system message that the model was trained with, if there was one
    PARAMETER stop "..."       what ends an answer

Without TEMPLATE Ollama looks for a template of its own that is like the one in the GGUF file. A
Modelfile has no escapes: text between quotes stands as it is, without characters that do not print
(parser/parser.go of Ollama).
"""

from collections.abc import Sequence

from data.tokenizer import Tokenizer
from export.chat_turns import ChatTurns, Turn

MODELFILE = "Modelfile"
_QUOTES = '"""'
# what opens and closes code in a Go template
_CODE = ("{{", "}}")


def write_modelfile(
    gguf_name: str, template: str | None, stops: Sequence[str], system: str = ""
) -> str:
    """Write the text of a Modelfile.

    Args:
        gguf_name: of the GGUF file, which lies beside it.
        template: in Go's template language; None leaves it to Ollama.
        system: the system's message, one that can be quoted; empty for none.
    """
    lines = [f"FROM ./{gguf_name}"]
    if template is not None:
        lines.append(f"TEMPLATE {_QUOTES}{template}{_QUOTES}")
    if system:
        lines.append(f"SYSTEM {_QUOTES}{system}{_QUOTES}")
    for stop in filter(can_be_quoted, stops):
        quotes = _QUOTES if '"' in stop else '"'
        lines.append(f"PARAMETER stop {quotes}{stop}{quotes}")
    return "\n".join(lines) + "\n"


def can_be_quoted(text: str) -> bool:
    """Whether a text can stand in a Modelfile."""
    is_printed = all(character.isprintable() or character in "\n\t" for character in text)
    return is_printed and _QUOTES not in text and not text.endswith('"')


def go_template(turns: ChatTurns, bos: str | None) -> str | None:
    """Write a template's turns in Go's template language; None where that cannot be.

    Args:
        bos: BOS, if llama.cpp puts it before every text: the template must not write it again.
    """
    fixed = (turns.begin, turns.default_system, *turns.user, *turns.assistant, *turns.system)
    for text in (*fixed, turns.answer):
        # a brace at the end would open the code that follows
        if any(code in text for code in _CODE) or text.endswith("{") or not can_be_quoted(text):
            return None
    text = turns.begin.removeprefix(bos or "")
    user, assistant, system = turns.user, turns.assistant, turns.system
    if bos and not turns.begin:
        # the first turn begins with BOS
        is_later = "$i" if turns.place == "turn" else "or (gt $i 1) (and $i (not $.System))"
        user, assistant, system = (
            _without_first(bos, t, is_later) for t in (user, assistant, system)
        )
    if turns.default_system:
        text += "{{ if not .System }}" + turns.default_system + "{{ end }}"
    inside = ""
    if turns.place != "turn":
        # the system's message is the first of all
        is_there = {"first user": "eq $i 1", "last user": "eq (len (slice $.Messages $i)) 1"}
        inside = "{{ if and $.System (" + is_there[turns.place] + ") }}"
        inside += "{{ $.System }}".join(system) + "{{ end }}"
    text += "{{ range $i, $_ := .Messages }}"
    text += '{{ if eq .Role "user" }}' + user[0] + inside + "{{ .Content }}" + user[1]
    text += '{{ else if eq .Role "assistant" }}' + assistant[0] + "{{ .Content }}" + assistant[1]
    if turns.place == "turn":
        text += '{{ else if eq .Role "system" }}' + system[0] + "{{ .Content }}" + system[1]
    return text + "{{ end }}{{ end }}" + turns.answer


def _without_first(bos: str, turn: Turn, is_later: str) -> Turn:
    """Leave BOS out of a turn that is the first of all."""
    before, after = turn
    if before.startswith(bos):
        before = "{{ if " + is_later + " }}" + bos + "{{ end }}" + before.removeprefix(bos)
    return before, after


def stops_of(turns: ChatTurns | None, tokenizer: Tokenizer, ends: Sequence[int]) -> list[str]:
    """List the texts that end an answer: the template's, and the model's tokens.

    Args:
        ends: the tokens that end an answer by the model's configuration.
    """
    texts = [turns.assistant[1].strip()] if turns else []
    by_id = {i: text for text, i in tokenizer.added_ids.items()}
    texts += [by_id[i] for i in (*ends, tokenizer.eos_token_id) if i in by_id]
    return list(dict.fromkeys(filter(None, texts)))
