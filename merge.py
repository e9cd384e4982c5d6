"""Merge an adapter into its base model's weights: read this file top to bottom.

    python merge.py --model M --adapter OUT --output DIR              into the 16-bit weights
    python merge.py --model M --adapter OUT --output DIR --base nf4   into dequantized weights
    ... --text FILE                               and compare base, adapter and result on a text

QLoRA trains an adapter beside NF4 weights. The original weights, without NF4's errors, are the
better base to serve it on; `--base nf4` merges into the weights that the adapter was trained
beside. Both round to the checkpoint's dtype, which loses a part of the update. `main` tells the
story; its steps follow.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint.files import COMPANIONS, INDEX_NAME, SINGLE_NAME, find_checkpoint
from checkpoint.identity import identify
from checkpoint.loading import load_model
from checkpoint.merged_copy import MergeFigures, read_updates, write_merged_shards
from checkpoint.opening import Checkpoint, open_checkpoint
from data.tokenizer import Tokenizer
from data.tokenizer_files import OLD_FILES, TOKENIZER_FILE
from foreign.guest import in_guest
from foreign.terminal import guard_output, one_line
from llama.config import CONFIG_NAME, GENERATION_CONFIG_NAME
from llama.model import Llama, projection_shapes
from llama.text_figures import LogitChange, ReadText, logit_change, read_text, windows_of
from lora.adapter_file import (
    WEIGHTS_NAME,
    find_adapter,
    load_adapter,
    read_adapter_config,
    read_base_identity,
)
from nf4.blockwise import check_block_size
from nf4.weight import Quantization
from prepare.quantization import quantization_of
from run.checkpoint import CHECKPOINT_NAME
from run.config import TrainConfig, find_config, read_fields
from run.folder import check_new_folder, new_output
from run.last_door import LastDoor
from run.machine import choose_device, choose_dtype
from run.privacy import as_private_as

# beside the weights, for programs that read older tokenizers
OTHER_TOKENIZER_FILES = (*OLD_FILES, "added_tokens.json")
# of --text: as much as an 8B model on a GPU reads in seconds, in windows that fit any machine
MOST_TOKENS = 32_768
WINDOW_TOKENS = 1024


@dataclass(frozen=True)
class MergeConfig:
    """The command line, resolved.

    Attributes:
        quantization: of the weights while the adapter was trained; None: 16 or 32 bits.
        where: the source of `quantization`, for messages.
        other_base: whether the model may be another one than the adapter was trained on.
    """

    model: Checkpoint
    adapter: Path
    output: Path
    base: str
    text: Path | None
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization | None
    where: str
    other_base: bool

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the merged model's tokenizer: the run's, where it has one."""
        folder = run_folder(self.adapter)
        return folder if (folder / TOKENIZER_FILE).is_file() else self.model.folder


@dataclass(frozen=True)
class TextFigures:
    """Figures of a text under three models; changes are against base + adapter, as trained."""

    base: ReadText
    trained: ReadText
    merged: ReadText
    base_change: LogitChange
    merged_change: LogitChange


def main(arguments: Sequence[str]) -> None:
    config = parse(arguments)
    base = config.model
    if base.quantization:
        raise ValueError(
            f"--model must be a checkpoint in 16 or 32 bits: {base.folder} is in NF4 already; "
            "give the one it was made from, with --base nf4 to merge into its dequantized weights"
        )
    for remark in base.remarks:
        print(one_line(remark))
    shapes = projection_shapes(base.config)
    updates = read_updates(config.adapter, shapes, base.vocabulary_tensors)
    check_base(config)
    files = files_beside_the_weights(config)
    num_bytes = sum(shard.num_bytes for shard in base.shards)
    check_new_folder(config.output, num_bytes + sum(p.stat().st_size for p in files.values()))
    weights = (*(shard.path for shard in base.shards), config.adapter / WEIGHTS_NAME)
    windows = load_text(config) if config.text else []

    # all that was given is checked: only from here on is anything written
    with (
        as_private_as(weights),
        new_output(config.output) as folder,
        tqdm(desc="merging", unit="tensor", disable=None, leave=False) as bar,
    ):

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        quantization = config.quantization if config.base == "nf4" else None
        figures = write_merged_shards(
            base.shards, shapes, updates, quantization, config.device, folder, report
        )
        if figures.num_changed == 0:
            raise ValueError(
                "the merge must change something: every update is lost when its weight is rounded "
                f"to {base.shards[0].tensors[0].dtype}; train longer, or give the base in float32"
            )
        # config.json too is copied as a file: its fields were read once, its bytes stay
        for place, path in files.items():
            (folder / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / place)
    print(describe_merge(config, figures))
    print(f"saved the merged model in {config.output}")
    if windows:
        print(describe_text(config, windows, compare(config, windows)))


