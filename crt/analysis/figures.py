"""Pictures of a study: a metric over another, usually over training compute, in the form of the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MplFigure
from numpy.typing import ArrayLike, NDArray

from crt.analysis.comparison import Row, cells, mean_and_spread
from crt.analysis.scaling import Undetermined, fit_scaling_law, pareto_frontier
from crt.evaluation.metric_table import axis_title, higher_is_better
from crt.evaluation.wording import POSITION
from crt.study import Figure, Published

# Of lines one after the other, as their colors: not everyone sees those apart, nor does every printer.
_MARKERS = "osD^vPX<>"
_LINEAR_RANGE = 10
# No law is fitted to a line whose compute-optimal cells end at less than this part of its compute.
_MAX_UNSEEN = 4.0


def value_name(axis: str, value: str) -> str:
    """A value of an axis for a reader: a number says of what, `lambda = 0.3`; words speak for themselves."""
    try:
        float(value)
    except ValueError:
        return value
    return f"{axis} = {value}"


def line_name(row: Row, figure: Figure) -> str:
    """Which line of a figure a run belongs to."""
    return ", ".join(value_name(axis, row[axis]) for axis in figure.axes)


def as_loss(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Values of a figure with the sign by which lower is better; the same again gives the values back."""
    array = np.asarray(values, dtype=np.float64)
    return -array if higher_is_better(name) else array


def draw_figure(rows: Sequence[Row], figure: Figure, path: Path, published: Sequence[Published] = ()) -> None:
    """Draw mean and standard deviation over seeds of every cell.

    Over compute, the scaling law fitted to each line's own compute-optimal cells is dashed, and the cells that nothing
    cheaper beats are joined by a grey line: the compute-optimal frontier. Published values stand as stars at the
    compute of our cell. Positive values that span more than a decade get a logarithmic axis.

    Args:
        rows: a study's results.
        figure: what to draw.
        path: PNG file to write.
        published: values from the literature; those of the figure's y are drawn.
    """
    over_compute = "flops" in figure.x
    canvas, axes = _canvas(height=4.6)
    means = _cell_means(rows, figure)
    for name, marker in zip(dict.fromkeys(name for name, *_ in means), cycle(_MARKERS), strict=False):
        x, y, spread = (np.array(column) for column in zip(*sorted(m[1:] for m in means if m[0] == name), strict=True))
        points = axes.errorbar(x, y, yerr=spread, marker=marker, markersize=4, capsize=2, linestyle="none", label=name)
        color = points.lines[0].get_color()
        curve = _fitted_curve(rows, figure, name) if over_compute else None
        if curve is None:
            axes.plot(x, y, color=color, alpha=0.6)
        else:
            axes.plot(*curve, color=color, linestyle="--", alpha=0.8)
    if over_compute:
        x, y = (np.array([mean[i] for mean in means]) for i in (1, 2))
        best = pareto_frontier(x, as_loss(figure.y, y))
        axes.plot(x[best], y[best], color="0.6", linewidth=5, alpha=0.35, zorder=0, label="compute-optimal")
        if x.min() > 0:
            axes.set_xscale("log")
    for value in published:
        places = [row[figure.x] for row in rows if all(row[axis] == name for axis, name in value.cell.items())]
        if value.metric == figure.y and places:
            axes.plot(np.mean(places), value.value, "*", color="0.2", markersize=10)
            axes.annotate("published", (np.mean(places), value.value), xytext=(6, 4), textcoords="offset points")
    if _spans_decades([mean[2] for mean in means]):
        axes.set_yscale("log")
    axes.set_xlabel(axis_title(figure.x))
    axes.set_ylabel(axis_title(figure.y))
    axes.grid(alpha=0.3, which="both")
    _legend_beside(canvas, ", ".join(figure.axes))
    canvas.savefig(path, dpi=130, metadata={"Software": None})


