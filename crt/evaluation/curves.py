"""Plots for people: how the losses fell, and how the codes are used. Same figures, same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from crt.evaluation.metric_table import METRICS, RESULTS, higher_is_better, title
from crt.evaluation.wording import POSITION
from crt.history import read_history

_PANEL_INCHES = (4.8, 3.2)
_COLUMNS = 3
# A logarithmic axis of more than this has whole powers of ten on it only.
_WIDE_RANGE = 300
_COLORS = {"training": "tab:blue", "validation": "tab:orange"}
_DPI = 110
_USAGE = "share of codes in use"
# Columns that say how a run was driven rather than how it fared, or what another panel shows in other units.
_LEFT_OUT = ("lambda", "learning_rate", "grad_norm", "mse", "code_entropy")
# What a panel shows, by the column; two columns of one title share a panel.
_TITLES = {
    "pixel": "error of the pixels",
    "codebook": "codebook loss",
    "commitment": "commitment loss",
    "lpips": "perceptual error (LPIPS)",
    "entropy": "entropy penalty",
    "regularizer": "causal regularizer",
    "adversarial": "adversarial loss",
    "discriminator": "discriminator's loss",
    "adaptive_weight": "adaptive weight of the adversarial loss",
    "code_usage": _USAGE,
    "codebook_usage": _USAGE,
    "psnr": "PSNR, dB (higher is better)",
    "perplexity": "perplexity of the codes",
}


def plot_losses(title: str, folder: Path, path: str | Path) -> None:
    """Draw what a training run recorded, one panel per figure, training and validation together.

    Args:
        title: of the network.
        folder: output of the stage: `train.csv` and `validation.csv` (figures by step), and of stage 2
            `loss_per_position.csv` (by place in the raster).
        path: the PNG to write; none is where nothing was recorded.
    """
    panels = _panels(title, folder)
    if not panels:
        return
    columns = min(_COLUMNS, len(panels))
    figure, axes = _figure(columns, -(-len(panels) // columns))
    for axis, panel in zip(axes, panels, strict=False):
        for kind, (x, y) in panel.series.items():
            axis.plot(
                x, y, label=kind, color=_COLORS[kind], linewidth=2 if kind == "validation" else 1,
                marker="." if len(x) < 30 else None, clip_on=False,
            )  # fmt: skip
        axis.set(title=panel.title, xlabel=panel.x_name, ylabel=panel.unit)
        values = np.concatenate([y for _, y in panel.series.values()])
        if panel.title.endswith(_USAGE):
            axis.set_ylim(0, min(axis.get_ylim()[1], 1))
        elif panel.x_name == "training step" and values.min() > 0 and values.max() > 10 * values.min():
            _logarithmic(axis)
        axis.legend()
    _save(figure, path)


def plot_code_usage(counts: np.ndarray, path: str | Path) -> None:
    """Draw how often each code occurs, most frequent first.

    Args:
        counts: (codebook_size,) occurrences.
        path: the PNG to write.
    """
    figure, (axis,) = _figure(1, 1)
    shares = np.sort(counts)[::-1] / counts.sum()
    used = int((counts > 0).sum())
    axis.plot(np.arange(1, used + 1), shares[:used], linewidth=2, label="this run")
    axis.axhline(1 / len(counts), linewidth=1, linestyle="--", color="gray", label="if all codes were equally frequent")
    axis.set(title=f"{used} of {len(counts)} codes in use", xlabel="codes, most frequent first")
    axis.set_ylabel("share of all codes written")
    _logarithmic(axis)
    axis.set_xlim(0, len(counts))
    axis.legend()
    _save(figure, path)


def plot_sweep(rows: Sequence[Mapping[str, float]], chosen: float, path: str | Path) -> None:
    """Draw each figure over the scale of guidance, a panel for each.

    Args:
        rows: with `guidance_scale` and figures; two at least.
        chosen: the scale that the run's other figures are for.
        path: the PNG to write.
    """
    names = [name for name in rows[0] if name in RESULTS]
    columns = min(_COLUMNS, len(names))
    figure, axes = _figure(columns, -(-len(names) // columns))
    scales = [row["guidance_scale"] for row in rows]
    for axis, name in zip(axes, names, strict=False):
        axis.plot(scales, [row[name] for row in rows], marker="o", linewidth=2, clip_on=False)
        axis.axvline(chosen, linewidth=1, linestyle=":", color="gray", label="scale of this run")
        perfect = f"{name}_of_perfect_images"
        if perfect in rows[0]:
            axis.plot(
                scales,
                [row[perfect] for row in rows],
                linewidth=1,
                linestyle="--",
                color="gray",
                label="perfect images",
            )
        better = "higher" if higher_is_better(name) else "lower"
        axis.set(title=f"{title(name)} ({better} is better)", xlabel="scale of guidance")
        if METRICS[name].unit == "%":
            axis.set_ylim(0, 1)
        axis.legend()
    _save(figure, path)


@dataclass(frozen=True)
class _Panel:
    title: str
    x_name: str
    unit: str
    series: dict[str, tuple[np.ndarray, np.ndarray]]


def _panels(title: str, folder: Path) -> list[_Panel]:
    by_step: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for kind, file in (("training", "train.csv"), ("validation", "validation.csv")):
        for name, points in _columns(folder / file, "step").items():
            by_step.setdefault(_TITLES.get(name, name.replace("_", " ")), {})[kind] = points
    of_codes = title == "transformer"
    panels = [
        _Panel(f"{title}: {name}", "training step", "nats per code" if of_codes and name == "loss" else "", series)
        for name, series in by_step.items()
    ]
    for points in _columns(folder / "loss_per_position.csv", "position").values():
        panels.append(_Panel(f"{title}: loss per position", POSITION, "nats per code", {"validation": points}))
    return panels


def _columns(path: Path, x_name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each figure of a CSV file against one of its columns, finite values only; empty if there is no such file."""
    rows = read_history(path) if path.exists() else []
    columns = {}
    for name in rows[0] if rows else ():
        x, y = np.array([[row[x_name], row[name]] for row in rows]).T
        if name != x_name and not name.endswith(_LEFT_OUT) and np.isfinite(y).any():
            columns[name] = x[np.isfinite(y)], y[np.isfinite(y)]
    return columns


def _logarithmic(axis: Axes) -> None:
    """A logarithmic axis with plain numbers on it, few enough to read."""
    axis.set_yscale("log")
    bottom, top = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < _WIDE_RANGE * bottom else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _figure(columns: int, rows: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows), dpi=_DPI)
    figure.set_layout_engine("constrained", h_pad=0.12)  # titles apart from the axis above them
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(columns * rows)]


def _save(figure: Figure, path: str | Path) -> None:
    for axis in figure.axes:
        if not axis.has_data():
            axis.remove()
    # matplotlib would write its version into the file.
    figure.savefig(path, format="png", metadata={"Software": None})
