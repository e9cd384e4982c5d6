"""What a record means: a conversation, a prompt with its completion, a text, or token ids.

Each format is recognized by its field names, in the first record, and then required of every
record:

    messages           {"messages": [{"role": "user", "content": "..."}, ...], "tools"?: [...]}
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, ...], "system"?: "..."}
    alpaca             {"instruction": "...", "input"?: "...", "output": "..."}
    prompt-completion  {"prompt": "...", "completion": "..."}, or a list of messages in each
    text               {"text": "..."}
    tokenized          {"input_ids": [...], "labels": [...]}

A record of conversations may have, as TRL's do, "tools" (JSON schemas, or their JSON text),
"documents" and "chat_template_kwargs", which the chat template then sees; a message keeps all its
fields. Arguments of tool calls may be JSON text and become objects (data/tool_calls.py).

These are the layouts of OpenAI's and TRL's, FastChat's and Stanford Alpaca's files. The peers cast
what does not fit (a number as content, a null) or drop it; here it is an error with its location.
Fields that a format does not know are ignored: data sets carry ids and sources along.

Left out: preference pairs, per-character masks, images and audio.
"""

import json
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from data.chat_template import GIVEN_VARIABLES
from data.records import Record
from data.tool_calls import decode_arguments

FORMATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "text", "tokenized")
DEFAULT_TEXT_FIELD = "text"

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

# fields of a record or a message that say nothing that an answer depends on
IGNORED_FIELDS = frozenset(
    (
        *("id", "_id", "uid", "uuid", "idx", "index", "hash", "__index_level_0__"),
        *("prompt_id", "conversation_id", "message_id", "session_id", "user_id"),
        *("source", "sources", "data_source", "dataset", "origin", "split", "url", "license"),
        *("created", "created_at", "timestamp", "date", "author", "model", "generator"),
        *("category", "subcategory", "topic", "task", "task_type", "type", "tags"),
        *("lang", "language", "meta", "metadata", "length", "num_turns", "num_tokens"),
    )
)

# github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template reads them, and the indices of those to be learned.

    Attributes:
        tools: JSON schemas of the functions that the assistant may call; an empty list and None are
            different to templates.
        variables: what else the record gives the template by name.
    """

    messages: list[dict[str, Any]]
    targets: list[int]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptCompletion:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    text: str
    is_document: bool = False


@dataclass(frozen=True)
class TokenIds:
    input_ids: list[int]
    labels: list[int]


Example: TypeAlias = Conversation | PromptCompletion | Text | TokenIds


def detect_format(fields: dict[str, object], text_field: str = DEFAULT_TEXT_FIELD) -> str:
    """Name the format that a record's field names belong to.

    Where several fit, the more specific one: an Alpaca file often carries the assembled "text"
    too. A text_field other than the default is the user's choice and comes first.

    Raises:
        ValueError: none fits.
    """
    if text_field != DEFAULT_TEXT_FIELD and text_field in fields:
        return "text"
    needs = {
        "tokenized": ("input_ids", "labels"),
        "messages": ("messages",),
        "sharegpt": ("conversations",),
        "prompt-completion": ("prompt", "completion"),
        "alpaca": ("instruction", "output"),
        "text": (text_field,),
    }
    for name, keys in needs.items():
        if all(key in fields for key in keys):
            return name
    known = "; ".join(f"{name} needs {' and '.join(keys)}" for name, keys in needs.items())
    raise ValueError(
        f"the record's fields must be those of a format: got {', '.join(fields) or 'none'}; "
        f"{known}; rename the fields, or name the text's with --text-field"
    )


def to_example(
    record: Record, data_format: str, *, text_field: str, has_chat_template: bool
) -> Example:
    """Read a record as an example of a format.

    Args:
        has_chat_template: Alpaca records become conversations, else Stanford Alpaca's two text
            prompts.

    Raises:
        ValueError: the record does not fit the format; the message starts with its location.
    """
    fields = _Fields(record.location, record.fields, data_format)
    match data_format:
        case "messages":
            messages = _messages(fields.get("messages", list), record.location, "messages")
            return _conversation(messages, 0, fields)
        case "sharegpt":
            return _conversation(_sharegpt_messages(fields), 0, fields)
        case "alpaca":
            return _alpaca(fields, has_chat_template)
        case "prompt-completion":
            return _prompt_completion(fields)
        case "text":
            name = DEFAULT_TEXT_FIELD if record.is_document else text_field
            return Text(fields.text(name), record.is_document)
        case "tokenized":
            return _token_ids(fields)
    raise ValueError(f"--data-format must be auto or {', '.join(FORMATS)}: got {data_format!r}")


@dataclass(frozen=True)
class _Fields:
    """A record's fields, each looked up with the complaint that names the record."""

    location: str
    values: dict[str, object]
    data_format: str

    def get(self, name: str, kind: type) -> Any:
        if name not in self.values:
            raise ValueError(
                f"{self.location}: a {self.data_format} record must have the field {name!r}: got "
                f"{', '.join(self.values) or 'no fields'}; add it, or choose another --data-format"
            )
        value = self.values[name]
        if not isinstance(value, kind):
            raise ValueError(
                f"{self.location}: {name!r} must be {_KINDS[kind]}: got {_kind(value)}; correct it"
            )
        return value

    def text(self, name: str) -> str:
        return self.get(name, str)

    def optional_text(self, name: str) -> str:
        return "" if self.values.get(name) is None else self.text(name)


