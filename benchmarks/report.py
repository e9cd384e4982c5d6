"""Turn the committed results into the tables of docs/measured.md, and into charts.

    python -m benchmarks report            # the tables, in Markdown
    python -m benchmarks report --write    # into docs/measured.md, and charts beside the results

A result file is named BENCHMARK.DEVICE.json; a benchmark without one has no table. README's picture
of the training step is written as text, the other charts are drawn by matplotlib, the extra
`report`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.comparison import has_peers, picture
from benchmarks.record import ROOT
from benchmarks.tables import (
    Row,
    Table,
    adamw_table,
    bandwidth_table,
    breakdown_table,
    data_parallel_table,
    decode_table,
    fp8_8b_table,
    fp8_curves_table,
    fp8_error_table,
    grouped_matmul_table,
    load_table,
    markdown,
    masked_attention_table,
    matmul_8bit_table,
    matmul_table,
    operation_table,
    packed_step_table,
    train_step_table,
)

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "measured.md"

# the selection of M that is shown: what decoding and training meet
SHOWN_ROWS = {"forward": (1, 16, 64, 512, 2048, 8192), "transposed": (512, 2048, 8192)}

Record = dict[str, Any]

INTRODUCTION = """\
Times are medians in microseconds. Inputs and outputs rotate past the L2 cache, and calls are
captured in a CUDA graph. A benchmark runs the kernel's tests first. The limit is the time of the
bytes at the bandwidth of a large copy, or of the FLOPs at the rate of a large bf16 product,
whichever is longer; both rates are measured in the same process. Layers are Llama-3-8B's, with
double quantization and blocks of B = 64."""


class Section(NamedTuple):
    """A benchmark's paragraph: a title, what is counted, and the table of its rows."""

    title: str
    counted: str
    table: Callable[[list[Row]], Table]


def load(folder: Path) -> dict[str, dict[str, Record]]:
    """Read the results that have a section: by device, then by benchmark."""
    devices: dict[str, dict[str, Record]] = {}
    for path in sorted(folder.glob("*.json")):
        benchmark, _, device = path.stem.partition(".")
        if benchmark in STEP_SECTIONS or benchmark in KERNEL_SECTIONS:
            devices.setdefault(device, {})[benchmark] = json.loads(path.read_text())
    return devices


def where(record: Record) -> str:
    """Say what a record was measured on, with what, and how long that took."""
    versions = {"torch": record["torch"], "triton": record["triton"]}
    if record.get("bitsandbytes"):
        versions["bitsandbytes"] = record["bitsandbytes"]
    versions |= record.get("versions", {})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = f"{record['device']}, {record['date']}, {listed}, commit {record['commit'][:7]}"
    if "seconds" in record:
        text += f", {record['seconds']:.0f} s"
    rates = {"copy": ("copy_gbps", "GB/s"), "product": ("matmul_tflops", "TFLOP/s")}
    rates["pinned copy"] = ("pinned_copy_gbps", "GB/s")
    measured = [
        f"{name} {record[key]:,.0f} {unit}" for name, (key, unit) in rates.items() if key in record
    ]
    return f"{'; '.join([text, ', '.join(measured)] if measured else [text])}."


def shown(rows: Iterable[Row]) -> list[Row]:
    """Select what is shown of a product."""
    return [row for row in rows if row["m"] in SHOWN_ROWS[row["mode"]]]


STEP_COUNTED = (
    "Tokens per second and the peak of torch's allocator, for micro-batches of samples x tokens; a "
    "step is one micro-batch and the optimizer's step. The limit is the time of cuBLAS's products "
    "and of attention alone; `recompute` runs the forward pass of the layers twice. `load` is the "
    "time from the checkpoint to the device, `first step` the time from the start of the process."
)

