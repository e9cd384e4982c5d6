"""Merge an adapter into its base model's weights: read this file top to bottom.

    python merge.py --adapter OUT --output DIR              into the 16-bit weights of its base
    python merge.py --adapter OUT --output DIR --base nf4   into dequantized weights
    ... --model M                                 into this base
    ... --gguf f16|bf16|q8_0                      and write it for llama.cpp and Ollama, too
    ... --text FILE | --data DATA                 and compare base, adapter and result on a text

QLoRA trains an adapter beside NF4 weights. The original weights, without NF4's errors, are the
better base to serve it on; `--base nf4` merges into the weights that the adapter was trained
beside. Both round to the checkpoint's dtype, which loses a part of the update. `merging/` has what
was asked for, the files that come along and the report.
"""

import shlex
import shutil
import sys
from collections.abc import Sequence

from merging.flags import build_parser

if __name__ == "__main__":
    # --help and a mistyped flag are answered here: the imports below take seconds
    build_parser().parse_args()

from checkpoint.merged_copy import read_updates, write_merged_shards
from export.modelfile import MODELFILE
from foreign.terminal import guard_output, one_line
from llama.model import quantized_layouts
from lora.adapter_file import WEIGHTS_NAME
from merging.files import files_beside_the_weights
from merging.gguf_export import plan_export, write_export
from merging.job import check_base, parse
from merging.report import compare, describe_merge, describe_text, load_windows
from run.bars import reporting
from run.folder import check_new_folder, new_output
from run.last_door import LastDoor
from run.privacy import as_private_as


def main(arguments: Sequence[str]) -> None:
    job = parse(arguments)
    base = job.model
    for remark in base.remarks:
        print(one_line(remark))
    updates = read_updates(job.adapter, base.config, base.vocabulary_tensors)
    layouts = quantized_layouts(base.config)
    check_base(job)
    files = files_beside_the_weights(job)
    export = plan_export(job) if job.gguf else None
    for remark in export.remarks if export else ():
        print(one_line(remark))
    num_bytes = sum(shard.num_bytes for shard in base.shards)
    num_bytes += sum(path.stat().st_size for path in files.values())
    check_new_folder(job.output, num_bytes + (export.num_bytes if export else 0))
    weights = (*(shard.path for shard in base.shards), job.adapter / WEIGHTS_NAME)
    windows = load_windows(job)

    # all that was given is checked: only from here on is anything written
    with as_private_as(weights), new_output(job.output) as folder:
        quantization = job.quantization if job.base == "nf4" else None
        with reporting("merging", "tensors") as report:
            figures = write_merged_shards(
                base.shards, layouts, updates, quantization, job.device, folder, report
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
        if export:
            with reporting("writing GGUF", "tensors") as report:
                write_export(export, folder, job.output.name, report)
    print(describe_merge(job, figures))
    print(f"saved the merged model in {job.output}")
    if export:
        print(f"ollama create NAME -f {shlex.quote(str(job.output / MODELFILE))}")
    if windows:
        print(describe_text(job, windows, compare(job, windows)))


if __name__ == "__main__":
    guard_output()
    try:
        with LastDoor():
            main(sys.argv[1:])
    except (ValueError, OSError) as error:
        # what the user gave, or what the disk refused: the message is enough
        sys.exit(f"error: {one_line(error)}")
