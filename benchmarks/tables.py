"""Result rows as tables: providers side by side, aligned for a terminal or in Markdown."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


class Case(NamedTuple):
    """What the rows of all providers have in common."""

    mode: str
    layer: str
    m: int | None
    n: int
    k: int
    dtype: str


def by_case(rows: Iterable[Row]) -> dict[Case, dict[str, Row]]:
    """Sort rows by what was measured, then by provider; in the order in which they come."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in rows:
        case = Case(*(row[name] for name in Case._fields))
        cases.setdefault(case, {})[row["provider"]] = row
    return cases


def short_name(layer: str) -> str:
    """Name a layer without its model."""
    return layer.rpartition(".")[2]


def microseconds(row: Row | None) -> str:
    """Format a row's median with three or more digits; a row that is missing as a dash."""
    if row is None:
        return "-"
    us = row["ms_p50"] * 1e3
    return f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def percent_of_copy(row: Row | None) -> str:
    """Format how much of the copy's bandwidth a row reaches."""
    if row is None or row["percent_of_copy"] is None:
        return "-"
    return f"{row['percent_of_copy']:.0f} %"


def bandwidth_table(rows: Iterable[Row]) -> Table:
    """Tabulate the microseconds of an operation whose limit is bandwidth."""
    cases = by_case(rows)
    columns = {"limit": "limit", "ours": "ours", "ours-checked": "checked"}
    columns |= {"bitsandbytes": "bitsandbytes", "torch": "torch"}
    # one operation has a public function that does more than its kernels
    if not any("ours-checked" in providers for providers in cases.values()):
        del columns["ours-checked"]
    header = ["layer", "N x K", "dtype", "of copy", *columns.values()]
    lines = [
        [
            short_name(case.layer),
            f"{case.n} x {case.k}",
            case.dtype,
            percent_of_copy(providers.get("ours")),
            *(microseconds(providers.get(provider)) for provider in columns),
        ]
        for case, providers in cases.items()
    ]
    return header, lines


def operation_table(rows: Iterable[Row]) -> Table:
    """Tabulate the microseconds of a layer's elementwise operation over the rows of its input."""
    columns = ["limit", "ours", "torch", "torch.compile"]
    header = ["layer", "mode", "M", "of copy", *columns]
    lines = [
        [
            short_name(case.layer),
            case.mode,
            str(case.m),
            percent_of_copy(providers.get("ours")),
            *(microseconds(providers.get(provider)) for provider in columns),
        ]
        for case, providers in by_case(rows).items()
    ]
    return header, lines


def _providers_table(rows: Iterable[Row], providers: Sequence[str]) -> Table:
    lines = [
        [
            short_name(case.layer),
            case.mode,
            str(case.m),
            *(microseconds(found.get(provider)) for provider in providers),
        ]
        for case, found in by_case(rows).items()
    ]
    return ["layer", "mode", "M", *providers], lines


def masked_attention_table(rows: Iterable[Row]) -> Table:
    """Tabulate the microseconds of attention under a mask, both passes."""
    return _providers_table(rows, ("limit", "ours", "flex", "varlen", "causal"))


def grouped_matmul_table(rows: Iterable[Row]) -> Table:
    """Tabulate the microseconds of products by experts over all their rows."""
    return _providers_table(rows, ("limit", "dense", "ours", "torch", "loop"))


def matmul_table(rows: Iterable[Row]) -> Table:
    """Tabulate the microseconds of a product over the rows of x."""
    header = ["layer", "mode", "M", "limit", "ours", "path", "fused", "warpgroup", "expand"]
    header += ["bitsandbytes", "cuBLAS"]
    lines = [
        [
            short_name(case.layer),
            case.mode,
            str(case.m),
            microseconds(providers.get("limit")),
            microseconds(providers.get("ours")),
            providers["ours"]["path"] if "ours" in providers else "-",
            microseconds(providers.get("ours-fused")),
            microseconds(providers.get("ours-warpgroup")),
            microseconds(providers.get("ours-expand")),
            microseconds(providers.get("bitsandbytes")),
            microseconds(providers.get("torch")),
        ]
        for case, providers in by_case(rows).items()
    ]
    return header, lines