# in the order of the page
STEP_SECTIONS = {
    "train_step": Section(
        "Training step",
        "Llama-3-8B with random weights, NF4 and double quantization, bf16, rank 16 on all linear "
        f"layers, AdamW in 32 bits (`python -m benchmarks train_step`). {STEP_COUNTED}",
        train_step_table,
    ),
    "train_step_fp8": Section(
        "Training step, base products in FP8",
        "The same with base products in FP8 (`python -m benchmarks train_step --base-compute "
        "fp8`); so are those of the limit, by torch. The peers multiply in bf16.",
        train_step_table,
    ),
    "train_step_seed": Section(
        "Training step, two projections",
        "The same with rank 16 on q_proj and v_proj, dropout 0.05 and AdamW in 8 bits "
        "(`python -m benchmarks train_step --recipe seed`).",
        train_step_table,
    ),
    "train_step_1b": Section(
        "Training step, 1B",
        "Llama-3.2-1B's shape, as the 8B model's step (`python -m benchmarks train_step --recipe "
        "1b`).",
        train_step_table,
    ),
    "train_step_3b": Section(
        "Training step, 3B",
        "Qwen2.5-3B's shape, likewise (`python -m benchmarks train_step --recipe 3b`).",
        train_step_table,
    ),
    "train_step_70b": Section(
        "Training step, 70B",
        "Llama-3-70B's shape with random codes, rank 16 on all linear layers "
        "(`python -m benchmarks train_step --recipe 70b`).",
        train_step_table,
    ),
    "train_step_30b_a3b": Section(
        "Training step, 30B mixture",
        "Qwen3-30B-A3B's shape with random codes, rank 16 on attention "
        "(`python -m benchmarks train_step --recipe 30b-a3b`). The limit has the products of a "
        "token's experts.",
        train_step_table,
    ),
    "train_step_8b_codes": Section(
        "Training step, 8B beside other families",
        "Llama-3-8B's shape with random codes, rank 16 on all linear layers (`python -m benchmarks "
        'train_step --shapes 4x2048 --peers ""`), on the machine of the families that follow.',
        train_step_table,
    ),
    "train_step_gemma_3_12b": Section(
        "Training step, Gemma-3-12B",
        "Its shape, likewise (`python -m benchmarks train_step --recipe gemma-3-12b`). The limit's "
        "attention has the pairs of a window's tokens alone, in layers that see a window.",
        train_step_table,
    ),
    "train_step_phi_4_mini": Section(
        "Training step, Phi-4-mini",
        "Its shape, likewise (`python -m benchmarks train_step --recipe phi-4-mini`).",
        train_step_table,
    ),
    "train_step_smollm3_3b": Section(
        "Training step, SmolLM3-3B",
        "Its shape, likewise (`python -m benchmarks train_step --recipe smollm3-3b`).",
        train_step_table,
    ),
    "train_step_gpt_oss_20b": Section(
        "Training step, gpt-oss-20b",
        "Its shape, rank 16 on attention (`python -m benchmarks train_step --recipe gpt-oss-20b`). "
        "The limit has the products of a token's experts, and the pairs of windows.",
        train_step_table,
    ),
    "decode": Section(
        "Generation",
        "Llama-3-8B with random weights, NF4 and double quantization, bf16, an adapter of rank 16 "
        "on all linear layers, greedy (`python -m benchmarks decode`): prompts beside each other x "
        "their tokens + the new tokens of each. The limit is the time of the bytes that a token "
        "reads, at a copy's bandwidth.",
        decode_table,
    ),
    "packed_step": Section(
        "Samples that share rows",
        "Tokens per second without padding (`python -m benchmarks packed_step`): of full rows, of "
        "samples as long as GSM8K's that share rows of 2,048 tokens, and of the same samples "
        "padded, four to a micro-batch.",
        packed_step_table,
    ),
    "packed_step_135m": Section(
        "Samples that share rows, 135M",
        "The same of SmolLM2-135M's shape (`python -m benchmarks packed_step --model "
        "smollm2-135m`). The limit is that of full rows.",
        packed_step_table,
    ),
    "data_parallel": Section(
        "Several GPUs",
        "The training step under torchrun on the GPUs of one machine "
        "(`python -m benchmarks data_parallel`). The limit is the speed of one GPU times the "
        "number of GPUs; `sum` is the time of the reduction of the gradients alone.",
        data_parallel_table,
    ),
    "breakdown": Section(
        "Breakdown",
        "The kernels of one micro-step of Llama-3-8B, rank 16 on all linear layers, in families "
        "(`python -m benchmarks breakdown`). The limit is the time of a family's bytes or FLOPs.",
        breakdown_table,
    ),
    "breakdown_fp8": Section(
        "Breakdown, base products in FP8",
        "The same with the frozen base's products in FP8 "
        "(`python -m benchmarks breakdown --base-compute fp8`). The limit of a product in E4M3 is "
        "half of the time of one in bf16.",
        breakdown_table,
    ),
    "breakdown_135m": Section(
        "Breakdown, 135M",
        "The kernels of a micro-step of SmolLM2-135M's shape (`python -m benchmarks breakdown "
        "--model smollm2-135m`).",
        breakdown_table,
    ),
    "fp8_error": Section(
        "Errors of FP8 products",
        "SmolLM2-135M-Instruct in NF4 on GSM8K, its own activations and gradients "
        "(`python -m benchmarks fp8_error`): errors of y and of the gradient of x against products "
        "in float32, relative to their norms, means of the layers; FP8's worst layer, and its "
        "number; FP8 with a scale for each row of the weight; the largest value of an operand over "
        "its row's root mean square. Then the adapter's gradient of a step: bf16's against "
        "float32's, and against bf16's that with all products in FP8.",
        fp8_error_table,
    ),
    "fp8_curves": Section(
        "Training in FP8",
        "SmolLM2-135M-Instruct in NF4, rank 16 on all linear layers (`python -m benchmarks "
        "fp8_curves`): the mean of the last eval losses over seeds, the spread from the lowest to "
        "the highest seed, the difference to the mean in bf16. All are evaluated in bf16; `as "
        "served` is the loss that another process finds after it loaded the adapter.",
        fp8_curves_table,
    ),
    "fp8_8b": Section(
        "8B's shape in FP8",
        "Llama-3-8B's shape with random weights in NF4, rank 16 on all linear layers, the same "
        "seeds in bf16 and in FP8 (`python -m benchmarks fp8_8b`): tokens from the whole "
        "vocabulary, of which nothing can be learned, and a Markov chain's, whose loss can fall to "
        "0.69. Losses are means of ten steps, but the first step's; the largest norm is that of "
        "any step's gradient before clipping.",
        fp8_8b_table,
    ),
    "load": Section(
        "Load",
        "Seconds from a checkpoint of bf16 weights in the page cache to the device "
        "(`python -m benchmarks load --shape llama-3-8b`): `load-nf4` to the ready model, "
        "`load-as-stored` without quantization, `read` and `read-copy` the parts of loading alone; "
        "`torch` reads one tensor after the other.",
        load_table,
    ),
}
_OPERATION = "`of copy` is the share of a copy's bandwidth that our kernel reaches."
KERNEL_SECTIONS = {
    "nf4_dequantize": Section(
        "Dequantize",
        "Reads N K (1/2 + 1/B + 4 / (256 B)) bytes and writes N K values of the dtype "
        "(`python -m benchmarks nf4_dequantize`); `of copy` is the share of a copy's bandwidth "
        "that our kernel reaches. `torch` is the reference, whose calls cannot be captured.",
        bandwidth_table,
    ),
    "nf4_quantize": Section(
        "Quantize",
        "Reads N K values of the dtype and writes N K (1/2 + 1/B + 4 / (256 B)) bytes "
        "(`python -m benchmarks nf4_quantize`). `ours` is the kernels; `checked` is the public "
        "function, which waits until it knows that all weights are finite; `torch` is the "
        "reference. The calls of the last three columns cannot be captured.",
        bandwidth_table,
    ),
    "nf4_matmul": Section(
        "Multiply",
        "y = x W^T (forward) and grad_x = grad_y W (transposed) for M rows in bf16 "
        "(`python -m benchmarks nf4_matmul`): N K (1/2 + 1/B + 4 / (256 B)) + 2 M (N + K) bytes "
        "and 2 M N K FLOPs. `fused`, `warpgroup` and `expand` are our three paths, and `path` "
        "names the path that training takes. cuBLAS multiplies by the expanded weight.",
        lambda rows: matmul_table(shown(rows)),
    ),
    "matmul_8bit": Section(
        "Multiply in FP8",
        "y = x W^T + h B^T (forward) and grad_x = grad_y W + grad_h A (backward) for M rows in "
        "E4M3 with a scale each, h and B in bf16 (`python -m benchmarks matmul_8bit`); `without "
        "update` leaves h B^T out. torch multiplies in E4M3 without an update, with a scale for "
        "each operand or for each row, and in bf16 with the update as columns of one product. The "
        "limit is the time of the FLOPs at twice the rate of a large bf16 product.",
        matmul_8bit_table,
    ),
    "rms_norm": Section(
        "Normalize",
        "Root mean square normalization of M rows of 4,096 values "
        "(`python -m benchmarks rms_norm`). After attention, the kernel adds the residual first; "
        "the backward pass writes y again. "
        f"{_OPERATION}",
        operation_table,
    ),
    "rope": Section(
        "Rotate",
        "Queries and keys of M tokens, in the buffer of q, k and v (`python -m benchmarks rope`). "
        f"The backward pass gathers the three gradients in that buffer. {_OPERATION}",
        operation_table,
    ),
    "glu": Section(
        "Gate",
        "h = silu(gate) up over M rows of 2 x 14,336 values (`python -m benchmarks glu`). "
        "`backward-h` computes the gradients of gate and up, and h once more. "
        f"{_OPERATION}",
        operation_table,
    ),
    "masked_attention": Section(
        "Attention under a mask",
        "Forward and backward passes over rows of several samples, in a window, or with capped "
        "scores (`python -m benchmarks masked_attention`). `flex` is FlexAttention, `varlen` is "
        "torch's attention over samples of different lengths, `causal` is torch's attention "
        "without a mask.",
        masked_attention_table,
    ),
    "lora_gradient": Section(
        "LoRA gradient",
        "The gradients of h and of B from the gradient of y, over M tokens at rank 16 "
        "(`python -m benchmarks lora_gradient`); torch computes each by a product. "
        f"{_OPERATION}",
        operation_table,
    ),
    "grouped_matmul": Section(
        "Multiply by experts",
        "The products of Qwen3-30B-A3B's 128 experts over M rows, 8 a token, unevenly divided, in "
        "bf16, and the gradient of their input (`python -m benchmarks grouped_matmul`). `dense` is "
        "one product of as many FLOPs, `torch` is torch's grouped product, `loop` a product of "
        "cuBLAS for each expert.",
        grouped_matmul_table,
    ),
    "rows_8bit": Section(
        "Bring operands to 8 bits",
        "Rows of an 8B layer in E4M3, or rotated in INT8, by themselves and on the way of a norm "
        "and a gate, and gate | up from NF4 (`python -m benchmarks rows_8bit`). "
        f"{_OPERATION}",
        operation_table,
    ),
    "expert_rows": Section(
        "Rows of experts",
        "The rows of M tokens to 8 experts each, Qwen3-30B-A3B's widths, and back "
        "(`python -m benchmarks expert_rows`): `combine` adds a token's weighted rows up, "
        "`weigh-backward` computes the gradients of weights and rows. "
        f"{_OPERATION}",
        operation_table,
    ),
    "cross_entropy": Section(
        "Cross-entropy",
        "`loss` computes the losses of M rows of 128,256 logits, `gradient` also writes the "
        "gradient over the logits (`python -m benchmarks cross_entropy`). "
        f"{_OPERATION}",
        operation_table,
    ),
    "adamw": Section(
        "AdamW",
        "A step over the adapter of rank 16 on all linear layers of Llama-3-8B "
        "(`python -m benchmarks adamw`): 28 bytes an element with moments in 32 bits, 16 + 16 / "
        "256 with moments in 8 bits, and 4 more for the norm. `ours` is the kernels in a CUDA "
        "graph, `step` is the function that train.py calls, `managed` is that function with "
        "moments in unified memory, `host` with moments that are copied from the host and back. "
        "`paged` is bitsandbytes' paged optimizer.",
        adamw_table,
    ),
}