def _conversation(messages: list[dict[str, Any]], first: int, fields: _Fields) -> Conversation:
    """The conversation whose assistant messages from index `first` on are learned."""
    targets = [
        i
        for i, message in enumerate(messages)
        if i >= first and message["role"] == "assistant" and message.get("weight") != 0
    ]
    if not targets:
        raise ValueError(
            f"{fields.location}: a conversation must have an assistant message to learn: got the "
            f"roles {', '.join(m['role'] for m in messages[first:]) or 'of no message'}; delete "
            "the record"
        )
    return Conversation(messages, targets, _tools(fields), _variables(fields))


def _tools(fields: _Fields) -> list[dict[str, Any]] | None:
    tools = fields.values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{fields.location}: 'tools' must be a list, or the JSON text of one: got {error}; "
                "correct it"
            ) from error
    return None if tools is None else _objects(tools, "tools", fields.location)


def _variables(fields: _Fields) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    if fields.values.get("documents") is not None:
        documents = _objects(fields.values["documents"], "documents", fields.location)
        variables["documents"] = documents
    if fields.values.get("chat_template_kwargs") is not None:
        variables |= fields.get("chat_template_kwargs", dict)
    reserved = [name for name in GIVEN_VARIABLES if name in variables]
    if reserved:
        raise ValueError(
            f"{fields.location}: 'chat_template_kwargs' must not set {', '.join(GIVEN_VARIABLES)}: "
            f"got {', '.join(reserved)}; delete it"
        )
    return variables


def _objects(values: object, name: str, location: str) -> list[dict[str, Any]]:
    if not isinstance(values, list):
        raise ValueError(f"{location}: {name!r} must be a list: got {_kind(values)}; correct it")
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(
                f"{location}: {name}[{index}] must be an object: got {_kind(value)}; correct it"
            )
    return values


def _messages(values: list[object], location: str, field: str) -> list[dict[str, Any]]:
    messages = []
    for index, value in enumerate(values):
        where = f"{location}: {field}[{index}]"
        if not isinstance(value, dict):
            raise ValueError(
                f'{where} must be an object with "role" and "content": got {_kind(value)}; '
                "correct it"
            )
        role = value.get("role")
        if role not in ROLES:
            raise ValueError(
                f"{where} must have a role among {', '.join(ROLES)}: got {_excerpt(role)}; "
                "correct it"
            )
        if value.get("weight") not in (None, 0, 1):
            raise ValueError(
                f"{where} must have a weight of 0 (not learned) or 1: got "
                f"{_excerpt(value['weight'])}"
            )
        is_call = role == "assistant" and bool(value.get("tool_calls"))
        message = {key: each for key, each in value.items() if each is not None}
        # a call needs no words; templates see that there are none
        if "content" in message or not is_call:
            message["content"] = _content(value.get("content"), where)
        messages.append(decode_arguments(message, where))
    return messages


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} must have text as its content: got {_kind(content)}; correct it")
    parts = []
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        text = part.get("text") if is_text else None
        if not isinstance(text, str):
            raise ValueError(
                f"{where} must have content parts "
                f'{{"type": "text", "text": "..."}}: got {_excerpt(part)}; '
                "only text can be learned from"
            )
        parts.append(text)
    return "".join(parts)


def _sharegpt_messages(fields: _Fields) -> list[dict[str, Any]]:
    turns: list[object] = fields.get("conversations", list)
    messages = []
    system = fields.optional_text("system")
    if system:
        messages.append({"role": "system", "content": system})
    for index, turn in enumerate(turns):
        where = f"{fields.location}: conversations[{index}]"
        if not isinstance(turn, dict):
            raise ValueError(
                f'{where} must be an object with "from" and "value": got {_kind(turn)}; correct it'
            )
        # the same field name is in use for turns written as messages
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in SHAREGPT_ROLES:
            raise ValueError(
                f"{where} must come from one of {', '.join(SHAREGPT_ROLES)}: got {_excerpt(role)}; "
                "correct it"
            )
        content = _content(turn.get("value", turn.get("content")), where)
        messages.append({"role": SHAREGPT_ROLES[role], "content": content})
    return messages


def _alpaca(fields: _Fields, has_chat_template: bool) -> Example:
    instruction, output = fields.text("instruction"), fields.text("output")
    context = fields.optional_text("input")
    if has_chat_template:
        request = f"{instruction}\n\n{context}" if context else instruction
        messages = [
            {"role": "user", "content": request},
            {"role": "assistant", "content": output},
        ]
        return Conversation(messages, [1])
    prompt = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT
    return PromptCompletion(prompt.format(instruction=instruction, input=context), output)


def _prompt_completion(fields: _Fields) -> Example:
    if not isinstance(fields.values.get("prompt"), list):
        return PromptCompletion(fields.text("prompt"), fields.text("completion"))
    prompt = _messages(fields.get("prompt", list), fields.location, "prompt")
    completion = _messages(fields.get("completion", list), fields.location, "completion")
    return _conversation([*prompt, *completion], len(prompt), fields)


def _token_ids(fields: _Fields) -> TokenIds:
    input_ids, labels = fields.get("input_ids", list), fields.get("labels", list)
    for name, values in (("input_ids", input_ids), ("labels", labels)):
        # a bool is an int to isinstance
        index = next((i for i, v in enumerate(values) if type(v) is not int), None)
        if index is not None:
            raise ValueError(
                f"{fields.location}: {name}[{index}] must be an integer: got "
                f"{_kind(values[index])}; correct it"
            )
    if len(input_ids) != len(labels):
        raise ValueError(
            f"{fields.location}: labels must be as long as input_ids: got {len(labels)} and "
            f"{len(input_ids)}; give -100 where nothing is to be learned"
        )
    return TokenIds(input_ids, labels)


_KINDS: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return kinds.get(type(value)) or _excerpt(value)


def _excerpt(value: object, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
