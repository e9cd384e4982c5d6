"""Charts of the results, drawn by matplotlib; the same results give the same bytes."""

from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tables import FP8_KINDS, Case, Row, by_case, short_name
from prepare.base_compute import FORWARD_FORMATS

Record = dict[str, Any]

# Okabe and Ito's palette, told apart by every kind of colour vision
BLACK, GREY, BLUE = "#000000", "#6e6e6e", "#0072b2"
SKY, GREEN, VERMILION, PURPLE = "#56b4e9", "#009e73", "#d55e00", "#cc79a7"

# provider: label, and how its line is drawn
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("Quatrain, as dispatched", {"color": SKY, "linewidth": 7, "alpha": 0.5}),
    "ours-fused": ("fused", {"color": BLUE, "marker": "o"}),
    "ours-warpgroup": ("warpgroup", {"color": PURPLE, "marker": "v"}),
    "ours-expand": ("expand, then cuBLAS", {"color": GREEN, "marker": "s"}),
    "bitsandbytes": ("bitsandbytes", {"color": VERMILION, "marker": "^"}),
    "torch": ("cuBLAS, bf16 weight", {"color": GREY, "marker": "x"}),
    "limit": ("limit", {"color": BLACK, "linestyle": "--"}),
}
BARS = {
    "ours": ("Quatrain", BLUE),
    "bitsandbytes": ("bitsandbytes", VERMILION),
    "torch": ("torch, the reference", GREY),
}
KIND_COLORS = {
    "bf16": GREY,
    "int8": PURPLE,
    "fp8": BLUE,
    "fp8-backward": GREEN,
    "unquantized": VERMILION,
}
BANDWIDTH_TITLES = {"nf4_dequantize": "Dequantize", "nf4_quantize": "Quantize"}

STYLE: dict[Any, Any] = {
    # names of clip paths and glyphs; by default a new random one each time
    "svg.hashsalt": "quatrain",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.markersize": 4,
    "lines.linewidth": 1.4,
}