def parse(arguments: Sequence[str]) -> MergeConfig:
    """Read the command line, open the model, and read the settings of the adapter's run.

    Raises:
        FileNotFoundError: model, adapter or text are not there.
        ValueError: the model is damaged, or a flag contradicts this machine or the adapter's run.
    """
    given = build_parser().parse_args(arguments)
    adapter = find_adapter(given.adapter, "--adapter")
    text = Path(given.text).expanduser() if given.text else None
    if text and not text.is_file():
        raise FileNotFoundError(f"--text must be a file: there is none at {given.text}")
    quantization, where = trained_quantization(adapter, given.block_size, given.double_quant)
    if given.base == "nf4" and quantization is None:
        raise ValueError(
            "--base nf4 must be for an adapter that was trained beside NF4 weights: "
            f"{where} says that this one was not; use --base original"
        )
    device = choose_device(given.device)
    return MergeConfig(
        model=open_checkpoint(find_checkpoint(given.model)),
        adapter=adapter,
        output=Path(given.output).expanduser(),
        base=given.base,
        text=text,
        device=torch.device(device),
        dtype=getattr(torch, choose_dtype(given.dtype, device)),
        quantization=quantization,
        where=where,
        other_base=given.other_base,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="merge.py",
        description="Merge an adapter into its base model's weights.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="the base: checkpoint folder or hub id")
    parser.add_argument("--adapter", required=True, help="adapter folder or hub id, ours or PEFT's")
    parser.add_argument("--output", required=True, help="new folder for the merged model")
    parser.add_argument(
        "--base",
        choices=("original", "nf4"),
        default="original",
        help="weights to merge into: as the checkpoint has them, or quantized to NF4 and back "
        "(default: original)",
    )
    parser.add_argument(
        "--other-base",
        action="store_true",
        help="merge although --model is not the checkpoint that the adapter was trained on",
    )
    parser.add_argument("--text", help="file to measure perplexity and logits on")
    parser.add_argument(
        "--block-size", type=int, help="block size of NF4 (default: the adapter's run's, or 64)"
    )
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        help="scales in 8 bits (default: as in the adapter's run, or yes)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="dtype of the computation with --text; merged weights keep theirs (default: auto)",
    )
    return parser


def check_base(config: MergeConfig) -> None:
    """Compare the model with the one that the adapter was trained on.

    Raises:
        ValueError: it is another model, and --other-base is not given.
    """
    folder, trained_on = config.model.folder, read_base_identity(config.adapter)
    if not trained_on:
        print(f"{config.adapter} does not say what its base was: {folder} is not checked")
    elif trained_on != identify(config.model).original and not config.other_base:
        raise ValueError(
            f"--model must be the checkpoint that the adapter was trained on: {folder} has "
            "other weights or another config.json; give that one, or --other-base to merge into "
            "this one all the same"
        )


def run_folder(adapter: Path) -> Path:
    """Find the folder of the run that made an adapter, which may lie in one of its checkpoints."""
    is_checkpoint = CHECKPOINT_NAME.fullmatch(adapter.name) is not None
    return adapter.parent if is_checkpoint else adapter


def trained_quantization(
    adapter: Path, block_size: int | None, double_quant: bool | None
) -> tuple[Quantization | None, str]:
    """Find the quantization that the adapter was trained with: from the flags, else from its run's
    settings, else the default.

    Returns:
        The quantization, and the name of its source.

    Raises:
        ValueError: NF4 has no such block size, or the run's settings are damaged.
    """
    path = find_config(run_folder(adapter))
    run, where = TrainConfig(), "default"
    if path:
        run, where = TrainConfig(**read_fields(path)), str(path)
    given = {"block_size": block_size, "double_quant": double_quant}
    if given := {name: value for name, value in given.items() if value is not None}:
        check_block_size(given.get("block_size", run.block_size))
        run, where = replace(run, quant="nf4", **given), "the command line"
    return quantization_of(run), where


