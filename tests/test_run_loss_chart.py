"""run/loss_chart.py: what loss.png shows, asked of the figure before it is a picture."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from run.loss_chart import draw_losses, plot_losses

Row = dict[str, Any]


def lines_of(figure: Figure) -> dict[str, Line2D]:
    """The lines of a chart by the first words of their labels."""
    (axes,) = figure.axes
    shown = {text.get_text() for text in axes.get_legend().get_texts()}  # pyright: ignore
    assert shown == {str(line.get_label()) for line in axes.lines}
    return {str(line.get_label()): line for line in axes.lines}


def points_of(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]  # pyright: ignore


def run_of(*losses: float, evaluated: dict[int, float]) -> list[Row]:
    rows: list[Row] = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    if 0 in evaluated:
        rows.insert(0, {"step": 0})
    for row in rows:
        if row["step"] in evaluated:
            row["eval_loss"] = evaluated[row["step"]]
    return rows


@pytest.mark.parametrize("evaluated", [{4: 1.2}, {0: 2.0, 2: 1.5, 4: 1.2}], ids=["one", "three"])
def test_each_evaluation_has_a_marker(evaluated: dict[int, float]) -> None:
    line = lines_of(plot_losses(run_of(2.0, 1.8, 1.6, 1.4, evaluated=evaluated)))["eval_loss"]
    assert points_of(line) == list(evaluated.items())
    assert line.get_marker() == "o"
    assert line.get_markersize() >= 4


def test_one_loss_can_be_seen() -> None:
    lines = lines_of(plot_losses(run_of(2.0, evaluated={0: 2.1})))
    assert points_of(lines["loss"]) == [(1, 2.0)]
    assert lines["loss"].get_marker() == "."
    # a mean of one value is that value
    assert list(lines) == ["loss", "eval_loss"]


def test_many_losses_are_a_line_with_its_mean() -> None:
    lines = lines_of(plot_losses(run_of(4.0, 2.0, 1.0, evaluated={})))
    assert lines["loss"].get_marker() in ("", "None")
    assert points_of(lines["mean of 2"]) == [(1, 4.0), (2, 3.0), (3, 1.5)]


def test_a_step_without_a_loss_is_left_out() -> None:
    rows = [*run_of(2.0, 1.9, evaluated={}), {"step": 3, "loss": None, "eval_loss": None}]
    lines = lines_of(plot_losses(rows))
    assert points_of(lines["loss"]) == [(1, 2.0), (2, 1.9)]
    assert "eval_loss" not in lines


def test_the_evaluation_that_was_taken_has_a_star() -> None:
    rows = run_of(2.0, 1.8, 1.6, evaluated={1: 1.9, 2: 1.25, 3: 1.5})
    star = lines_of(plot_losses(rows, best_step=2))["lowest eval_loss: 1.2500 at step 2, taken"]
    assert points_of(star) == [(2, 1.25)]
    assert star.get_marker() == "*"
    assert not any("taken" in label for label in lines_of(plot_losses(rows)))


def test_the_first_evaluation_does_not_flatten_the_rest() -> None:
    """Later losses have most of the axis, however high the loss before the first step is."""
    rows = run_of(2.0, 1.8, 1.6, 1.4, evaluated={0: 9.5, 2: 1.7, 4: 1.3})
    figure = plot_losses(rows)
    figure.canvas.draw()
    (axes,) = figure.axes
    bottom, top = axes.get_ylim()
    assert bottom < 1.3
    assert 2.0 < top < 2.2
    lines = lines_of(figure)
    assert points_of(lines["eval_loss"]) == [(2, 1.7), (4, 1.3)]
    above = lines["eval_loss 9.5000 at step 0, above"]
    # in parts of the axis: at its upper edge
    assert points_of(above) == [(0, 1)]
    assert above.get_marker() == "^"
    assert not above.get_clip_on()
    assert axes.get_xlim()[0] < 0


def test_a_first_evaluation_that_is_near_the_rest_is_a_part_of_the_line() -> None:
    rows = run_of(2.0, 1.8, 1.6, 1.4, evaluated={0: 2.5, 4: 1.3})
    figure = plot_losses(rows)
    assert points_of(lines_of(figure)["eval_loss"]) == [(0, 2.5), (4, 1.3)]
    assert figure.axes[0].get_ylim()[1] > 2.5


def test_the_chart_is_a_picture(tmp_path: Path) -> None:
    draw_losses(run_of(2.0, 1.8, evaluated={0: 2.2}), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