def matmul_8bit_table(rows: Iterable[Row]) -> Table:
    """Tabulate the microseconds of a product in E4M3, the update's share, INT8's and torch's."""
    found = by_case(rows)
    columns = {"limit": "limit", "ours": "ours", "ours-base": "without update"}
    # records before it have none
    if any("ours-int8" in providers for providers in found.values()):
        columns["ours-int8"] = "INT8"
    columns |= {"torch-tensorwise": "torch, a scale", "torch-rowwise": "torch, a row"}
    columns["torch"] = "bf16"
    lines = [
        [
            short_name(case.layer),
            case.mode,
            str(case.m),
            *(microseconds(providers.get(provider)) for provider in columns),
        ]
        for case, providers in found.items()
    ]
    return ["layer", "mode", "M", *columns.values()], lines


FP8_KINDS = {
    "bf16": "bf16",
    "int8": "INT8, FP8 backward",
    "fp8": "FP8",
    "fp8-backward": "FP8, backward",
    "unquantized": "bf16, base not quantized",
}


def fp8_error_table(rows: Iterable[Row]) -> Table:
    """Tabulate the errors of products, and of the adapter's gradient, over a model's layers."""
    header = ["", "projection", "bf16", "FP8", "worst layer", "a scale a row", "largest / rms"]
    found: dict[tuple[str, str], list[Row]] = {}
    cosines: list[list[str]] = []
    for row in rows:
        if row["layer"] is None:
            cells = [f"{row[name]:.5f}" for name in ("cosine-bf16", "cosine-fp8")]
            cosines.append(["cosine", row["projection"], *cells, *3 * ["-"]])
        else:
            found.setdefault((row["product"], row["projection"]), []).append(row)
    lines = []
    order = ("y", "grad_x", "gradient")
    for (product, projection), layers in sorted(found.items(), key=lambda i: order.index(i[0][0])):
        worst = max(layers, key=lambda row: row["fp8"])
        cells = [f"{fmean(row[name] for row in layers):.2%}" for name in ("bf16", "fp8")]
        cells.append(f"{worst['fp8']:.2%} ({worst['layer']})")
        if product == "gradient":
            cells += ["-", "-"]
        else:
            cells.append(f"{fmean(row['fp8-by-row'] for row in layers):.2%}")
            cells.append(f"{max(row['largest'] for row in layers):.0f}")
        lines.append([product, projection, *cells])
    return header, [*lines, *cosines]


def fp8_curves_table(rows: Iterable[Row]) -> Table:
    """Tabulate the last eval losses of runs whose base products differ, over their seeds."""
    header = ["data", "products", "seeds", "eval loss", "spread", "against bf16", "as served"]
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["data"], row["kind"]), []).append(row)
    lines = []
    for (data, kind), runs in found.items():
        losses = [row["eval_losses"][-1] for row in runs]
        bf16 = fmean(row["eval_losses"][-1] for row in found[data, "bf16"])
        served = [row["served_eval_loss"] for row in runs if "served_eval_loss" in row]
        lines.append(
            [
                data,
                FP8_KINDS[kind],
                str(len(runs)),
                f"{fmean(losses):.4f}",
                f"{(max(losses) - min(losses)) / bf16:.2%}",
                "-" if kind == "bf16" else f"{fmean(losses) / bf16 - 1:+.2%}",
                f"{fmean(served):.4f}" if served else "-",
            ]
        )
    return header, lines


def fp8_8b_table(rows: Iterable[Row]) -> Table:
    """Tabulate the losses and gradients of runs in bf16 and in FP8, point by point the same."""
    header = ["data", "products", "steps", "first loss", "last loss", "against bf16"]
    header += ["farthest from bf16", "largest gradient", "steps skipped", "tokens/s"]
    listed = list(rows)
    bf16 = {row["data"]: row["losses"] for row in listed if row["base_compute"] == "bf16"}
    lines = []
    for row in listed:
        pairs = zip(row["losses"], bf16[row["data"]], strict=True)
        differences = [loss / other - 1 for loss, other in pairs]
        is_bf16 = row["base_compute"] == "bf16"
        lines.append(
            [
                row["data"],
                FP8_KINDS[row["base_compute"]],
                str(row["steps"][-1]),
                f"{row['first_loss']:.4f}",
                f"{row['losses'][-1]:.4f}",
                "-" if is_bf16 else f"{differences[-1]:+.2%}",
                "-" if is_bf16 else f"{max(differences, key=abs):+.2%}",
                f"{max(row['grad_norms']):.3f}",
                str(row["num_skipped"]),
                f"{row['tokens_per_second']:,.0f}",
            ]
        )
    return header, lines


def adamw_table(rows: Iterable[Row]) -> Table:
    """Tabulate the microseconds of an optimizer's step."""
    columns = {
        "limit": "limit",
        "ours": "ours",
        "ours-step": "step",
        "ours-managed": "managed",
        "ours-host": "host",
        "torch-fused": "torch fused",
        "torch-foreach": "foreach",
        "bitsandbytes": "bitsandbytes",
        "bitsandbytes-paged": "paged",
    }
    header = ["moments", "norm", "elements", "tensors", "of copy", *columns.values()]
    lines = [
        [
            case.mode.removesuffix("-clip"),
            "yes" if case.mode.endswith("-clip") else "no",
            f"{case.n:,}",
            str(case.k),
            percent_of_copy(providers.get("ours")),
            *(microseconds(providers.get(provider)) for provider in columns),
        ]
        for case, providers in by_case(rows).items()
    ]
    return header, lines


NAMES = {
    "limit": "limit",
    "ours": "Quatrain",
    "hf": "transformers + PEFT + bitsandbytes",
    "unsloth": "Unsloth",
    "forward": "training's forward pass",
}


def _by_provider(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["provider"], row["policy"]), {})[row["shape"]] = row
    return found


def share_computed_again(row: Row) -> float:
    """Compute which share of a training step's layers does not keep its activations; a row without
    a plan has one policy for all."""
    layers = row.get("layers") or f"1 {row['policy']}"
    counts = [part.split() for part in layers.split(", ")]
    again = sum(int(count) for count, policy in counts if policy not in ("expand", "keep"))
    return again / sum(int(count) for count, _ in counts)


def percent_of_limit(row: Row, rows: Iterable[Row]) -> str:
    """Format how much of its limit a training step reaches: the mean time of its layers, those that
    keep their activations and those that compute them again."""
    limits = {
        limit["policy"]: limit["tokens_per_second"]
        for limit in rows
        if (limit["provider"], limit["shape"]) == ("limit", row["shape"]) and "error" not in limit
    }
    again = share_computed_again(row)
    shares = {policy: s for policy, s in (("keep", 1 - again), ("recompute", again)) if s}
    if not shares.keys() <= limits.keys():
        return "-"
    seconds = sum(share / limits[policy] for policy, share in shares.items())
    return f"{100 * row['tokens_per_second'] * seconds:.0f} %"


def _number(row: Row, key: str, digits: int) -> str:
    value = row.get(key)
    return "-" if value is None else f"{value:,.{digits}f}"


def train_step_lines(rows: Sequence[Row]) -> Table:
    """List training steps, a line each."""
    header = ["provider", "policy", "shape", "tokens/s", "of limit", "ms", "peak GiB"]
    header += ["reserved GiB", "load s", "first step s", ""]
    lines = [
        [
            row["provider"],
            row["policy"],
            row["shape"],
            _number(row, "tokens_per_second", 0),
            "-" if "error" in row else percent_of_limit(row, rows),
            _number(row, "ms_p50", 1),
            _number(row, "peak_gib", 2),
            _number(row, "reserved_gib", 2),
            _number(row, "load_s", 1),
            _number(row, "first_step_s", 1),
            row.get("error", ""),
        ]
        for row in rows
    ]
    return header, lines


def _step_cell(row: Row | None) -> str:
    """Format tokens per second, and the peak beside them if there is one."""
    if row is None:
        return "-"
    if "error" in row:
        known = {"out of memory": "does not fit", "must fit": "does not fit"}
        known["No module"] = "not installed"
        return next((said for word, said in known.items() if word in row["error"]), "failed")
    peak = row.get("peak_gib")
    return _number(row, "tokens_per_second", 0) + ("" if peak is None else f", {peak:.1f} GiB")


def train_step_table(rows: Sequence[Row]) -> Table:
    """Tabulate training steps: providers over shapes."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    header = ["", *(shape.replace("x", " x ") for shape in shapes), "load s", "first step s"]
    lines = []
    for (provider, policy), found in _by_provider(rows).items():
        # of the first process, where one had to be followed by another
        whole = next((row for row in found.values() if "load_s" in row), {})
        lines.append(
            [
                f"{NAMES[provider]}, {policy}",
                *(_step_cell(found.get(shape)) for shape in shapes),
                _number(whole, "load_s", 1),
                _number(whole, "first_step_s", 1),
            ]
        )
    return header, lines


def decode_table(rows: Iterable[Row]) -> Table:
    """Tabulate generation: tokens per second and milliseconds of a token, a line each."""
    header = ["provider", "prompts", "tokens/s", "ms a token", "ms of the prompts", "peak GiB", ""]
    lines = [
        [
            NAMES[row["provider"]],
            row["shape"].replace("x", " x ").replace("+", " + "),
            _number(row, "tokens_per_second", 0),
            _number(row, "ms_p50", 2),
            _number(row, "prompt_ms", 1),
            _number(row, "peak_gib", 2),
            row.get("error", ""),
        ]
        for row in rows
    ]
    return header, lines


def breakdown_table(rows: Iterable[Row]) -> Table:
    """Tabulate the families of a step's kernels."""
    header = ["family", "launches", "ms", "limit ms", "of limit", "of step"]
    lines = [
        [
            row["family"],
            str(row["launches"]),
            _number(row, "ms", 2),
            _number(row, "limit_ms", 2),
            "-" if row["percent_of_limit"] is None else f"{row['percent_of_limit']:.0f} %",
            "-" if row["percent_of_step"] is None else f"{row['percent_of_step']:.1f} %",
        ]
        for row in rows
    ]
    return header, lines


def load_table(rows: Iterable[Row]) -> Table:
    """Tabulate the seconds of a checkpoint's way to the device."""
    header = ["provider", "mode", "first s", "s", "p20", "p80", "GB/s", "peak GiB"]
    lines = [
        [
            row["provider"],
            row["mode"],
            *(f"{row[key] / 1e3:.2f}" for key in ("ms_first", "ms_p50", "ms_p20", "ms_p80")),
            f"{row['gbps']:.1f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
        ]
        for row in rows
    ]
    return header, lines


def packed_step_table(rows: Iterable[Row]) -> Table:
    """Tabulate the real tokens a second of rows that are full, shared or padded."""
    header = ["rows", "samples", "steps", "padding", "tokens/s", "of full"]
    listed = list(rows)
    full = next(row["tokens_per_second"] for row in listed if row["mode"] == "full")
    lines = [
        [
            row["mode"],
            _number(row, "samples", 0),
            _number(row, "steps", 0),
            f"{row['share_of_padding']:.1%}" if "share_of_padding" in row else "-",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / full:.2f}",
        ]
        for row in listed
    ]
    return header, lines


def data_parallel_table(rows: Iterable[Row]) -> Table:
    """Tabulate the step on several GPUs beside that on one."""
    header = ["shape", "micro-batches", "GPUs", "ms", "tokens/s", "of limit", "sum ms"]
    listed = list(rows)
    alone = {
        (row["shape"], row["micro_batches"]): row["tokens_per_second"]
        for row in listed
        if row["ranks"] == 1
    }
    lines = []
    for row in listed:
        limit = row["ranks"] * alone[row["shape"], row["micro_batches"]]
        lines.append(
            [
                row["shape"],
                str(row["micro_batches"]),
                str(row["ranks"]),
                f"{row['ms_p50']:,.1f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['tokens_per_second'] / limit:.1%}",
                f"{row['sum_ms_p50']:.2f}" if row["ranks"] > 1 else "-",
            ]
        )
    return header, lines


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lay a table out in columns: the first to the left, the others to the right."""
    table = [header, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    return "\n".join(
        " ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lay a table out in Markdown: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
