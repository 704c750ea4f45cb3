"""A study's results for people: one table, paired comparisons, figures, and one page that opens offline."""

from __future__ import annotations

import base64
import csv
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crt.analysis.comparison import mean_and_spread, paired_difference
from crt.analysis.scaling import Undetermined, fit_scaling_law
from crt.errors import UserError
from crt.study import Figure, Study, StudyRun

Row = dict[str, Any]


def read_results(runs: Sequence[StudyRun], study: Study) -> list[Row]:
    """One row per run: its choices by axis, its seed, and every number of its metrics.json.

    Raises:
        UserError: a run has no results yet, or lacks a metric that the study names.
    """
    rows = []
    for run in runs:
        try:
            metrics = json.loads(run.metrics_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{run.metrics_file}: missing or damaged: run the study through snakemake") from None
        numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        wanted = {*study.metrics, *(name for figure in study.figures for name in (figure.x, figure.y))}
        missing = sorted(wanted - set(numbers))
        if missing:
            raise UserError(f"{run.metrics_file}: has no {missing[0]!r}: it has {', '.join(sorted(numbers))}")
        rows.append({**run.choices, "seed": run.seed, **numbers})
    return rows


def write_results(rows: Sequence[Row], path: Path) -> None:
    """All rows as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summary_table(rows: Sequence[Row], axes: Sequence[str], metrics: Sequence[str]) -> list[list[str]]:
    """Header and lines: mean and standard deviation over seeds of each metric, for each cell of the grid."""
    lines = [[*axes, "seeds", *metrics]]
    for cell in _cells(rows, axes):
        group = [row for row in rows if all(row[axis] == cell[axis] for axis in axes)]
        spreads = [mean_and_spread([row[metric] for row in group]) for metric in metrics]
        lines.append([*cell.values(), str(len(group)), *(f"{mean:.4g} ± {spread:.2g}" for mean, spread in spreads)])
    return lines


def contrast_table(rows: Sequence[Row], axes: Sequence[str], study: Study) -> list[list[str]]:
    """Header and lines: each other value of the contrast's axis against the baseline, paired over seeds."""
    assert study.contrast is not None
    axis, baseline = study.contrast.axis, study.contrast.baseline
    others = [name for name in axes if name != axis]
    lines = [[*others, axis, "metric", f"difference to {baseline}", "95% interval", "p (paired)", "seeds"]]
    for cell in _cells(rows, axes):
        if cell[axis] == baseline:
            continue
        for metric in study.metrics:
            values = {
                name: {
                    row["seed"]: row[metric]
                    for row in rows
                    if row[axis] == name and all(row[other] == cell[other] for other in others)
                }
                for name in (baseline, cell[axis])
            }
            d = paired_difference(values[baseline], values[cell[axis]])
            interval = f"{d.low:+.3g} .. {d.high:+.3g}" if d.pairs > 1 else "one seed"
            p_value = f"{d.p_value:.2g}" if d.p_value == d.p_value else "-"
            names = [cell[other] for other in others]
            lines.append([*names, cell[axis], metric, f"{d.mean:+.4g}", interval, p_value, str(d.pairs)])
    return lines


def scaling_lines(rows: Sequence[Row], figure: Figure) -> list[str]:
    """The scaling law fitted to each line of a figure over compute, or why it cannot be."""
    lines = []
    for name in dict.fromkeys(row[figure.lines] for row in rows):
        points = [(row[figure.x], row[figure.y]) for row in rows if row[figure.lines] == name]
        try:
            fit = fit_scaling_law(*zip(*points, strict=True))
        except Undetermined as error:
            lines.append(f"{name}: no fit: {error}")
            continue
        low, high = fit.alpha_interval
        text = f"{name}: alpha {fit.alpha:.3f} ({low:.3f} .. {high:.3f}), L_min {fit.loss_min:.4g}"
        lines.append(text + (f"; not to be extrapolated: {fit.undetermined}" if fit.undetermined else ""))
    return lines


def draw_figure(rows: Sequence[Row], figure: Figure, path: Path) -> None:
    """Mean over seeds with its standard deviation, a line for each value of the figure's axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    canvas, axes = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
    for name in dict.fromkeys(row[figure.lines] for row in rows):
        points: dict[tuple[str, ...], list[tuple[float, float]]] = {}
        for row in rows:
            if row[figure.lines] == name:
                cell = tuple(str(value) for key, value in row.items() if isinstance(value, str))
                points.setdefault(cell, []).append((row[figure.x], row[figure.y]))
        curve = sorted(
            (mean_and_spread([x for x, _ in cell])[0], *mean_and_spread([y for _, y in cell]))
            for cell in points.values()
        )
        x, y, spread = zip(*curve, strict=True)
        axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=f"{figure.lines} {name}")
    if "flops" in figure.x:
        axes.set_xscale("log")
    axes.set_xlabel(figure.x)
    axes.set_ylabel(figure.y)
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(canvas)


def write_page(
    path: Path, title: str, study: Study, sections: Mapping[str, list[list[str]] | list[str] | Path]
) -> None:
    """One self-contained HTML page.

    Args:
        path: the file.
        title: of the page.
        study: for its question.
        sections: by heading: a table (lines of cells, the first a header), a list of sentences, or a picture.
    """
    parts = []
    for heading, content in sections.items():
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        if isinstance(content, Path):
            data = base64.b64encode(content.read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">')
        elif content and isinstance(content[0], str):
            parts.append("<ul>" + "".join(f"<li>{html.escape(str(line))}</li>" for line in content) + "</ul>")
        else:
            header, *lines = content
            cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in lines)
            parts.append(f"<table><tr>{cells}</tr>{body}</table>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:left}"
        "td{font-variant-numeric:tabular-nums}th{background:#f4f4f4}img{max-width:100%}"
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(study.question)}</p>{''.join(parts)}</html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _cells(rows: Sequence[Row], axes: Sequence[str]) -> list[dict[str, str]]:
    return [dict(zip(axes, cell, strict=True)) for cell in dict.fromkeys(tuple(row[a] for a in axes) for row in rows)]
