"""What a record means: a conversation, a prompt with its completion, a text, or token ids.

Each format is recognized by its field names, in the first record, and then required of every
record:

    messages           {"messages": [{"role": "user", "content": "..."}, ...], "tools"?: [...]}
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, ...]}
    alpaca             {"instruction": "...", "input"?: "...", "output": "...",
                        "history"?: [["request", "answer"], ...]}
    prompt-completion  {"prompt": "...", "completion": "..."}, or a list of messages in each
    text               {"text": "..."}
    tokenized          {"input_ids": [...], "labels": [...]}

A record of conversations, which an Alpaca record is where there is a chat template, may have
"system" or "system_prompt", a text that comes first, and, as TRL's, "tools" or "functions" (JSON
schemas, or their JSON text), "documents" and "chat_template_kwargs", which the chat template then
sees. A message and a turn keep all their fields. Arguments of tool calls may be JSON text and
become objects (data/tool_calls.py).

These are the layouts of OpenAI's and TRL's, FastChat's and Stanford Alpaca's files. The peers cast
what does not fit (a number as content, a null) or drop it; here it is an error with its location.
So is a field that a format does not take (data/fields.py); but beside a text or token ids, which
say all of a sample themselves, fields are ignored.

Left out: preference data, per-character masks, images and audio.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from data.chat_template import GIVEN_VARIABLES
from data.fields import Fields, check_objective, excerpt, kind_of, without
from data.records import Record
from data.tool_calls import decode_arguments
from foreign.json_text import parse_json

FORMATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "text", "tokenized")
DEFAULT_TEXT_FIELD = "text"

# what a record may have beside its messages
SYSTEM_FIELDS = ("system", "system_prompt")
CONVERSATION_FIELDS = (
    *SYSTEM_FIELDS,
    "tools",
    "functions",
    "documents",
    "chat_template_kwargs",
)

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
        ValueError: none fits, or the record is preference data.
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
    # a data set of two formats has null in the fields of the other one
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, keys in needs.items():
        if all(key in fields for key in keys):
            return name
    check_objective(fields)
    known = "; ".join(f"{name} needs {' and '.join(keys)}" for name, keys in needs.items())
    raise ValueError(
        f"the record's fields must be those of a format: got {', '.join(fields) or 'none'}; "
        f"{known}; rename the fields, or name the text's with --text-field"
    )


def to_example(
    record: Record,
    data_format: str,
    *,
    text_field: str,
    has_chat_template: bool,
    ignored_fields: Collection[str] = (),
) -> Example:
    """Read a record as an example of a format.

    Args:
        has_chat_template: Alpaca records become conversations, else Stanford Alpaca's two text
            prompts.
        ignored_fields: fields of the record and of its messages that are left out.

    Raises:
        ValueError: the record does not fit the format; the message starts with its location.
    """
    values = without(record.fields, ignored_fields) if ignored_fields else record.fields
    fields = Fields(record.location, values, data_format)
    match data_format:
        case "messages" | "sharegpt" | "alpaca" | "prompt-completion":
            try:
                check_objective(values)
            except ValueError as error:
                raise ValueError(f"{record.location}: {error}") from error
            return _ANSWERS[data_format](fields, has_chat_template)
        case "text":
            return Text(fields.text(DEFAULT_TEXT_FIELD if record.is_document else text_field))
        case "tokenized":
            return _token_ids(fields)
    raise ValueError(f"--data-format must be auto or {', '.join(FORMATS)}: got {data_format!r}")


def _conversation(
    messages: list[dict[str, Any]], first: int, fields: Fields, own: Sequence[str]
) -> Conversation:
    """The conversation whose assistant messages from index `first` on are learned.

    Args:
        own: the fields that the messages are from.
    """
    fields.refuse_others((*own, *CONVERSATION_FIELDS), [m.get("content", "") for m in messages])
    if system := _system(messages, fields):
        messages = [{"role": "system", "content": system}, *messages]
        first += 1
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


def _system(messages: list[dict[str, Any]], fields: Fields) -> str:
    """The system prompt that the record gives beside its messages, "" if none."""
    given = [text for name in SYSTEM_FIELDS if (text := fields.optional_text(name))]
    said = [m["content"] for m in messages[:1] if m["role"] == "system"]
    if len({*given, *said}) > 1:
        raise ValueError(
            f"{fields.location}: a record must have one system prompt: got "
            f"{' and '.join(map(excerpt, (*given, *said)))}; delete what is not meant"
        )
    return "" if said or not given else given[0]


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    given = [name for name in ("tools", "functions") if fields.values.get(name) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(
            f"{fields.location}: a record must give its functions once: got tools and functions; "
            "delete one of them"
        )
    (name,) = given
    tools = fields.values[name]
    if isinstance(tools, str):
        what = f"{fields.location}: {name!r} must be a list, or the JSON text of one, which"
        tools = parse_json(tools, what, "correct it")
    objects = _objects(tools, name, fields.location)
    if name == "tools":
        return objects
    # OpenAI's older form, without what says that it is a function
    return [f if "function" in f else {"type": "function", "function": f} for f in objects]


def _variables(fields: Fields) -> dict[str, Any]:
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
        raise ValueError(f"{location}: {name!r} must be a list: got {kind_of(values)}; correct it")
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(
                f"{location}: {name}[{index}] must be an object: got {kind_of(value)}; correct it"
            )
    return values


def _messages(values: list[object], location: str, field: str) -> list[dict[str, Any]]:
    messages = []
    for index, value in enumerate(values):
        where = f"{location}: {field}[{index}]"
        if not isinstance(value, dict):
            raise ValueError(
                f'{where} must be an object with "role" and "content": got {kind_of(value)}; '
                "correct it"
            )
        role = value.get("role")
        if role not in ROLES:
            raise ValueError(
                f"{where} must have a role among {', '.join(ROLES)}: got {excerpt(role)}; "
                "correct it"
            )
        if value.get("weight") not in (None, 0, 1):
            raise ValueError(
                f"{where} must have a weight of 0 (not learned) or 1: got "
                f"{excerpt(value['weight'])}"
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
        raise ValueError(
            f"{where} must have text as its content: got {kind_of(content)}; correct it"
        )
    parts = []
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        text = part.get("text") if is_text else None
        if not isinstance(text, str):
            raise ValueError(
                f"{where} must have content parts "
                f'{{"type": "text", "text": "..."}}: got {excerpt(part)}; '
                "only text can be learned from"
            )
        parts.append(text)
    return "".join(parts)


def _of_messages(fields: Fields, has_chat_template: bool) -> Example:
    messages = _messages(fields.get("messages", list), fields.location, "messages")
    return _conversation(messages, 0, fields, ["messages"])


def _of_turns(fields: Fields, has_chat_template: bool) -> Example:
    messages = []
    for index, turn in enumerate(fields.get("conversations", list)):
        where = f"{fields.location}: conversations[{index}]"
        if not isinstance(turn, dict):
            raise ValueError(
                f'{where} must be an object with "from" and "value": got {kind_of(turn)}; '
                "correct it"
            )
        # the same field name is in use for turns written as messages
        role, content = (
            next((turn[name] for name in names if turn.get(name) is not None), None)
            for names in (("from", "role"), ("value", "content"))
        )
        if not isinstance(role, str) or role not in SHAREGPT_ROLES:
            raise ValueError(
                f"{where} must come from one of {', '.join(SHAREGPT_ROLES)}: got {excerpt(role)}; "
                "correct it"
            )
        if turn.get("content") not in (None, content):
            raise ValueError(
                f'{where} must have "value" or "content": got two that differ; delete one of them'
            )
        others = {key: each for key, each in turn.items() if key not in ("from", "value")}
        messages.append({**others, "role": SHAREGPT_ROLES[role], "content": content})
    messages = _messages(messages, fields.location, "conversations")
    return _conversation(messages, 0, fields, ["conversations"])


def _of_instruction(fields: Fields, has_chat_template: bool) -> Example:
    instruction, output = fields.text("instruction"), fields.text("output")
    context = fields.optional_text("input")
    # with the text that the three are assembled to
    own = ("instruction", "input", "output", "text")
    if has_chat_template:
        request = f"{instruction}\n\n{context}" if context else instruction
        pairs = [*_history(fields), (request, output)]
        messages = [
            {"role": role, "content": content}
            for pair in pairs
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        return _conversation(messages, 0, fields, [*own, "history"])
    fields.refuse_others(own)
    prompt = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT
    return PromptCompletion(prompt.format(instruction=instruction, input=context), output)


def _history(fields: Fields) -> list[tuple[str, str]]:
    """The turns before an instruction, as LLaMA-Factory's data sets have them: learned too."""
    if fields.values.get("history") is None:
        return []
    pairs = fields.get("history", list)
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or [type(text) for text in pair] != [str, str]:
            raise ValueError(
                f"{fields.location}: history[{index}] must be a request and its answer, two "
                f"strings: got {excerpt(pair)}; correct it"
            )
    return [(request, answer) for request, answer in pairs]


