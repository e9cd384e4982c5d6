"""A record's messages as a conversation, with the system prompt, the tools and the variables that
stand beside them in the record.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data.chat.template import GIVEN_VARIABLES
from data.formats.examples import Conversation
from data.formats.fields import Fields, excerpt, kind_of
from foreign.json_text import parse_json

# the fields that a record may have beside its messages
SYSTEM_FIELDS = ("system", "system_prompt")
CONVERSATION_FIELDS = (
    *SYSTEM_FIELDS,
    "tools",
    "functions",
    "documents",
    "chat_template_kwargs",
)


def to_conversation(
    messages: list[dict[str, Any]], first: int, fields: Fields, own: Sequence[str]
) -> Conversation:
    """The conversation whose assistant messages from index `first` on are learned.

    Args:
        own: the fields that the messages are from.
    """
    fields.refuse_others((*own, *CONVERSATION_FIELDS), [m.get("content", "") for m in messages])
    found = to_request(messages, fields)
    first += len(found.messages) - len(messages)
    messages = found.messages
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
    return replace(found, targets=targets)


def to_request(messages: list[dict[str, Any]], fields: Fields) -> Conversation:
    """The conversation that a record asks to be answered, of which nothing is learned."""
    if system := _system(messages, fields):
        messages = [{"role": "system", "content": system}, *messages]
    return Conversation(messages, [], _tools(fields), _variables(fields))


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
    given = [ours for ours in ("tools", "functions") if fields.value(ours) not in (None, "")]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(
            f"{fields.location}: a record must give its functions once: got tools and functions; "
            "delete one of them"
        )
    (ours,) = given
    name, tools = fields.name(ours), fields.value(ours)
    if isinstance(tools, str):
        what = f"{fields.location}: {name!r} must be a list, or the JSON text of one, which"
        tools = parse_json(tools, what, "correct it")
    objects = _objects(tools, name, fields.location)
    if ours == "tools" and fields.data_format != "sharegpt":
        return objects
    # OpenAI's older form and LLaMA-Factory's tools have no wrapper of type "function"
    return [f if "function" in f else {"type": "function", "function": f} for f in objects]


def _variables(fields: Fields) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    if (documents := fields.value("documents")) is not None:
        name = fields.name("documents")
        variables["documents"] = _objects(documents, name, fields.location)
    if fields.value("chat_template_kwargs") is not None:
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