def files_beside_the_weights(config: MergeConfig) -> dict[Path, Path]:
    """Find the files that are copied byte for byte, by their place in the folder: configs, index,
    tokenizer and chat templates."""
    model = config.model.folder
    patterns = dict.fromkeys((CONFIG_NAME, INDEX_NAME, *OTHER_TOKENIZER_FILES), model)
    if (model / SINGLE_NAME).is_file():
        # the index is that of another checkpoint
        del patterns[INDEX_NAME]
    patterns |= dict.fromkeys(COMPANIONS, config.tokenizer_folder)
    patterns[GENERATION_CONFIG_NAME] = model
    return {
        path.relative_to(folder): path
        for pattern, folder in patterns.items()
        for path in folder.glob(pattern)
    }


def load_text(config: MergeConfig) -> list[Tensor]:
    """Read the first MOST_TOKENS of --text as windows of token ids.

    Raises:
        ValueError: the text has fewer than two tokens, or one that the model does not know.
    """
    assert config.text is not None
    try:
        text = config.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text must be UTF-8: {config.text}: {error}") from None
    tokenizer = Tokenizer.from_folder(config.tokenizer_folder)
    model = config.model.config
    ids = in_guest(lambda: encode(tokenizer, text), "--text, tokenized,")
    if len(ids) < 2:
        raise ValueError(f"--text must have at least two tokens: {config.text} has {len(ids)}")
    if max(ids) >= model.vocab_size:
        raise ValueError(
            f"--text must have tokens of the model's {model.vocab_size:,}: the tokenizer of "
            f"{config.tokenizer_folder} gives {max(ids)}"
        )
    return windows_of(ids, min(WINDOW_TOKENS, model.max_position_embeddings))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=True)[:MOST_TOKENS]


def compare(config: MergeConfig, windows: Sequence[Tensor]) -> TextFigures:
    """Read the text with the three models, one after the other: one at a time is in memory."""
    base = read_text(load_model(config.model, config.device, config.dtype, None), windows)
    trained = read_text(load_trained(config), windows)
    model = load_model(open_checkpoint(config.output), config.device, config.dtype, None)
    merged = read_text(model, windows)
    return TextFigures(
        base,
        trained,
        merged,
        logit_change(model, base, trained),
        logit_change(model, merged, trained),
    )


def load_trained(config: MergeConfig) -> Llama:
    """Load the base as it was while the adapter trained, with the adapter beside it."""
    model = load_model(config.model, config.device, config.dtype, config.quantization)
    model.attach_lora(read_adapter_config(config.adapter), seed=0)
    load_adapter(config.adapter, model.adapter_tensors(), config.model.vocabulary_tensors)
    return model


def describe_format(config: MergeConfig) -> str:
    if config.quantization is None:
        return "as stored"
    block_size, double_quant = config.quantization
    scales = ", double quantization" if double_quant else ""
    return f"NF4, blocks of {block_size}{scales}"


def describe_merge(config: MergeConfig, figures: MergeFigures) -> str:
    """Say how much was merged, and how much of it rounding lost."""
    base = "the original weights"
    if config.base == "nf4":
        base = f"dequantized weights ({describe_format(config)}, by {config.where})"
    share = figures.num_changed / figures.num_weights
    return (
        f"merged {figures.num_tensors:,} updates into {base}: {figures.num_changed:,} of "
        f"{figures.num_weights:,} weights changed ({share:.1%})\n"
        f"rounding lost {figures.lost:.2%} of the update (norm of its error over the update's)"
    )


def describe_text(config: MergeConfig, windows: Sequence[Tensor], figures: TextFigures) -> str:
    """Tabulate the perplexity of the text under the three models, and the changes of the logits."""
    num_tokens = sum(ids.shape[1] for ids in windows)
    lines = [
        f"{config.text}, the first {num_tokens:,} tokens in windows of {windows[0].shape[1]:,}; "
        f"logits against base + adapter ({describe_format(config)}, by {config.where})",
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


if __name__ == "__main__":
    guard_output()
    try:
        with LastDoor():
            main(sys.argv[1:])
    except (ValueError, OSError) as error:
        # what the user gave, or what the disk refused: the message is enough
        sys.exit(f"error: {one_line(error)}")
