"""What a merge was asked for: the command line, resolved against the adapter and its run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint.adapter_base import find_base, is_base_of
from checkpoint.opening import Checkpoint, open_checkpoint
from lora.adapter_file import find_adapter, read_adapter_config
from merging.flags import build_parser
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
    if given.base == "nf4" and model.mxfp4:
        raise ValueError(
            f"--base nf4 must be for a checkpoint in 16 or 32 bits: the experts of {model.folder} "
            "are in MXFP4, which cannot hold what NF4 makes of them; use --base original, which "
            "leaves them as they are"
        )
    if model.mxfp4 and (updated := read_adapter_config(adapter).target_parameters):
        raise ValueError(
            f"--model must have its experts in 16 or 32 bits for an adapter that updates them "
            f"({', '.join(updated)}): those of {model.folder} are in MXFP4, which cannot hold an "
            "update; give a copy of the checkpoint in 16 bits, and --other-base"
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
