"""The layouts of records, and the example that a record of each layout is read as.

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
become objects (data/formats/tool_calls.py).

These are the layouts of OpenAI's and TRL's, FastChat's and Stanford Alpaca's files. Other trainers
cast a value that does not fit (a number as content, a null) or drop it; here it is an error with
its location.
So is a field that a format does not take (data/formats/fields.py); but beside a text or token ids,
which say all of a sample themselves, other fields are ignored.

Left out: preference data, per-character masks, images and audio.
"""

from collections.abc import Callable, Collection

from data.formats.conversations import to_conversation, to_messages
from data.formats.examples import Example, PromptCompletion, Text, TokenIds
from data.formats.fields import Fields, check_objective, excerpt, kind_of, without
from data.reading.record import Record

FORMATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "text", "tokenized")
DEFAULT_TEXT_FIELD = "text"
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


def detect_format(fields: dict[str, object], text_field: str = DEFAULT_TEXT_FIELD) -> str:
    """Name the format that a record's field names belong to.

    Where several fit, the more specific one is named: an Alpaca file often carries the assembled
    "text" too. A text_field other than the default is the user's choice and comes first.

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


def _of_messages(fields: Fields, has_chat_template: bool) -> Example:
    messages = to_messages(fields.get("messages", list), fields.location, "messages")
    return to_conversation(messages, 0, fields, ["messages"])


def _of_turns(fields: Fields, has_chat_template: bool) -> Example:
    messages = []
    for index, turn in enumerate(fields.get("conversations", list)):
        where = f"{fields.location}: conversations[{index}]"
        if not isinstance(turn, dict):
            raise ValueError(
                f'{where} must be an object with "from" and "value": got {kind_of(turn)}; '
                "correct it"
            )
        # some files have messages under the same field name
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
    messages = to_messages(messages, fields.location, "conversations")
    return to_conversation(messages, 0, fields, ["conversations"])


def _of_instruction(fields: Fields, has_chat_template: bool) -> Example:
    instruction, output = fields.text("instruction"), fields.text("output")
    context = fields.optional_text("input")
    # a file may also have the text that was assembled of the three
    own = ("instruction", "input", "output", "text")
    if has_chat_template:
        request = f"{instruction}\n\n{context}" if context else instruction
        pairs = [*_history(fields), (request, output)]
        messages = [
            {"role": role, "content": content}
            for pair in pairs
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        return to_conversation(messages, 0, fields, [*own, "history"])
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
    prompt = to_messages(fields.get("prompt", list), fields.location, "prompt")
    completion = to_messages(fields.get("completion", list), fields.location, "completion")
    return to_conversation([*prompt, *completion], len(prompt), fields, own)


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