def _of_prompt(fields: Fields, has_chat_template: bool) -> Example:
    own = ("prompt", "completion")
    if not isinstance(fields.values.get("prompt"), list):
        fields.refuse_others(own)
        return PromptCompletion(fields.text("prompt"), fields.text("completion"))
    prompt = _messages(fields.get("prompt", list), fields.location, "prompt")
    completion = _messages(fields.get("completion", list), fields.location, "completion")
    return _conversation([*prompt, *completion], len(prompt), fields, own)


_ANSWERS: dict[str, Callable[[Fields, bool], Example]] = {
    "messages": _of_messages,
    "sharegpt": _of_turns,
    "alpaca": _of_instruction,
    "prompt-completion": _of_prompt,
}


def _token_ids(fields: Fields) -> TokenIds:
    input_ids, labels = fields.get("input_ids", list), fields.get("labels", list)
    for name, values in (("input_ids", input_ids), ("labels", labels)):
        # a bool is an int to isinstance
        index = next((i for i, v in enumerate(values) if type(v) is not int), None)
        if index is not None:
            raise ValueError(
                f"{fields.location}: {name}[{index}] must be an integer: got "
                f"{kind_of(values[index])}; correct it"
            )
    if len(input_ids) != len(labels):
        raise ValueError(
            f"{fields.location}: labels must be as long as input_ids: got {len(labels)} and "
            f"{len(input_ids)}; give -100 where nothing is to be learned"
        )
    return TokenIds(input_ids, labels)
