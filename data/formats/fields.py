"""The fields of a record: each is looked up with an error that names the record, and none is lost.

A field that a format does not take would be lost, perhaps with the instruction that the answer
follows. Such a field is refused by name, unless

- it is empty, or repeats a text that is taken (the "prompt" beside "messages");
- it says where the record is from (IGNORED_FIELDS);
- the user names it with --ignore-fields.

Data of another objective, pairs of answers or answers with a verdict, would teach the rejected
answers too, and is refused by that name.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

# fields of a record or a message on which no answer depends
IGNORED_FIELDS = frozenset(
    (
        *("id", "_id", "uid", "uuid", "idx", "index", "hash"),
        # pandas' index in parquet, and in a CSV that was read and written again
        *("__index_level_0__", "Unnamed: 0"),
        *("prompt_id", "conversation_id", "message_id", "session_id", "user_id"),
        *("source", "sources", "data_source", "dataset", "origin", "split", "url", "license"),
        *("created", "created_at", "timestamp", "date", "author", "generator"),
        *("model", "model_name", "category", "subcategory", "topic", "task", "task_type", "type"),
        *("tags", "lang", "language", "meta", "metadata", "length", "num_turns", "num_tokens"),
    )
)
# fields of preference data, and of answers with a reward
_PREFERENCE_FIELDS = (
    *("chosen", "rejected", "score_chosen", "score_rejected", "chosen_score", "rejected_score"),
    *("chosen_rating", "rejected_rating", "reward", "rewards", "margin"),
)
# KTO's "label" says whether the answer is a good one; another data set's may be anything
_VERDICTS = ("true", "false", "0", "1")


@dataclass(frozen=True)
class Fields:
    """A record's fields, each looked up by our name, with an error that names the record.

    Attributes:
        names: our name of each field that the record has, with the record's
            (data/formats/field_names.py).
    """

    location: str
    values: Mapping[str, object]
    data_format: str
    names: Mapping[str, str]

    def name(self, ours: str) -> str:
        return self.names.get(ours, ours)

    def value(self, ours: str) -> object:
        """The value of a field, None where the record has none."""
        return self.values.get(self.names[ours]) if ours in self.names else None

    def get(self, ours: str, kind: type) -> Any:
        name, value = self.name(ours), self.value(ours)
        if ours not in self.names or name not in self.values:
            raise ValueError(
                f"{self.location}: a {self.data_format} record must have the field {name!r}: got "
                f"{', '.join(self.values) or 'no fields'}; add it, say which it is with --fields "
                f"{name}=..., or choose another --data-format"
            )
        if not isinstance(value, kind):
            raise ValueError(
                f"{self.location}: {name!r} must be {_KINDS[kind]}: got {kind_of(value)}; "
                "correct it"
            )
        return value

    def text(self, ours: str) -> str:
        return self.get(ours, str)

    def optional_text(self, ours: str) -> str:
        return "" if self.value(ours) is None else self.text(ours)

    def refuse_others(self, taken: Collection[str], texts: Collection[str] = ()) -> None:
        """Refuse fields that are not taken and would be lost.

        Args:
            taken: our names.
            texts: the texts of the fields that are taken.
        """
        taken = [self.name(ours) for ours in taken]
        others = [
            name
            for name, value in self.values.items()
            if name not in taken
            and name not in IGNORED_FIELDS
            and not is_empty(value)
            and value not in texts
        ]
        if others:
            raise ValueError(
                f"{self.location}: a {self.data_format} record must have no field that would be "
                f"lost: got {', '.join(others)} beside "
                f"{', '.join(name for name in taken if name in self.values)}; if no answer depends "
                f"on it, give --ignore-fields {','.join(others)}"
            )


def is_empty(value: object) -> bool:
    return value in (None, "", [], {})


def without(value: Any, names: Collection[str]) -> Any:
    """A record, or a list of its messages, without the fields of these names."""
    if isinstance(value, list):
        return [without(each, names) if isinstance(each, dict) else each for each in value]
    return {
        key: without(each, names) if isinstance(each, list) else each
        for key, each in value.items()
        if key not in names
    }


def check_objective(values: Mapping[str, object]) -> None:
    """Refuse a record of preference data.

    Raises:
        ValueError: names its fields.
    """
    found = [name for name in _PREFERENCE_FIELDS if values.get(name) is not None]
    if str(values.get("label")).lower() in _VERDICTS:
        found.append("label")
    if found:
        raise ValueError(
            "the data must be examples to follow, not preference data (DPO's chosen and rejected, "
            f"KTO's label, rewards): got {', '.join(found)}; keep the good answers and write them "
            "as messages, or, if every answer is one to learn, give --ignore-fields "
            f"{','.join(found)}"
        )


_KINDS: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


def kind_of(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return kinds.get(type(value)) or excerpt(value)


def excerpt(value: object, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