def charts_of(device: str, benchmarks: Iterable[str]) -> dict[str, str]:
    """Name the chart files that a device's results make, each with a description."""
    found = set(benchmarks)
    charts = {}
    if "breakdown" in found:
        charts[f"breakdown.{device}.svg"] = "Time of a micro-step by what its kernels are for"
    if "fp8_curves" in found:
        charts[f"fp8_curves.{device}.svg"] = "Losses of training in bf16, in FP8 and unquantized"
    if "nf4_matmul" in found:
        charts[f"nf4_matmul.{device}.svg"] = "Time of a product over the rows of x, log-log"
    if found & {"nf4_dequantize", "nf4_quantize"}:
        charts[f"nf4_bandwidth.{device}.svg"] = "Bandwidth of dequantization and quantization"
    return charts


def _parts(
    device: str, records: dict[str, Record], sections: dict[str, Section], charts: Iterable[str]
) -> list[str]:
    parts = []
    for benchmark, section in sections.items():
        if benchmark in records:
            record = records[benchmark]
            parts.append(f"**{section.title}.** {section.counted} {where(record)}")
            parts.append(markdown(*section.table(record["rows"])))
    described = charts_of(device, records)
    return parts + [
        f"![{described[name]}](../benchmarks/results/{name})"
        for name in (f"{chart}.{device}.svg" for chart in charts)
        if name in described
    ]


