"""A prompt as a checkpoint wants to be asked."""

from data.tokenizer import Tokenizer


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a prompt, as a user's message where there is a chat template.

    Raises:
        ValueError: the template refuses it.
    """
    if not tokenizer.has_chat_template:
        return tokenizer.encode(prompt, add_special_tokens=True)
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.chat_template().render(messages, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)
