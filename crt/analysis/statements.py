"""What a study's numbers say about compute, as sentences: scaling laws, compute saved, who wins where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crt.analysis.comparison import Row, cells, mean_and_spread
from crt.analysis.figures import as_loss, compute_optimal, line_name, points_of_law, value_name
from crt.analysis.scaling import Undetermined, compute_saved, fit_scaling_law, pareto_frontier
from crt.evaluation.metric_table import axis_title
from crt.study import Figure


def scaling_lines(rows: Sequence[Row], figure: Figure) -> list[str]:
    """The scaling law fitted to the compute-optimal cells of each line of a figure, or why it cannot be."""
    lines = []
    for name in _lines(rows, figure):
        try:
            fit = fit_scaling_law(*points_of_law(rows, figure, name))
        except Undetermined as error:
            lines.append(f"{name}: no fit: {error}")
            continue
        low, high = fit.alpha_interval
        text = f"{name}: alpha {fit.alpha:.3f} ({low:.3f} .. {high:.3f}), L_min {fit.loss_min:.4g}"
        count = len(cells(row for row in rows if line_name(row, figure) == name))
        best = len(compute_optimal(rows, figure, name))
        text += f", on its {best} compute-optimal cells of {count}" if best < count else ""
        lines.append(text + (f"; not to be extrapolated: {fit.undetermined}" if fit.undetermined else ""))
    return lines


def savings_lines(rows: Sequence[Row], figure: Figure, baseline: str) -> list[str]:
    """How many times less compute each other line needs for what the baseline, a value of its one axis, reaches."""
    curves = {name: _means(rows, figure, name) for name in _lines(rows, figure)}
    lines = []
    baseline = ", ".join(value_name(axis, baseline) for axis in figure.axes)
    for name in (name for name in curves if name != baseline):
        try:
            levels, factors = compute_saved(*((x, as_loss(figure.y, y)) for x, y in (curves[baseline], curves[name])))
        except Undetermined as error:
            lines.append(f"{name}: {error}")
            continue
        levels = as_loss(figure.y, levels)
        ranges = f"{axis_title(figure.y)} {levels.min():.4g} to {levels.max():.4g}"
        lines.append(
            f"{name}: {factors.min():.2f} to {factors.max():.2f} times less compute than {baseline}, "
            f"median {np.median(factors):.2f}, where both reach the same {ranges}"
        )
    return lines


def winner_lines(rows: Sequence[Row], figure: Figure) -> list[str]:
    """Which line is best at which compute: the compute-optimal frontier, neighbours of one line taken together."""
    points = [(x, y, name) for name in _lines(rows, figure) for x, y in zip(*_means(rows, figure, name), strict=True)]
    x, y = (np.array([point[i] for point in points]) for i in (0, 1))
    lines: list[str] = []
    before: str | None = None
    for index in pareto_frontier(x, as_loss(figure.y, y)):
        name = points[index][2]
        if name != before:
            lines.append(f"from {x[index]:.3g} FLOPs on: {name} ({axis_title(figure.y)} {y[index]:.4g})")
        before = name
    return lines


def _lines(rows: Sequence[Row], figure: Figure) -> list[str]:
    return list(dict.fromkeys(line_name(row, figure) for row in rows))


def _means(rows: Sequence[Row], figure: Figure, name: str) -> tuple[list[float], list[float]]:
    """Compute and mean over seeds of the figure's y, of one line's cells."""
    groups = cells(row for row in rows if line_name(row, figure) == name)
    return (
        [mean_and_spread([row[figure.x] for row in group])[0] for group in groups],
        [mean_and_spread([row[figure.y] for row in group])[0] for group in groups],
    )
