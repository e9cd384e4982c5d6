"""Answers before a model is loaded: model, adapter, prompts, lengths and memory, checked."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from answering.choice import choose_sampling
from answering.flags import DEFAULT_BATCH_SIZE, parse
from answering.lengths import choose_lengths
from answering.memory import check_memory
from answering.output import check_new_file
from answering.prompts import Prompt, describe_unused, read_prompts, text_prompt
from checkpoint.adapter_base import find_base, is_base_of
from checkpoint.files import find_checkpoint
from checkpoint.loading import describe_loading, load_sizes
from checkpoint.opening import Checkpoint, open_checkpoint
from checkpoint.stored_nf4 import describe_quantization
from data.answer_text import Opening, opening_of_words, words_of
from data.chat.template import Message
from data.prompt import (
    check_generation_prompt,
    encode_conversation,
    encode_messages,
    encode_text,
    stop_ids,
)
from data.tokenizer import Tokenizer
from foreign.guest import in_guest
from foreign.terminal import one_line
from generation.sampling import Sampling
from llama.attention import check_heads
from lora.adapter_file import find_adapter, read_adapter_config
from lora.config import LoRAConfig
from nf4.weight import Quantization
from prepare.quantization import quantization_of
from prepare.trained import settings_of, tokenizer_folder
from run.config import TrainConfig
from run.machine import choose_device, choose_dtype, configure_torch


@dataclass(frozen=True)
class AnswerJob:
    """What is to be answered, checked.

    Attributes:
        adapter: the adapter's folder and its shape, if there is one.
        quantization: of the frozen weights; None: as they are stored.
        stop_ids: the tokens that end an answer.
        opening: the tokens that an answer has before its words.
        capacity: tokens of the longest prompt and its answer.
        num_sequences: that are continued at a time.
        prompts: what to answer, with its tokens; empty for a conversation.
        output: the file for the answers; None: they are printed.
        private_as: the file whose readers alone may read the answers.
    """

    checkpoint: Checkpoint
    adapter: tuple[Path, LoRAConfig] | None
    quantization: Quantization | None
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer
    system_prompt: str
    stop_ids: frozenset[int]
    opening: Opening
    sampling: Sampling
    max_new_tokens: int
    capacity: int
    num_sequences: int
    prompts: list[tuple[Prompt, list[int]]]
    output: Path | None
    private_as: Path | None

    @property
    def first_messages(self) -> list[Message]:
        """The messages that a conversation begins with."""
        system = {"role": "system", "content": self.system_prompt}
        return [system] if self.system_prompt else []

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        return encode_messages(messages, self.tokenizer, self.checkpoint.config.vocab_size)

    def words_of(self, ids: Sequence[int]) -> str:
        """The words of an answer."""
        return self.tokenizer.decode(words_of(ids, self.opening))


def say(text: object) -> None:
    """Tell the user something in a line of stderr: stdout has the answers."""
    print(one_line(text), file=sys.stderr)


def check(arguments: Sequence[str]) -> AnswerJob:
    """Check everything that the user gave, and say what was chosen.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: a flag, a file or the
            checkpoint is not as it must be.
    """
    given = parse(arguments)
    adapter = find_adapter(given.adapter, "--adapter") if given.adapter else None
    output = Path(given.output).expanduser() if given.output else None
    if output:
        check_new_file(output)
    checkpoint = _open(given, adapter)
    name = choose_device(given.device)
    device, dtype = torch.device(name), getattr(torch, choose_dtype(given.dtype, name))
    configure_torch(device, 0, False)
    check_heads(checkpoint.config, dtype, device)
    quantization = _choose_quantization(given, checkpoint, adapter)
    lora = read_adapter_config(adapter) if adapter else None

    system_prompt = _choose_system_prompt(given, adapter)
    folder = tokenizer_folder(adapter, checkpoint.folder)
    tokenizer = Tokenizer.from_folder(folder, given.chat_template)
    has_template = not given.raw and (
        tokenizer.has_chat_template or given.chat or bool(system_prompt)
    )
    if has_template:
        check_generation_prompt(tokenizer.chat_template())
    prompts = _encoded(_read(given), system_prompt, tokenizer, has_template, checkpoint)
    positions = checkpoint.config.max_position_embeddings
    max_new_tokens, capacity = choose_lengths(given, prompts, positions)
    if max_new_tokens < (given.max_new_tokens or 0):
        say(
            f"answers have at most {max_new_tokens:,} tokens, not {given.max_new_tokens:,}: "
            f"prompt and answer have {capacity:,} together"
        )
    if given.chat:
        # it was there so that a system prompt is refused before the model is loaded
        prompts = []
    sampling, described = choose_sampling(given, checkpoint.folder)

    num_sequences = min(given.batch_size or DEFAULT_BATCH_SIZE, len(prompts)) if output else 1
    sizes = load_sizes(checkpoint, dtype, quantization)
    if lora:
        sizes.attach_lora(lora, seed=0)
    check_memory(sizes, device, num_sequences, capacity)
    for line in describe_loading(checkpoint, dtype):
        say(line)
    say(f"tokens are chosen by: {described}")
    return AnswerJob(
        checkpoint=checkpoint,
        adapter=(adapter, lora) if adapter and lora else None,
        quantization=quantization,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        system_prompt=system_prompt,
        stop_ids=stop_ids(tokenizer, checkpoint.config.eos_token_ids),
        opening=opening_of_words(tokenizer) if has_template else Opening(),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        capacity=capacity,
        num_sequences=num_sequences,
        prompts=prompts,
        output=output,
        private_as=Path(given.prompts).expanduser() if given.prompts else None,
    )


def _open(given: Namespace, adapter: Path | None) -> Checkpoint:
    """Open the checkpoint, and compare it with the base that the adapter was trained on."""
    if adapter is None:
        return open_checkpoint(find_checkpoint(given.model))
    checkpoint = open_checkpoint(find_base(adapter, given.model))
    is_base = is_base_of(adapter, checkpoint)
    if is_base is None:
        say(f"{adapter} does not say what its base was: {checkpoint.folder} is not checked")
    elif not is_base and not given.other_base:
        raise ValueError(
            f"the model must be the checkpoint that the adapter was trained on: "
            f"{checkpoint.folder} has other weights or another config.json; give that one with "
            "--model, or go on with this one by --model and --other-base"
        )
    return checkpoint


def _choose_quantization(
    given: Namespace, checkpoint: Checkpoint, adapter: Path | None
) -> Quantization | None:
    """Choose the number format of the frozen weights, and say it where no flag does."""
    stored = checkpoint.quantization
    if stored and given.quant == "none":
        raise ValueError(
            "--quant must not be none for a checkpoint that is in NF4 already: "
            f"{checkpoint.folder} has {describe_quantization(stored)}; give the one that it was "
            "made from"
        )
    if stored or given.quant == "none":
        return stored
    settings, where = settings_of(adapter) if adapter else (TrainConfig(quant="none"), "")
    trained = quantization_of(settings)
    if given.quant == "nf4":
        return trained or quantization_of(TrainConfig())
    if adapter:
        said = describe_quantization(trained)
        say(f"weights: {said}, beside which the adapter was trained ({where})")
    return trained


def _choose_system_prompt(given: Namespace, adapter: Path | None) -> str:
    """Take the run's own, and say so, where no flag has one; a text that goes on has none."""
    if given.system_prompt is not None or not adapter or given.raw:
        return given.system_prompt or ""
    settings, where = settings_of(adapter)
    if settings.system_prompt:
        say(f"system prompt: {settings.system_prompt!r}, that of {where}")
    return settings.system_prompt


def _read(given: Namespace) -> list[Prompt]:
    if given.prompts:
        prompts = read_prompts(Path(given.prompts).expanduser())
        for line in describe_unused(prompts):
            say(line)
        return prompts
    if given.chat:
        return [text_prompt("--system-prompt", "Who are you?")]
    if not given.prompt.strip():
        raise ValueError("--prompt must be a text that is not empty: got none")
    return [text_prompt("--prompt", given.prompt)]


def _encoded(
    prompts: Sequence[Prompt],
    system_prompt: str,
    tokenizer: Tokenizer,
    has_template: bool,
    checkpoint: Checkpoint,
) -> list[tuple[Prompt, list[int]]]:
    """Put each prompt beside its tokens."""
    vocab_size = checkpoint.config.vocab_size

    def encode(prompt: Prompt) -> list[int]:
        try:
            if has_template:
                return encode_conversation(
                    prompt.conversation(system_prompt), tokenizer, vocab_size
                )
            return encode_text(prompt.text(), tokenizer, vocab_size)
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from None

    # one process for all of them
    ids = in_guest(lambda: [encode(prompt) for prompt in prompts], "the prompts, tokenized,")
    return list(zip(prompts, ids, strict=True))
