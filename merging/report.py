"""What a merge did: weights changed, what rounding lost, and how the three models read a text.

base             the checkpoint as it is
base + adapter   as the adapter was trained
merged           the folder that was written
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import torch

from checkpoint.loading import load_model
from checkpoint.merged_copy import MergeFigures
from checkpoint.opening import open_checkpoint
from data.tokenizer import Tokenizer
from foreign.guest import in_guest
from llama.model import Llama
from llama.text_figures import LogitChange, ReadText, logit_change, read_text, windows_of
from lora.adapter_file import load_adapter, read_adapter_config
from merging.job import MergeJob
from prepare.data import load_data
from rows.batch import Batch
from run.resolve import DEFAULT_MAX_LENGTH

# of a text or of data: as much as an 8B model on a GPU reads in seconds, in windows that fit any
# machine
MOST_TOKENS = 32_768
WINDOW_TOKENS = 1024


@dataclass(frozen=True)
class TextFigures:
    """Figures of a text under three models; changes are against base + adapter, as trained."""

    base: ReadText
    trained: ReadText
    merged: ReadText
    base_change: LogitChange
    merged_change: LogitChange


def load_windows(job: MergeJob) -> list[Batch]:
    """Read what --text or --data names, MOST_TOKENS of it at most; nothing where neither is given.

    Raises:
        ValueError: the text has fewer than two tokens, or one that the model does not know; or the
            data are not what training takes.
    """
    if job.data:
        return _windows_of_data(job)
    return _windows_of_text(job) if job.text else []


def _windows_of_text(job: MergeJob) -> list[Batch]:
    assert job.text is not None
    try:
        text = job.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text must be UTF-8: {job.text}: {error}") from None
    tokenizer = Tokenizer.from_folder(job.tokenizer_folder)
    model = job.model.config
    ids = in_guest(lambda: encode(tokenizer, text), "--text, tokenized,")
    if len(ids) < 2:
        raise ValueError(f"--text must have at least two tokens: {job.text} has {len(ids)}")
    if max(ids) >= model.vocab_size:
        raise ValueError(
            f"--text must have tokens of the model's {model.vocab_size:,}: the tokenizer of "
            f"{job.tokenizer_folder} gives {max(ids)}"
        )
    return windows_of(ids, min(WINDOW_TOKENS, model.max_position_embeddings))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=True)[:MOST_TOKENS]


def _windows_of_data(job: MergeJob) -> list[Batch]:
    """Read --data as the adapter's run read its own: format, template, lengths, learned tokens."""
    positions = job.model.config.max_position_embeddings
    settings = replace(
        job.run,
        data=job.data,
        eval_data="",
        eval_fraction=0.0,
        # of the run's own data
        subset="",
        split="",
        eval_split="",
        max_length=min(job.run.max_length or DEFAULT_MAX_LENGTH, positions),
    )
    # the template of the run lies in its folder, under whatever name it was given
    tokenizer = Tokenizer.from_folder(job.tokenizer_folder)
    data, _ = load_data(settings, tokenizer, job.model, datetime.now().isoformat())
    windows, num_tokens = [], 0
    for sample in data.samples:
        num_tokens += len(sample.input_ids)
        if windows and num_tokens > MOST_TOKENS:
            break
        windows.append(Batch(torch.tensor([sample.input_ids]), torch.tensor([sample.labels])))
    return windows


def compare(job: MergeJob, windows: Sequence[Batch]) -> TextFigures:
    """Read the text with the three models, one after the other: one at a time is in memory."""
    base = read_text(load_model(job.model, job.device, job.dtype, None), windows)
    trained = read_text(load_trained(job), windows)
    model = load_model(open_checkpoint(job.output), job.device, job.dtype, None)
    merged = read_text(model, windows)
    return TextFigures(
        base,
        trained,
        merged,
        logit_change(model, base, trained),
        logit_change(model, merged, trained),
    )


def load_trained(job: MergeJob) -> Llama:
    """Load the base as it was while the adapter trained, with the adapter beside it."""
    model = load_model(job.model, job.device, job.dtype, job.quantization)
    model.attach_lora(read_adapter_config(job.adapter), seed=0)
    load_adapter(job.adapter, model.adapter_tensors(), job.model.vocabulary_tensors)
    return model


def describe_format(job: MergeJob) -> str:
    if job.quantization is None:
        return "as stored"
    block_size, double_quant = job.quantization
    scales = ", double quantization" if double_quant else ""
    return f"NF4, blocks of {block_size}{scales}"


def describe_merge(job: MergeJob, figures: MergeFigures) -> str:
    """Say how much was merged, and how much of it rounding lost."""
    base = "the original weights"
    if job.base == "nf4":
        base = f"dequantized weights ({describe_format(job)}, by {job.where})"
    share = figures.num_changed / figures.num_weights
    return (
        f"merged {figures.num_tensors:,} updates into {base}: {figures.num_changed:,} of "
        f"{figures.num_weights:,} weights changed ({share:.1%})\n"
        f"rounding lost {figures.lost:.2%} of the update (norm of its error over the update's)"
    )


def describe_text(job: MergeJob, windows: Sequence[Batch], figures: TextFigures) -> str:
    """Tabulate the perplexity under the three models, and the changes of the logits."""
    num_tokens = sum(window.input_ids.shape[1] for window in windows)
    if job.data:
        what = f"{job.data}, the first {len(windows):,} samples with {num_tokens:,} tokens"
        what += "; perplexity of the learned tokens"
    else:
        longest = windows[0].input_ids.shape[1]
        what = f"{job.text}, the first {num_tokens:,} tokens in windows of {longest:,}"
    lines = [
        f"{what}; logits against base + adapter ({describe_format(job)}, by {job.where})",
        f"{'':16}{'perplexity':>12}{'max change':>12}{'mean change':>13}",
    ]
    for name, reading, change in (
        ("base", figures.base, figures.base_change),
        ("base + adapter", figures.trained, None),
        ("merged", figures.merged, figures.merged_change),
    ):
        line = f"{name:16}{reading.perplexity:12.4f}"
        line += f"{change.largest:12.4f}{change.mean:13.5f}" if change else f"{'-':>12}{'-':>13}"
        lines.append(line)
    return "\n".join(lines)
