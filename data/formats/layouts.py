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

The fields may have other names (data/formats/field_names.py), and a list of messages may be written
in other ways (data/formats/turns.py).

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

from collections.abc import Callable, Collection, Mapping

from data.formats.conversations import to_conversation
from data.formats.examples import Example, PromptCompletion, Text, TokenIds
from data.formats.field_names import NEEDED_FIELDS, check_present, find_names, has_names
from data.formats.fields import Fields, check_objective, excerpt, kind_of, without
from data.formats.turns import SHAREGPT_ROLES, to_messages
from data.reading.record import Record

FORMATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "text", "tokenized")
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


def detect_format(values: Mapping[str, object], given: Mapping[str, str] | None = None) -> str:
    """Name the format that a record's field names belong to.

    Where several fit, the one of the fields that the user named comes first, and else the more
    specific one: an Alpaca file often carries the assembled "text" too.

    Args:
        given: our names of fields that the user named, each with the record's.

    Raises:
        ValueError: none fits, two fit that leave out each other, the record lacks a field that the
            user named, or it is preference data.
    """
    given = given or {}
    check_present(values, given)
    # a data set of two formats has null in the fields of the other one
    values = {name: value for name, value in values.items() if value is not None}
    own = [name for name in NEEDED_FIELDS if has_names(values, name, given, known=False)]
    known = [name for name in NEEDED_FIELDS if has_names(values, name, given, known=True)]
    fitting = [*dict.fromkeys((*own, *known))]
    fitting.sort(key=lambda name: given.keys().isdisjoint(NEEDED_FIELDS[name]))
    if fitting[:1] == ["text"] and len(fitting) > 1 and "text" not in given:
        others = ", ".join(name for name in values if name != "text")
        raise ValueError(
            f"the record must be a text or a request with its answer: got text beside {others}; "
            "give --ignore-fields text, or learn from it alone with --data-format text"
        )
    if fitting:
        return fitting[0]
    check_objective(values)
    needs = "; ".join(f"{name} needs {' and '.join(n)}" for name, n in NEEDED_FIELDS.items())
    raise ValueError(
        f"the record's fields must be those of a format: got {', '.join(values) or 'none'}; "
        f"{needs}; say which they are, as with --fields text=... or "
        "--fields instruction=...,output=..."
    )


def to_example(
    record: Record,
    data_format: str,
    *,
    has_chat_template: bool,
    ignored_fields: Collection[str] = (),
    field_names: Mapping[str, str] | None = None,
    settled_names: Mapping[str, str] | None = None,
) -> Example:
    """Read a record as an example of a format.

    Args:
        has_chat_template: Alpaca records become conversations, else Stanford Alpaca's two text
            prompts.
        ignored_fields: fields of the record and of its messages that are left out.
        field_names: our names of fields that the user named, each with the record's; a text file
            has none.
        settled_names: as find_names.

    Raises:
        ValueError: the record does not fit the format; the message starts with its location.
    """
    if data_format not in FORMATS:
        raise ValueError(f"--data-format must be auto or {', '.join(FORMATS)}: got {data_format!r}")
    values = without(record.fields, ignored_fields) if ignored_fields else record.fields
    given = {} if record.is_document else field_names or {}
    try:
        if data_format in _ANSWERS:
            named = given.values()
            check_objective({name: each for name, each in values.items() if name not in named})
        names = find_names(values, data_format, given, settled_names)
    except ValueError as error:
        raise ValueError(f"{record.location}: {error}") from error
    fields = Fields(record.location, values, data_format, names)
    if data_format == "text":
        return Text(fields.text("text"))
    if data_format == "tokenized":
        return _token_ids(fields)
    return _ANSWERS[data_format](fields, has_chat_template)


def _of_messages(fields: Fields, has_chat_template: bool) -> Example:
    turns, name = fields.get("messages", list), fields.name("messages")
    messages = to_messages(turns, fields.location, name)
    return to_conversation(messages, 0, fields, ["messages"])


def _of_turns(fields: Fields, has_chat_template: bool) -> Example:
    turns, name = fields.get("conversations", list), fields.name("conversations")
    messages = to_messages(turns, fields.location, name, SHAREGPT_ROLES)
    return to_conversation(messages, 0, fields, ["conversations"])


def _of_instruction(fields: Fields, has_chat_template: bool) -> Example:
    instruction, output = fields.text("instruction"), fields.text("output")
    context = fields.optional_text("input")
    own = ["instruction", "input", "output"]
    # Stanford's files may also have the text that was assembled of the three
    if [fields.name(ours) for ours in own] == own:
        own.append("text")
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
    if fields.value("history") is None:
        return []
    pairs, name = fields.get("history", list), fields.name("history")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or [type(text) for text in pair] != [str, str]:
            raise ValueError(
                f"{fields.location}: {name}[{index}] must be a request and its answer, two "
                f"strings: got {excerpt(pair)}; correct it"
            )
    return [(request, answer) for request, answer in pairs]


def _of_prompt(fields: Fields, has_chat_template: bool) -> Example:
    own = ("prompt", "completion")
    if not isinstance(fields.value("prompt"), list):
        fields.refuse_others(own)
        return PromptCompletion(fields.text("prompt"), fields.text("completion"))
    prompt, completion = (
        to_messages(fields.get(ours, list), fields.location, fields.name(ours)) for ours in own
    )
    return to_conversation([*prompt, *completion], len(prompt), fields, own)


_ANSWERS: dict[str, Callable[[Fields, bool], Example]] = {
    "messages": _of_messages,
    "sharegpt": _of_turns,
    "alpaca": _of_instruction,
    "prompt-completion": _of_prompt,
}


def _token_ids(fields: Fields) -> TokenIds:
    input_ids, labels = fields.get("input_ids", list), fields.get("labels", list)
    for ours, values in (("input_ids", input_ids), ("labels", labels)):
        # a bool is an int to isinstance
        index = next((i for i, v in enumerate(values) if type(v) is not int), None)
        if index is not None:
            raise ValueError(
                f"{fields.location}: {fields.name(ours)}[{index}] must be an integer: got "
                f"{kind_of(values[index])}; correct it"
            )
    if len(input_ids) != len(labels):
        raise ValueError(
            f"{fields.location}: labels must be as long as input_ids: got {len(labels)} and "
            f"{len(input_ids)}; give -100 where nothing is to be learned"
        )
    return TokenIds(input_ids, labels)
