"""loss.png: the losses of a run over its steps, drawn by matplotlib if it is installed."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from run.metrics import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHART_FILE = "loss.png"
EVALUATED = "#c0504d"
# share of all steps in the window of the running mean
SMOOTHED_SHARE = 1 / 20

Point: TypeAlias = tuple[float, float]


def can_draw() -> bool:
    """Whether matplotlib, an optional extra, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_losses(rows: Sequence[Row], path: Path, best_step: int | None = None) -> None:
    """Draw a run's losses into a file.

    Args:
        best_step: of the evaluation that decided which adapter was taken.
    """
    plot_losses(rows, best_step).savefig(path, dpi=120)


def plot_losses(rows: Sequence[Row], best_step: int | None = None) -> "Figure":
    """Plot `loss` and its running mean, and `eval_loss` with a marker for each evaluation.

    Note:
        Imports matplotlib, and uses neither its global state nor a display.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if points := _points(rows, "loss"):
        steps, losses = zip(*points, strict=True)
        # a line through one point is no line
        marker = "." if len(points) == 1 else ""
        axes.plot(steps, losses, color="#9db8d2", linewidth=0.8, marker=marker, label="loss")
        window = max(2, int(len(losses) * SMOOTHED_SHARE))
        if len(points) > window:
            means = _running_mean(losses, window)
            axes.plot(steps, means, color="#1f4e79", label=f"mean of {window}")
    evaluated = _points(rows, "eval_loss")
    first = _far_above(evaluated, points)
    if shown := evaluated[1:] if first else evaluated:
        steps, losses = zip(*shown, strict=True)
        axes.plot(steps, losses, color=EVALUATED, marker="o", markersize=5, label="eval_loss")
    if first:
        # at the upper edge, where the axis ends without it
        axes.plot(
            [first[0]],
            [1],
            transform=axes.get_xaxis_transform(),
            color=EVALUATED,
            marker="^",
            linestyle="",
            clip_on=False,
            label=f"eval_loss {first[1]:.4f} at step 0, above",
        )
    for step, loss in evaluated:
        if step == best_step:
            axes.plot(
                [step],
                [loss],
                color=EVALUATED,
                marker="*",
                markersize=14,
                linestyle="",
                label=f"lowest eval_loss: {loss:.4f} at step {step:,}, taken",
            )
    axes.set_xlabel("step")
    axes.set_ylabel("nats per target token")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _far_above(evaluated: Sequence[Point], losses: Sequence[Point]) -> Point | None:
    """The evaluation at step 0, if the axis would spend more on it than on all that follows."""
    later = [loss for step, loss in (*evaluated, *losses) if step > 0]
    if not evaluated or evaluated[0][0] != 0 or len(later) < 2:
        return None
    return evaluated[0] if evaluated[0][1] - max(later) > max(later) - min(later) else None


def _points(rows: Sequence[Row], name: str) -> list[Point]:
    """Steps and values; a skipped step has no value and is left out."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """For each value the mean of the last `window` values up to it; of fewer at the beginning."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means
