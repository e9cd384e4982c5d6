"""Write a checkpoint in NF4, as transformers and bitsandbytes do: read this file top to bottom.

    python quantize.py --model DIR --output DIR

train.py and transformers load the written checkpoint without quantizing it again.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint.files import find_checkpoint
from checkpoint.opening import open_checkpoint
from checkpoint.quantized_copy import QuantizedCopy, plan_quantized_copy, write_quantized_copy
from foreign.command_line import Parser
from foreign.terminal import guard_output, one_line
from nf4.weight import Quantization
from run.bars import reporting
from run.folder import check_new_folder, new_output
from run.last_door import LastDoor
from run.machine import choose_device
from run.privacy import as_private_as
from run.room import MB

# the most bytes of config.json, the tokenizer and the other small files
COMPANION_BYTES = 64 << 20


def main(arguments: Sequence[str]) -> None:
    flags = build_parser().parse_args(arguments)
    output = Path(flags.output).expanduser().absolute()
    device = torch.device(choose_device(flags.device))
    source = open_checkpoint(find_checkpoint(flags.model))
    dtype = None if flags.dtype == "auto" else getattr(torch, flags.dtype)
    copy = plan_quantized_copy(source, Quantization(flags.block_size, flags.double_quant), dtype)
    check_new_folder(output, copy.num_bytes + COMPANION_BYTES)
    for remark in source.remarks:
        print(one_line(remark))
    start = time.perf_counter()
    with (
        reporting("quantizing", "tensors") as report,
        as_private_as(tensor.file for tensor in source.needed()),
        new_output(output) as partial,
    ):
        write_quantized_copy(copy, partial, device, report)
    print(describe(copy, output, time.perf_counter() - start))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="quantize.py",
        description="Write a checkpoint in NF4, as transformers and bitsandbytes do.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--output", required=True, help="a new folder for the quantized one")
    parser.add_argument(
        "--block-size", type=int, default=64, help="weights that share a scale: 32 to 4096"
    )
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="quantize the scales to 8 bits",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="dtype of the tensors that are not quantized; auto: as they are stored",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="device that quantizes; auto: a GPU if there is one",
    )
    return parser


def describe(copy: QuantizedCopy, output: Path, seconds: float) -> str:
    """Describe the written checkpoint in two lines."""
    block_size, double_quant = copy.quantization
    before = sum(tensor.num_bytes for tensor in copy.source.needed())
    bits = 8 * copy.num_weight_bytes / copy.num_weights
    scales = "double-quantized scales" if double_quant else "float32 scales"
    return (
        f"quantized {copy.num_weights:,} weights of {len(copy.weights)} matrices to NF4 in blocks "
        f"of {block_size} with {scales}: {bits:.3f} bits each\n"
        f"wrote {output}: {copy.num_bytes / MB:,.1f} MB in {len(copy.shards)} "
        f"{'file' if len(copy.shards) == 1 else 'files'} from {before / MB:,.1f} MB, "
        f"in {seconds:.1f} s"
    )


if __name__ == "__main__":
    guard_output()
    try:
        with LastDoor():
            main(sys.argv[1:])
    except (ValueError, OSError) as error:
        # what the user gave, or what the disk refused: the message is enough
        sys.exit(f"error: {one_line(error)}")
