"""Plots for people: how the losses fell, and how the codes are used. Same figures, same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from crt.history import read_history

_PANEL_INCHES = (4.8, 3.2)
_COLUMNS = 3
_DPI = 110
# Columns that say how a run was driven rather than how it fared.
_NO_SWEEP = ("_of_perfect_images", "_std")
_LEFT_OUT = ("lambda", "learning_rate", "grad_norm")


def plot_losses(folders: Mapping[str, Path], path: str | Path) -> bool:
    """Draw what training runs recorded, one panel per figure, training and validation together.

    Args:
        folders: outputs of training stages by the title to give them; each may hold `train.csv` and
            `validation.csv` (figures by step) and `loss_per_position.csv` (by place in the raster).
        path: the PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    panels = [panel for title, folder in folders.items() for panel in _panels(title, folder)]
    if not panels:
        return False
    columns = min(_COLUMNS, len(panels))
    figure, axes = _figure(columns, -(-len(panels) // columns))
    for axis, panel in zip(axes, panels, strict=False):
        for kind, (x, y) in panel.series.items():
            axis.plot(x, y, label=kind, linewidth=2 if kind == "validation" else 1, marker="." if len(x) < 30 else None)
        axis.set(title=panel.title, xlabel=panel.x_name)
        values = np.concatenate([y for _, y in panel.series.values()])
        if panel.x_name == "step" and values.min() > 0 and values.max() > 10 * values.min():
            axis.set_yscale("log")
        axis.legend()
    _save(figure, path)
    return True


def plot_code_usage(counts: np.ndarray, path: str | Path) -> None:
    """Draw how often each code occurs, most frequent first.

    Args:
        counts: (codebook_size,) occurrences.
        path: the PNG to write.
    """
    figure, (axis,) = _figure(1, 1)
    shares = np.sort(counts)[::-1] / counts.sum()
    used = int((counts > 0).sum())
    axis.plot(np.arange(1, used + 1), shares[:used], linewidth=2)
    axis.axhline(1 / len(counts), linewidth=1, linestyle="--", color="gray", label="all codes alike")
    axis.set(
        title=f"{used} of {len(counts)} codes used", xlabel="codes, most frequent first", ylabel="share", yscale="log"
    )
    axis.set_xlim(0, len(counts))
    axis.legend()
    _save(figure, path)


def plot_sweep(rows: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Draw each figure over the scale of guidance, a panel for each.

    Args:
        rows: with `guidance_scale` and figures; two at least.
        path: the PNG to write.
    """
    names = [name for name in rows[0] if name != "guidance_scale" and not name.endswith(_NO_SWEEP)]
    columns = min(_COLUMNS, len(names))
    figure, axes = _figure(columns, -(-len(names) // columns))
    for axis, name in zip(axes, names, strict=False):
        axis.plot([row["guidance_scale"] for row in rows], [row[name] for row in rows], marker="o", linewidth=2)
        axis.set(title=name.replace("_", " "), xlabel="guidance scale")
    _save(figure, path)


@dataclass(frozen=True)
class _Panel:
    title: str
    x_name: str
    series: dict[str, tuple[np.ndarray, np.ndarray]]


def _panels(title: str, folder: Path) -> list[_Panel]:
    by_step: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for kind, file in (("training", "train.csv"), ("validation", "validation.csv")):
        for name, points in _columns(folder / file, "step").items():
            by_step.setdefault(name, {})[kind] = points
    panels = [_Panel(f"{title}: {name.replace('_', ' ')}", "step", series) for name, series in by_step.items()]
    for points in _columns(folder / "loss_per_position.csv", "position").values():
        panels.append(_Panel(f"{title}: loss per position", "position", {"validation": points}))
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


def _figure(columns: int, rows: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(columns * rows)]


def _save(figure: Figure, path: str | Path) -> None:
    for axis in figure.axes:
        if not axis.has_data():
            axis.remove()
    # matplotlib would write its version into the file.
    figure.savefig(path, format="png", metadata={"Software": None})
