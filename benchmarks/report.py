"""Turn the committed results into README.md's tables of the kernels, and into charts.

    python -m benchmarks.report            # the tables, in Markdown
    python -m benchmarks.report --write    # into README.md, with the charts beside the results

A result file is named BENCHMARK.DEVICE.json. Charts are drawn by matplotlib, the extra `report`.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT
from benchmarks.tables import (
    Row,
    Table,
    adamw_table,
    bandwidth_table,
    markdown,
    matmul_table,
)

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- kernels -->\n", "\n<!-- /kernels -->"

# the README's selection of M: what decoding and training meet
SHOWN_ROWS = {"forward": (1, 16, 64, 512, 2048, 8192), "transposed": (512, 2048, 8192)}

Record = dict[str, Any]

INTRODUCTION = """\
Medians in microseconds, with inputs and outputs rotated past the L2 cache and captured in a CUDA
graph; `python -m benchmarks.nf4_dequantize`, `.nf4_quantize` and `.nf4_matmul` measure them after
the kernels' tests have passed, `python -m benchmarks.report --write` writes this section. The limit
is the time that the bytes take at the bandwidth of a large copy, or the FLOPs at the rate of a
large bf16 product, whichever is longer; both are measured in the same process. Layers are
Llama-3-8B's, with double quantization and blocks of B = 64."""


def load(folder: Path) -> dict[str, dict[str, Record]]:
    """Read the kernels' results: by device, then by benchmark."""
    devices: dict[str, dict[str, Record]] = {}
    for path in sorted(folder.glob("*.json")):
        benchmark, _, device = path.stem.partition(".")
        if benchmark in SECTIONS:
            devices.setdefault(device, {})[benchmark] = json.loads(path.read_text())
    return devices


def where(record: Record) -> str:
    """Say what a record was measured on, and with what."""
    peer = f", bitsandbytes {record['bitsandbytes']}" if record["bitsandbytes"] else ""
    return (
        f"{record['device']}, {record['date']}, torch {record['torch']}, triton "
        f"{record['triton']}{peer}, commit {record['commit'][:7]}; copy "
        f"{record['copy_gbps']:,.0f} GB/s, product {record['matmul_tflops']:,.0f} TFLOP/s."
    )


def shown(rows: Iterable[Row]) -> list[Row]:
    """Select what the README shows of a product."""
    return [row for row in rows if row["m"] in SHOWN_ROWS[row["mode"]]]


def _bandwidth(record: Record) -> Table:
    return bandwidth_table(record["rows"])


def _matmul(record: Record) -> Table:
    return matmul_table(shown(record["rows"]))


def _adamw(record: Record) -> Table:
    return adamw_table(record["rows"])


# in the order of the README: title, what is counted, table
SECTIONS = {
    "nf4_dequantize": (
        "Dequantize",
        "Reads N K (1/2 + 1/B + 4 / (256 B)) bytes and writes N K of the dtype; `of copy` is the "
        "share of a copy's bandwidth that ours reaches. `torch` is the reference; Python issues "
        "its calls, which cannot be captured.",
        _bandwidth,
    ),
    "nf4_quantize": (
        "Quantize",
        "Reads N K of the dtype and writes N K (1/2 + 1/B + 4 / (256 B)) bytes; `ours` is the "
        "kernels, `checked` the public function, which waits to learn whether all weights are "
        "finite, `torch` the reference. The last three cannot be captured: Python issues them.",
        _bandwidth,
    ),
    "nf4_matmul": (
        "Multiply",
        "y = x W^T (forward) and grad_x = grad_y W (transposed) for M rows in bf16: N K (1/2 + 1/B "
        "+ 4 / (256 B)) + 2 M (N + K) bytes and 2 M N K FLOPs. `fused`, `warpgroup` and "
        "`expand` are the paths, `path` is the one that runs, cuBLAS multiplies by the expanded "
        "weight.",
        _matmul,
    ),
    "adamw": (
        "AdamW",
        "A step over the adapter of rank 16 on all linear layers of Llama-3-8B "
        "(`python -m benchmarks.adamw`): 28 bytes an element with moments in 32 bits, 16 + 16 / "
        "256 in 8, and 4 more for the norm. `ours` is the kernels, `step` what train.py calls, "
        "`managed` the same with moments in unified memory, `host` with moments that come from the "
        "host and go back; Python issues all but the first. `paged` is bitsandbytes' optimizer of "
        "that name.",
        _adamw,
    ),
}


def charts_of(device: str, benchmarks: Iterable[str]) -> dict[str, str]:
    """Name the chart files that a device's results make, each with a description."""
    found = set(benchmarks)
    charts = {}
    if "nf4_matmul" in found:
        charts[f"nf4_matmul.{device}.svg"] = "Time of a product over the rows of x, log-log"
    if found & {"nf4_dequantize", "nf4_quantize"}:
        charts[f"nf4_bandwidth.{device}.svg"] = "Bandwidth of dequantization and quantization"
    return charts


def kernels_section(devices: dict[str, dict[str, Record]]) -> str:
    """Write the README's section from results."""
    parts = [INTRODUCTION]
    if not devices:
        parts.append("No results are committed yet.")
    for device, records in devices.items():
        for benchmark, (title, counted, table) in SECTIONS.items():
            if benchmark in records:
                record = records[benchmark]
                parts.append(f"**{title}.** {counted} {where(record)}")
                parts.append(markdown(*table(record)))
        parts += [
            f"![{what}](benchmarks/results/{name})"
            for name, what in charts_of(device, records).items()
        ]
    return "\n\n".join(parts)


def with_section(text: str, section: str) -> str:
    """Put a section between a text's two markers.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(
            f"README.md must have the markers {BEGIN.strip()} and {END.strip()}: one is missing"
        )
    return before + BEGIN + section + END + after


def main() -> int:
    parser = argparse.ArgumentParser(description="Make tables and charts of the kernels' results.")
    parser.add_argument("--write", action="store_true", help="into README.md, and draw the charts")
    arguments = parser.parse_args()
    devices = load(RESULTS)
    section = kernels_section(devices)
    if not arguments.write:
        print(section)
        return 0
    if find_spec("matplotlib") is None:
        parser.error("--write needs matplotlib: none is installed; pip install -e '.[report]'")
    # here, so that the tables do without matplotlib
    charts = import_module("benchmarks.charts")
    for device, records in devices.items():
        for name in charts_of(device, records):
            charts.draw(RESULTS / name, records)
            print(f"wrote {RESULTS / name}")
    README.write_text(with_section(README.read_text(), section))
    print(f"wrote {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
