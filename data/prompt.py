"""A prompt as token ids, in the form that a checkpoint expects, and what ends its answer."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from data.chat.template import ChatTemplate, Message
from data.chat.unwritten import check_written
from data.formats.examples import Conversation
from data.formats.tool_calls import show_arguments
from data.tokenizer import Tokenizer
from foreign.guest import in_guest

# a conversation that is written to see what a template writes around an answer
_QUESTION = [{"role": "user", "content": "Who are you?"}]
_ANSWER = "Quatrain"


def encode_prompt(
    prompt: str, tokenizer: Tokenizer, vocab_size: int, system_prompt: str = ""
) -> list[int]:
    """Token ids of a prompt, as a user's message where there is a chat template, under the system
    prompt if there is one.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        ValueError: the template refuses it, it takes too long, or the model does not know one of
            its tokens.
    """
    if tokenizer.has_chat_template:
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages = [*system, {"role": "user", "content": prompt}]
        return encode_messages(messages, tokenizer, vocab_size)
    return encode_text(prompt, tokenizer, vocab_size)


def encode_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, vocab_size: int
) -> list[int]:
    """Token ids of messages without tools; as `encode_conversation`."""
    return encode_conversation(Conversation(list(messages), []), tokenizer, vocab_size)


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, vocab_size: int
) -> list[int]:
    """Token ids of a conversation, with the template's prompt for the assistant's next answer.

    Raises:
        ValueError: as `encode_prompt`, there is no chat template, or it leaves out a part that the
            answer may depend on.
    """
    tools = conversation.tools
    for message in conversation.messages:
        # a call of a tool needs no words
        _check_unicode(message.get("content", ""))
    template = tokenizer.chat_template(has_tools=tools is not None)

    def encode() -> list[int]:
        template.check_variables([*(["tools"] if tools else []), *conversation.variables])
        messages = show_arguments(conversation.messages, template)
        seen = template.variables(tools=tools, variables=conversation.variables, now=datetime.now())
        text = template.write(messages, seen | {"add_generation_prompt": True})
        # the answer, behind the last message, may depend on all of them
        check_written(template, messages, seen, text, [len(messages)])
        return tokenizer.encode(text, add_special_tokens=False)

    ids = in_guest(encode, "the prompt, written by the chat template and tokenized,")
    tokenizer.check_rows(ids, vocab_size, "a prompt")
    return ids


def encode_text(text: str, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Token ids of a text that is to be continued as it stands.

    Raises:
        ValueError: it takes too long, or the model does not know one of its tokens.
    """
    _check_unicode(text)
    what = "the prompt, tokenized,"
    ids = in_guest(lambda: tokenizer.encode(text, add_special_tokens=True), what)
    tokenizer.check_rows(ids, vocab_size, "a prompt")
    return ids


def _check_unicode(text: str) -> None:
    if (shown := text.encode(errors="backslashreplace").decode()) != text:
        raise ValueError(f"a prompt must be valid Unicode: got {shown}; write it again in UTF-8")


def stop_ids(tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> frozenset[int]:
    """Find the tokens that end an answer: EOS, by the model and by the tokenizer, and the token
    with which the chat template ends the assistant's turn.

    Raises:
        ValueError: the template is broken, or takes too long.
    """
    found = {*eos_token_ids, tokenizer.eos_token_id}
    if tokenizer.has_chat_template:
        template = tokenizer.chat_template()
        found.add(in_guest(lambda: _end_of_turn(template, tokenizer), template.name))
    return frozenset(found - {None})


def _end_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The special token behind the assistant's words, if there is one."""
    _, found, behind = _answered(template, datetime.now()).rpartition(_ANSWER)
    if not found:
        return None
    behind = behind.lstrip()
    tokens = [token for token in tokenizer.closing_tokens if behind.startswith(token)]
    # one special token may begin with another
    return tokenizer.added_ids.get(max(tokens, key=len)) if tokens else None


def check_generation_prompt(template: ChatTemplate) -> None:
    """Refuse a template after whose text a model would not begin to answer.

    Many templates open the assistant's turn where add_generation_prompt is given. Those of Llama 2
    and Mistral need not: there the answer follows the user's message at once.

    Raises:
        ValueError: the turn has an opening, and the template does not write it.
    """
    if not in_guest(lambda: _opens_turn(template), template.name):
        raise ValueError(
            f"{template.name} must open the assistant's turn where add_generation_prompt is given: "
            "it writes the same text without it; choose another template with --chat-template, or "
            "continue the prompt as it stands with --raw"
        )


def _opens_turn(template: ChatTemplate) -> bool:
    now = datetime.now()
    asked = template.render(_QUESTION, add_generation_prompt=True, now=now)
    if asked != template.render(_QUESTION, now=now):
        return True
    answered = _answered(template, now)
    return answered.startswith(asked) and answered[len(asked) :].lstrip().startswith(_ANSWER)


def _answered(template: ChatTemplate, now: datetime) -> str:
    return template.render([*_QUESTION, {"role": "assistant", "content": _ANSWER}], now=now)
