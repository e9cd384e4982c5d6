"""What a merge was asked for: the command line, resolved against the adapter and its run."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint.adapter_base import find_base, is_base_of
from checkpoint.opening import Checkpoint, open_checkpoint
from export.gguf_file import TYPES
from foreign.command_line import Parser
from lora.adapter_file import find_adapter
from nf4.blockwise import check_block_size
from nf4.weight import Quantization
from prepare.quantization import quantization_of
from prepare.trained import settings_of, tokenizer_folder
from run.config import TrainConfig
from run.machine import choose_device, choose_dtype


@dataclass(frozen=True)
class MergeJob:
    """A merge, checked as far as no weight need be read.

    Attributes:
        run: settings of the adapter's run; the defaults where another program trained it.
        quantization: of the weights while the adapter was trained; None: 16 or 32 bits.
        where: the source of `quantization`, for messages.
        other_base: whether the model may be another one than the adapter was trained on.
        gguf: the type of the GGUF file that is written, too; empty for none.
    """

    model: Checkpoint
    adapter: Path
    output: Path
    base: str
    text: Path | None
    data: str
    device: torch.device
    dtype: torch.dtype
    run: TrainConfig
    quantization: Quantization | None
    where: str
    other_base: bool
    gguf: str

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the merged model's tokenizer: the run's, where it has one."""
        return tokenizer_folder(self.adapter, self.model.folder)


def parse(arguments: Sequence[str]) -> MergeJob:
    """Read the command line, open the model, and read the settings of the adapter's run.

    Raises:
        FileNotFoundError: model, adapter or text are not there.
        ValueError: the model is damaged or in NF4, or a flag contradicts this machine or the
            adapter's run.
    """
    given = build_parser().parse_args(arguments)
    adapter = find_adapter(given.adapter, "--adapter")
    text = Path(given.text).expanduser() if given.text else None
    if text and not text.is_file():
        raise FileNotFoundError(f"--text must be a file: there is none at {given.text}")
    run, where = quantized_settings(adapter, given.block_size, given.double_quant)
    quantization = quantization_of(run)
    if given.base == "nf4" and quantization is None:
        raise ValueError(
            "--base nf4 must be for an adapter that was trained beside NF4 weights: "
            f"{where} says that this one was not; use --base original"
        )
    device = choose_device(given.device)
    model = open_checkpoint(find_base(adapter, given.model))
    if model.quantization:
        raise ValueError(
            f"--model must be a checkpoint in 16 or 32 bits: {model.folder} is in NF4 already; "
            "give the one it was made from, with --base nf4 to merge into its dequantized weights"
        )
    return MergeJob(
        model=model,
        adapter=adapter,
        output=Path(given.output).expanduser(),
        base=given.base,
        text=text,
        data=given.data,
        device=torch.device(device),
        dtype=getattr(torch, choose_dtype(given.dtype, device)),
        run=run,
        quantization=quantization,
        where=where,
        other_base=given.other_base,
        gguf=given.gguf,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="merge.py",
        description="Merge an adapter into its base model's weights.",
    )
    parser.add_argument("--adapter", required=True, help="adapter folder or hub id, ours or PEFT's")
    parser.add_argument("--output", required=True, help="new folder for the merged model")
    parser.add_argument(
        "--model",
        default="",
        help="the base: checkpoint folder or hub id (default: what the adapter says)",
    )
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
    parser.add_argument(
        "--gguf",
        choices=TYPES,
        default="",
        help="write a GGUF file of this type, for llama.cpp, and a Modelfile for Ollama, too",
    )
    read = parser.add_mutually_exclusive_group()
    read.add_argument("--text", help="file to measure perplexity and logits on, as plain text")
    read.add_argument(
        "--data",
        default="",
        help="file, folder or hub id to measure on, read as in training: chat template and "
        "learned tokens",
    )
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
        help="dtype of the computation with --text and --data; merged weights keep theirs "
        "(default: auto)",
    )
    return parser


def check_base(job: MergeJob) -> None:
    """Compare the model with the one that the adapter was trained on.

    Raises:
        ValueError: it is another model, and --other-base is not given.
    """
    folder, is_base = job.model.folder, is_base_of(job.adapter, job.model)
    if is_base is None:
        print(f"{job.adapter} does not say what its base was: {folder} is not checked")
    elif not is_base and not job.other_base:
        raise ValueError(
            f"--model must be the checkpoint that the adapter was trained on: {folder} has "
            "other weights or another config.json; give that one, or --other-base to merge into "
            "this one all the same"
        )


def quantized_settings(
    adapter: Path, block_size: int | None, double_quant: bool | None
) -> tuple[TrainConfig, str]:
    """Find the settings that the adapter was trained with: its run's, else the defaults, with the
    flags for the quantization over them.

    Returns:
        The settings, and the name of the quantization's source.

    Raises:
        ValueError: NF4 has no such block size, or the run's settings are damaged.
    """
    run, where = settings_of(adapter)
    given = {"block_size": block_size, "double_quant": double_quant}
    if given := {name: value for name, value in given.items() if value is not None}:
        check_block_size(given.get("block_size", run.block_size))
        run, where = replace(run, quant="nf4", **given), "the command line"
    return run, where