def draw(path: Path, records: dict[str, Record]) -> None:
    """Draw the chart that a file's name asks for from a device's results."""
    # the user's own settings must not show in a committed file
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        if path.name.startswith("nf4_matmul."):
            figure = matmul_figure(records["nf4_matmul"])
        elif path.name.startswith("breakdown."):
            figure = breakdown_figure(records["breakdown"])
        elif path.name.startswith("fp8_curves."):
            figure = fp8_curves_figure(records["fp8_curves"])
        else:
            figure = bandwidth_figure(records)
        # neither a date nor the version of matplotlib
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _draw_layer(axes: Axes, layer: str, cases: dict[Case, dict[str, Row]]) -> None:
    for provider, (label, style) in LINES.items():
        points = [
            (case.m, found[provider]["ms_p50"] * 1e3)
            for case, found in cases.items()
            if case.layer == layer and provider in found
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    n, k = next((case.n, case.k) for case in cases if case.layer == layer)
    axes.set_title(f"{short_name(layer)}, {n} x {k}", fontsize=10, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.xaxis.set_major_formatter(lambda m, _: f"{m:.0f}")
    axes.yaxis.set_major_formatter(lambda us, _: f"{us:,.0f}")


def matmul_figure(record: Record) -> Figure:
    """Draw the time of y = x W^T over the rows of x, a panel a layer."""
    cases = {c: found for c, found in by_case(record["rows"]).items() if c.mode == "forward"}
    layers = list(dict.fromkeys(case.layer for case in cases))
    num_lines = -(-len(layers) // 2)
    figure = Figure(figsize=(10, 1 + 3.4 * num_lines), layout="constrained")
    # one scale, so that panels compare
    grid = figure.subplots(num_lines, 2, squeeze=False, sharex=True, sharey=True)
    panels = grid.flatten()
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    for axes, layer in zip(panels, layers, strict=False):
        _draw_layer(axes, layer, cases)
    for axes in grid[-1]:
        axes.set_xlabel("M, rows of x")
    for axes in grid[:, 0]:
        axes.set_ylabel("microseconds, median")
    figure.suptitle(f"y = x W^T with an NF4 weight, bf16, on an {record['device']}", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_bars(axes: Axes, title: str, record: Record) -> None:
    cases, copy = by_case(record["rows"]), record["copy_gbps"]
    height = 0.8 / len(BARS)
    for index, (provider, (label, color)) in enumerate(BARS.items()):
        bars = [
            (place, found[provider]["gbps"])
            for place, found in enumerate(cases.values())
            if provider in found
        ]
        if not bars:
            continue
        offset = (index - (len(BARS) - 1) / 2) * height
        places = [place + offset for place, _ in bars]
        widths = [gbps for _, gbps in bars]
        axes.barh(places, widths, height, color=color, label=label)
        for place, gbps in zip(places, widths, strict=True):
            is_inside = gbps > copy / 4
            axes.annotate(
                f"{gbps:,.0f}",
                (gbps, place),
                (-3 if is_inside else 3, 0),
                textcoords="offset points",
                horizontalalignment="right" if is_inside else "left",
                verticalalignment="center",
                color="#ffffff" if is_inside else BLACK,
                fontsize=8,
            )
    axes.axvline(copy, color=BLACK, linestyle="--", label="a large copy")
    axes.set_yticks(
        range(len(cases)),
        [f"{short_name(c.layer)}, {c.n} x {c.k}\n{c.dtype}" for c in cases],
        fontsize=9,
    )
    axes.invert_yaxis()
    # a small matrix may beat a large copy: part of what it writes stays in the cache
    axes.set_xlim(0, 1.05 * max(copy, *(row["gbps"] for row in record["rows"])))
    axes.xaxis.set_major_formatter(lambda gbps, _: f"{gbps:,.0f}")
    axes.set_xlabel("GB/s, read and written")
    axes.set_title(title, fontsize=10, loc="left")


def bandwidth_figure(records: dict[str, Record]) -> Figure:
    """Draw the bandwidth that dequantization and quantization reach, beside a copy's."""
    found = [name for name in BANDWIDTH_TITLES if name in records]
    num_cases = max(len(by_case(records[name]["rows"])) for name in found)
    figure = Figure(figsize=(5.5 * len(found), 1.2 + 0.62 * num_cases), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False).flatten()
    for axes, name in zip(panels, found, strict=True):
        _draw_bars(axes, BANDWIDTH_TITLES[name], records[name])
    figure.suptitle(
        f"NF4 with double quantization on an {records[found[0]]['device']}", fontsize=11
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def breakdown_figure(record: Record) -> Figure:
    """Draw the time of every family of kernels, and its limit within."""
    rows = [row for row in record["rows"] if row["percent_of_step"] is not None]
    families = [row for row in rows if row["family"] != "all"]
    figure = Figure(figsize=(8, 1.4 + 0.36 * len(families)), layout="constrained")
    axes = figure.subplots()
    places = range(len(families))
    axes.barh(places, [row["ms"] for row in families], 0.7, color=SKY, label="time")
    limits = [row["limit_ms"] or 0 for row in families]
    axes.barh(places, limits, 0.35, color=BLUE, label="limit")
    ends = [max(row["ms"], limit) for row, limit in zip(families, limits, strict=True)]
    for place, (row, end) in enumerate(zip(families, ends, strict=True)):
        axes.annotate(
            f"{row['ms']:,.1f} ms, {row['percent_of_step']:.1f} %",
            (end, place),
            (4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=8,
        )
    axes.set_yticks(places, [row["family"] for row in families], fontsize=9)
    axes.invert_yaxis()
    # room for what stands beside the longest bar
    axes.set_xlim(0, 1.25 * max(ends))
    axes.set_xlabel("milliseconds")
    total = next(row["ms"] for row in rows if row["family"] == "all")
    figure.suptitle(
        f"{total:,.0f} ms of kernels in a micro-step of {record['model']}, {record['shape']} tokens"
        f",\nactivations: {record['policy']}, on an {record['device']}",
        fontsize=11,
    )
    axes.legend(loc="lower right", frameon=False)
    return figure


def _draw_losses(axes: Axes, runs: list[Row]) -> None:
    """Draw the eval loss of each kind over the steps, and the range of its seeds."""
    for kind, label in FP8_KINDS.items():
        curves = [row["eval_losses"] for row in runs if row["kind"] == kind]
        if not curves:
            continue
        steps, color = runs[0]["steps"], KIND_COLORS[kind]
        by_step = [*zip(*curves, strict=True)]
        axes.fill_between(
            steps, [*map(min, by_step)], [*map(max, by_step)], color=color, alpha=0.2, linewidth=0
        )
        style = "--" if kind in FORWARD_FORMATS else "-"
        axes.plot(steps, [*map(fmean, by_step)], style, color=color, label=label)
    axes.set_ylabel("eval loss, nats a token")


def _draw_differences(axes: Axes, runs: list[Row]) -> None:
    """Draw how far each run in bf16 and in FP8 is from the mean of those in bf16."""
    curves = [row["eval_losses"] for row in runs if row["kind"] == "bf16"]
    means = [fmean(losses) for losses in zip(*curves, strict=True)]
    for row in runs:
        if row["kind"] != "unquantized":
            percent = [
                100 * (loss / mean - 1)
                for loss, mean in zip(row["eval_losses"], means, strict=True)
            ]
            style = "--" if row["kind"] in FORWARD_FORMATS else "-"
            axes.plot(row["steps"], percent, style, color=KIND_COLORS[row["kind"]])
    axes.set_ylabel("to the mean of bf16, %")
    axes.set_xlabel("steps")


def fp8_curves_figure(record: Record) -> Figure:
    """Draw the losses of training in bf16, in FP8 and of an unquantized base, a column a data
    set."""
    names = list(record["files"])
    figure = Figure(figsize=(5 * len(names), 6.4), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharex="col")
    for (upper, lower), name in zip(panels.T, names, strict=True):
        runs = [row for row in record["rows"] if row["data"] == name]
        _draw_losses(upper, runs)
        _draw_differences(lower, runs)
        upper.set_title(name, fontsize=10, loc="left")
        for axes in (upper, lower):
            axes.grid(color="#dddddd", linewidth=0.6)
    num_seeds = len({row["seed"] for row in record["rows"]})
    figure.suptitle(
        f"Base products of {record['model']} in training, {num_seeds} seeds, on an "
        f"{record['device']};\nevaluated in bf16",
        fontsize=11,
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure
