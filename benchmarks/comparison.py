"""README's picture: tokens a second and memory of a training step, ours and the peers'.

The picture is SVG text, written without a library, so equal results give equal bytes. Its colours
follow the reader's light or dark setting, and it brings its own background: where a page has
another setting than the reader's system, the text can be read all the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import Row

Record = dict[str, Any]

SHAPE = "4x2048"
# provider and policy of each bar, from above, and its label
BARS = {
    ("ours", "keep"): "Quatrain, fastest",
    ("unsloth", "keep"): "Unsloth, fastest",
    ("ours", "offload"): "Quatrain, leanest",
    ("unsloth", "offload"): "Unsloth, leanest",
    ("hf", "recompute"): "Hugging Face",
}

WIDTH, LABELS, PANEL, GAP = 800, 140, 300, 30
TOP, BAR, PITCH = 74, 22, 32
# of a panel, for the longest bar; what is left has the figure behind it
LONGEST = 240

STYLE = """\
text { font: 13px system-ui, "DejaVu Sans", sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 14px } .small { font-size: 11px; fill: #59636e }
.page { fill: #ffffff } .ours { fill: #0072b2 } .peer { fill: #8c959f }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 }
  .page { fill: #0d1117 } .ours { fill: #56b4e9 } .peer { fill: #656c76 }
}"""


@dataclass(frozen=True)
class Panel:
    """One quantity of all providers."""

    title: str
    key: str
    digits: int
    left: int


PANELS = (
    Panel("tokens per second (more is better)", "tokens_per_second", 0, LABELS),
    Panel("GiB at the peak (less is better)", "peak_gib", 1, LABELS + PANEL + GAP),
)


def compared(rows: Iterable[Row]) -> dict[str, Row]:
    """Select the rows of the picture, by their labels."""
    found = {(row["provider"], row["policy"]): row for row in rows if row["shape"] == SHAPE}
    return {
        label: found[key]
        for key, label in BARS.items()
        if key in found and "error" not in found[key]
    }


def has_peers(record: Record) -> bool:
    """Whether a result compares every bar of the picture."""
    return len(compared(record["rows"])) == len(BARS)


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    attributes = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{attributes}>{words}</text>'


def _bars(panel: Panel, rows: Sequence[Row]) -> list[str]:
    most = max(row[panel.key] for row in rows)
    parts = [_text(panel.left, TOP - 12, panel.title, "small")]
    for index, row in enumerate(rows):
        y, value = TOP + index * PITCH, row[panel.key]
        width = LONGEST * value / most
        kind = "ours" if row["provider"] == "ours" else "peer"
        parts.append(
            f'<rect class="{kind}" x="{panel.left}" y="{y}" width="{width:.1f}" height="{BAR}"/>'
        )
        figure = f"{value:,.{panel.digits}f}"
        parts.append(_text(round(panel.left + width + 6, 1), y + 16, figure))
    return parts


def picture(record: Record) -> str:
    """Draw the step of every provider: its tokens per second, and its memory."""
    found = compared(record["rows"])
    rows = list(found.values())
    height = TOP + len(rows) * PITCH + 34
    title = "QLoRA of Llama-3-8B, rank 16 on all linear layers, micro-batches of 4 x 2,048 tokens"
    where = (
        f"{record['device']}, {record['date']}, torch {record['torch']}, "
        f"Unsloth {record['versions']['unsloth']}, "
        f"transformers {record['versions']['transformers']}, "
        f"bitsandbytes {record['versions']['bitsandbytes']}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{title}</title>",
        f"<style>\n{STYLE}\n</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        _text(16, 28, title, "title"),
    ]
    for index, label in enumerate(found):
        parts.append(_text(LABELS - 10, TOP + index * PITCH + 16, label, anchor="end"))
    for panel in PANELS:
        parts += _bars(panel, rows)
    return "\n".join([*parts, _text(16, height - 12, where, "small"), "</svg>"]) + "\n"
