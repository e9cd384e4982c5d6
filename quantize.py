"""Write a checkpoint in NF4, as transformers and bitsandbytes do: read this file top to bottom.

    python quantize.py --model DIR --output DIR

train.py and transformers load the written checkpoint without quantizing it again.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkpoint.quantize_flags import build_parser

if __name__ == "__main__":
    # --help and a mistyped flag are answered here: the imports below take seconds
    build_parser().parse_args()

import torch

from checkpoint.files import find_checkpoint
from checkpoint.opening import open_checkpoint
from checkpoint.quantized_copy import QuantizedCopy, plan_quantized_copy, write_quantized_copy
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
EXPERTS_REMARK = (
    "\neach expert's matrices are quantized by themselves, as transformers 4 has them; "
    "transformers 5 does not load this copy"
)


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
        as_private_as(tensor.file for tensor in source.copied()),
        new_output(output) as partial,
    ):
        write_quantized_copy(copy, partial, device, report)
    print(describe(copy, output, time.perf_counter() - start))


def describe(copy: QuantizedCopy, output: Path, seconds: float) -> str:
    """Describe the written checkpoint in two or three lines."""
    block_size, double_quant = copy.quantization
    before = sum(tensor.num_bytes for tensor in copy.source.copied())
    bits = 8 * copy.num_weight_bytes / copy.num_weights
    scales = "double-quantized scales" if double_quant else "float32 scales"
    return (
        f"quantized {copy.num_weights:,} weights of {len(copy.weights)} matrices to NF4 in blocks "
        f"of {block_size} with {scales}: {bits:.3f} bits each\n"
        f"wrote {output}: {copy.num_bytes / MB:,.1f} MB in {len(copy.shards)} "
        f"{'file' if len(copy.shards) == 1 else 'files'} from {before / MB:,.1f} MB, "
        f"in {seconds:.1f} s" + (EXPERTS_REMARK if copy.source.config.experts else "")
    )


if __name__ == "__main__":
    guard_output()
    try:
        with LastDoor():
            main(sys.argv[1:])
    except (ValueError, OSError) as error:
        # what the user gave, or what the disk refused: the message is enough
        sys.exit(f"error: {one_line(error)}")
