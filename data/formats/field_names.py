"""The names of a record's fields: which of them is which of ours.

A format has fields of its own names (data/formats/layouts.py). A record may call them otherwise:

- as --fields says: `--fields instruction=question,output=answer`, ours first;
- as many public data sets do (KNOWN_NAMES), where one field alone can be meant.

Where two fields of a record can be the same one of ours, as where a question has an answer and a
solution, neither is taken: the record is refused, and the message says how to choose. Other
trainers take the first of a list.
"""

from collections.abc import Collection, Mapping

from data.formats.conversations import CONVERSATION_FIELDS

# the fields by which a format is recognized; of two formats the earlier one says more
NEEDED_FIELDS = {
    "tokenized": ("input_ids", "labels"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
FIELDS = {
    "tokenized": NEEDED_FIELDS["tokenized"],
    "messages": (*NEEDED_FIELDS["messages"], *CONVERSATION_FIELDS),
    "sharegpt": (*NEEDED_FIELDS["sharegpt"], *CONVERSATION_FIELDS),
    "prompt-completion": (*NEEDED_FIELDS["prompt-completion"], *CONVERSATION_FIELDS),
    "alpaca": (*NEEDED_FIELDS["alpaca"], "input", "history", *CONVERSATION_FIELDS),
    "text": NEEDED_FIELDS["text"],
}
# GSM8K has question and answer, OpenOrca question and response, Dolly instruction, context and
# response, MATH problem and solution, MetaMath and ms-swift query and response, FLAN inputs and
# targets, Capybara and lmsys-chat-1m conversation
KNOWN_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "sharegpt": {"conversations": ("conversation",)},
    "alpaca": {
        # where nothing else asks, the input does
        "instruction": ("question", "query", "problem", "prompt", "inputs", "input"),
        "output": ("answer", "response", "solution", "completion", "targets"),
        "input": ("context",),
    },
}


def parse_fields(text: str) -> dict[str, str]:
    """Read the value of --fields: our names, each with the record's.

    Raises:
        ValueError: a part of it is not "ours=theirs", or names a field that no format has, or one
            that was named before.
    """
    names: dict[str, str] = {}
    known = dict.fromkeys(name for fields in FIELDS.values() for name in fields)
    for part in text.split(",") if text else ():
        ours, equals, theirs = (each.strip() for each in part.partition("="))
        if not equals or not theirs:
            raise ValueError(
                "--fields must be pairs as instruction=question,output=answer, the record's name "
                f"second: got {part!r}"
            )
        if ours not in known:
            raise ValueError(
                f"--fields must have one of {', '.join(known)} before the equals sign: got {ours!r}"
            )
        if ours in names or theirs in names.values():
            raise ValueError(f"--fields must name each field once: got {part!r} after another")
        names[ours] = theirs
    # the order says nothing
    return dict(sorted(names.items()))


def check_fields(given: Collection[str], data_format: str) -> None:
    """Refuse names of --fields that the format has no use for.

    Raises:
        ValueError: names them.
    """
    if others := [ours for ours in given if ours not in FIELDS[data_format]]:
        raise ValueError(
            f"--fields must name fields of the format {data_format}, "
            f"{', '.join(FIELDS[data_format])}: got {', '.join(others)}; leave them out, or choose "
            "another --data-format"
        )


def check_present(values: Mapping[str, object], given: Mapping[str, str]) -> None:
    """Refuse a record that lacks a field which the user named.

    Raises:
        ValueError: names the field, and those that the record has.
    """
    for ours, theirs in given.items():
        if theirs not in values:
            raise ValueError(
                f"--fields {ours}={theirs} must name a field of every record: got "
                f"{', '.join(values) or 'no fields'}; correct the name, or give the record the "
                "field (null where it has none)"
            )


def find_names(
    values: Mapping[str, object],
    data_format: str,
    given: Mapping[str, str],
    settled: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Find the fields of a format in a record: our name of each that the record has, with its own.

    Args:
        given: those that the user named.
        settled: those that the format needs, as the first record of the data calls them.

    Raises:
        ValueError: the record lacks a field that the user named, or two of its fields can be one
            of ours.
    """
    check_present(values, given)
    names = {**(settled or {}), **given}
    for ours in FIELDS[data_format]:
        if ours in names:
            continue
        found = _candidates(values, data_format, ours, names.values())
        if len(found) > 1:
            choices = " or ".join(f"--fields {ours}={theirs}" for theirs in found)
            raise ValueError(
                f"a record of the format {data_format} must have one {ours}: got "
                f"{' and '.join(found)}; give {choices}, and --ignore-fields for what no answer "
                "depends on"
            )
        if found:
            names[ours] = found[0]
    return names


def settle_names(
    values: Mapping[str, object], data_format: str, given: Mapping[str, str]
) -> dict[str, str]:
    """Find the names that the first record has for the fields that its format needs.

    All records must have these. One that lacks its question would otherwise be read with another
    field as the question.

    Raises:
        ValueError: as find_names.
    """
    names = find_names(values, data_format, given)
    return {ours: names[ours] for ours in NEEDED_FIELDS[data_format] if ours in names}


def has_names(
    values: Mapping[str, object], data_format: str, given: Mapping[str, str], *, known: bool
) -> bool:
    """Whether a record has all fields that a format needs.

    Args:
        known: under the names that public data sets give them, too.
    """
    return all(
        bool(_candidates(values, data_format, ours, given.values()))
        if known and ours not in given
        else values.get(given.get(ours, ours)) is not None
        for ours in NEEDED_FIELDS[data_format]
    )


def _candidates(
    values: Mapping[str, object], data_format: str, ours: str, taken: Collection[str]
) -> list[str]:
    """The record's fields that can be one of ours: more than one are a choice."""
    if values.get(ours) is not None and ours not in taken:
        return [ours]
    known = KNOWN_NAMES.get(data_format, {}).get(ours, ())
    found = [name for name in known if values.get(name) is not None and name not in taken]
    # what is empty is a candidate where nothing else is
    found = [name for name in found if values[name] != ""] or found
    return found or ([ours] if ours in values and ours not in taken else [])
