"""The kinds of examples: a conversation, a prompt with its completion, a text, or token ids."""

from dataclasses import dataclass, field, replace
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

    def with_system_prompt(self, text: str) -> "Conversation":
        """The conversation under a system prompt, unless it has its own."""
        if any(message["role"] in ("system", "developer") for message in self.messages):
            return self
        messages = [{"role": "system", "content": text}, *self.messages]
        return replace(self, messages=messages, targets=[index + 1 for index in self.targets])


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