def step_section(devices: dict[str, dict[str, Record]]) -> str:
    """Write the section of the whole step from results; empty where there are none."""
    parts = []
    for device, records in devices.items():
        parts += _parts(device, records, STEP_SECTIONS, ["breakdown", "fp8_curves"])
    return "\n\n".join(["## Loading and training", *parts]) if parts else ""


def kernels_section(devices: dict[str, dict[str, Record]]) -> str:
    """Write the section of the kernels from results."""
    parts = []
    for device, records in devices.items():
        parts += _parts(device, records, KERNEL_SECTIONS, ["nf4_matmul", "nf4_bandwidth"])
    return "\n\n".join([INTRODUCTION, *(parts or ["No results are committed yet."])])


def with_section(text: str, name: str, section: str) -> str:
    """Put a section between a text's two markers.

    Raises:
        ValueError: the markers are missing.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, begin, rest = text.partition(f"{first}\n")
    _, end, after = rest.partition(f"\n{last}")
    if not (begin and end):
        raise ValueError(f"the page must have the markers {first} and {last}: one is missing")
    return before + begin + section + end + after


def with_sections(text: str, devices: dict[str, dict[str, Record]]) -> str:
    """Put every section that results make into the page's text."""
    text = with_section(text, "step", step_section(devices))
    return with_section(text, "kernels", kernels_section(devices))


def main() -> int:
    parser = argparse.ArgumentParser(description="Make tables and charts of the results.")
    parser.add_argument(
        "--write", action="store_true", help="into docs/measured.md, and draw the charts"
    )
    arguments = parser.parse_args()
    devices = load(RESULTS)
    if not arguments.write:
        sections = [step_section(devices), kernels_section(devices)]
        print("\n\n".join(section for section in sections if section))
        return 0
    if find_spec("matplotlib") is None:
        parser.error("--write needs matplotlib: none is installed; pip install -e '.[report]'")
    # here, so that the tables do without matplotlib
    charts = import_module("benchmarks.charts")
    for device, records in devices.items():
        if has_peers(records.get("train_step", {"rows": []})):
            path = RESULTS / f"train_step.{device}.svg"
            path.write_text(picture(records["train_step"]))
            print(f"wrote {path}")
        for name in charts_of(device, records):
            charts.draw(RESULTS / name, records)
            print(f"wrote {RESULTS / name}")
    DOCUMENT.write_text(with_sections(DOCUMENT.read_text(), devices))
    print(f"wrote {DOCUMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
