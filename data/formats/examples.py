"""The kinds of examples: a conversation, a prompt with its completion, a text, or token ids."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template reads them, and the indices of those to be learned.

    Attributes:
        tools: JSON schemas of the functions that the assistant may call; an empty list and None are
            different to templates.
        variables: other variables that the record gives the template.
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
