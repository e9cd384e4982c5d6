"""loss.png: the losses of a run over its steps, drawn by matplotlib if it is installed."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from run.metrics import Row

CHART_FILE = "loss.png"
# share of all steps in the window of the running mean
SMOOTHED_SHARE = 1 / 20


def can_draw() -> bool:
    """Whether matplotlib, an optional extra, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_losses(rows: Sequence[Row], path: Path) -> None:
    """Draw `loss` and its running mean, and `eval_loss` if there was an evaluation.

    Note:
        Imports matplotlib, and uses neither its global state nor a display.
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
    """Steps and values; a skipped step has no value and is left out."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """For each value the mean of the last `window` values up to it; of fewer at the beginning."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means
