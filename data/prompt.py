"""A prompt as token ids, in the form that a checkpoint expects."""

from data.tokenizer import Tokenizer
from foreign.guest import in_guest


def encode_prompt(prompt: str, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Token ids of a prompt, as a user's message where there is a chat template.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        ValueError: the template refuses it, it takes too long, or the model does not know one of
            its tokens.
    """
    if (shown := prompt.encode(errors="backslashreplace").decode()) != prompt:
        raise ValueError(f"a prompt must be valid Unicode: got {shown}; write it again in UTF-8")
    what = "the prompt, written by the chat template and tokenized,"
    ids = in_guest(lambda: _encode(prompt, tokenizer), what)
    tokenizer.check_rows(ids, vocab_size, "a prompt")
    return ids


def _encode(prompt: str, tokenizer: Tokenizer) -> list[int]:
    text, has_template = prompt, tokenizer.has_chat_template
    if has_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.chat_template().render(messages, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=not has_template)
