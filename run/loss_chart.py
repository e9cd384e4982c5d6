"""loss.png: the losses of a run over its steps, drawn by matplotlib where that is installed."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from run.metrics import Row

CHART_FILE = "loss.png"
# steps that the thick line is the mean of, as a share of all
SMOOTHED_SHARE = 1 / 20


def can_draw() -> bool:
    """Whether matplotlib is there; it is an optional extra."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_losses(rows: Sequence[Row], path: Path) -> None:
    """Draw `loss` and its running mean, and `eval_loss` where there is one.

    Note:
        Imports matplotlib, without its global state and without a display.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    points = _points(rows, "loss")
    if points:
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color="#9db8d2", linewidth=0.8, label="loss")
        window = max(2, int(len(losses) * SMOOTHED_SHARE))
        axes.plot(steps, _running_mean(losses, window), color="#1f4e79", label=f"mean of {window}")
    if evaluated := _points(rows, "eval_loss"):
        steps, losses = zip(*evaluated, strict=True)
        axes.plot(steps, losses, color="#c0504d", marker="o", markersize=4, label="eval_loss")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per target token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """Steps and values; where a step was skipped there is none."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` of them where there are as many."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means