def draw_position_losses(
    losses: Mapping[tuple[str, ...], Sequence[Sequence[float]]], axes: Sequence[str], axis: str, path: Path
) -> None:
    """Draw validation loss over position in the sequence, a line for each value of one axis.

    A line is the mean over seeds and all other axes, so that runs with another number of tokens are left out: those
    of the most frequent number are drawn.

    Args:
        losses: nats at each position of each run, by the run's choices.
        axes: names of the axes, in the order of the choices.
        axis: the one whose values are told apart.
        path: PNG file to write.
    """
    position = axes.index(axis)
    lengths = [len(run) for runs in losses.values() for run in runs]
    length = max(set(lengths), key=lengths.count)
    canvas, plot = _canvas(height=3.6)
    for name, marker in zip(dict.fromkeys(choices[position] for choices in losses), cycle(_MARKERS), strict=False):
        chosen = [run for key, runs in losses.items() if key[position] == name for run in runs if len(run) == length]
        if chosen:
            plot.plot(range(length), np.mean(chosen, axis=0), marker=marker, markersize=4, label=value_name(axis, name))
    plot.set_xlabel(POSITION)
    plot.set_ylabel(axis_title("stage2_val_loss"))
    plot.grid(alpha=0.3)
    _legend_beside(canvas, axis)
    canvas.savefig(path, dpi=130, metadata={"Software": None})


def _canvas(height: float) -> tuple[MplFigure, Axes]:
    """A picture so many inches high, and its axes."""
    canvas = MplFigure(figsize=(7.2, height), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas, canvas.add_subplot()


def _legend_beside(canvas: MplFigure, title: str) -> None:
    """Put the legend to the right of the axes, on a canvas enlarged by as much, so that it covers no point.

    `title` says what its lines tell apart.
    """
    legend = canvas.legend(
        loc="outside right upper", fontsize="small", title=title, title_fontsize="small"
    ).get_window_extent()
    margin = 0.1  # inches
    width = canvas.get_figwidth() + legend.width / canvas.dpi + margin
    canvas.set_size_inches(width, max(canvas.get_figheight(), legend.height / canvas.dpi + 2 * margin))


def _cell_means(rows: Sequence[Row], figure: Figure) -> list[tuple[str, float, float, float]]:
    """(line, mean x, mean y, spread of y) of every cell of the grid."""
    return [
        (
            line_name(group[0], figure),
            mean_and_spread([row[figure.x] for row in group])[0],
            *mean_and_spread([row[figure.y] for row in group]),
        )
        for group in cells(rows)
    ]


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether a linear axis would press most of these into one line at its foot."""
    return min(values) > 0 and max(values) / min(values) > _LINEAR_RANGE


def compute_optimal(rows: Sequence[Row], figure: Figure, name: str) -> list[list[Row]]:
    """The cells of one line that no cheaper one beats in the mean over seeds: what a scaling law is fitted to.

    A law through all cells would tell how many of them are trained too long or too briefly for their size.

    Raises:
        Undetermined: much of the compute is spent on cells that cheaper ones beat, so that nothing shows the law there.
    """
    own = [group for group in cells(rows) if line_name(group[0], figure) == name]
    x, y = (
        np.array([mean_and_spread([row[key] for row in group])[0] for group in own]) for key in (figure.x, figure.y)
    )
    best = pareto_frontier(x, as_loss(figure.y, y))
    if x[best].max() < x.max() / _MAX_UNSEEN:
        raise Undetermined(f"beyond {x[best].max():.3g} FLOPs nothing is better than what less compute reaches")
    return [own[index] for index in best]


def points_of_law(rows: Sequence[Row], figure: Figure, name: str) -> tuple[list[float], list[float]]:
    """Compute and loss of every run of one line's compute-optimal cells, for `fit_scaling_law`.

    Raises:
        Undetermined: as `compute_optimal`; or the figure rises with quality, while L(C) falls.
    """
    if higher_is_better(figure.y):
        raise Undetermined("the law is one of figures that fall with compute")
    best = [row for cell in compute_optimal(rows, figure, name) for row in cell]
    return [row[figure.x] for row in best], [row[figure.y] for row in best]


def _fitted_curve(rows: Sequence[Row], figure: Figure, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        fit = fit_scaling_law(*points_of_law(rows, figure, name), resamples=0)
    except Undetermined:
        return None
    x = np.geomspace(*fit.compute_range, 60)
    return x, fit.predict(x)
