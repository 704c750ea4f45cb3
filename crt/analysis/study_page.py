"""A study's results for people: one table, paired comparisons, figures, and one page that opens offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crt.analysis.comparison import Row, mean_and_spread, mean_text, paired_difference
from crt.errors import UserError
from crt.evaluation.comparable import protocol_differences, protocol_warning
from crt.evaluation.metric_table import description
from crt.evaluation.wording import glossary
from crt.files import refuse_unreadable
from crt.history import read_history
from crt.pages import data_url, write_page
from crt.study import TRAINING_FLOPS, Contrast, Scale, Study, StudyRun


@dataclass(frozen=True)
class PageSection:
    """A heading of the page and what stands below it."""

    heading: str
    content: list[list[str]] | list[str] | Path
    """A table (lines of cells, the first a header), a list of sentences, or a picture."""
    note: str = ""
    """How to read it."""


def read_results(runs: Sequence[StudyRun], scale: Scale) -> list[Row]:
    """One row per run: its choices by axis, its seed, every number of its metrics.json, FLOPs of both trainings.

    Raises:
        UserError: a run has no results yet, or lacks a metric that the scale names.
    """
    rows: list[Row] = []
    for run in runs:
        try:
            metrics = json.loads(run.metrics_file.read_text(encoding="utf-8"))
            numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            refuse_unreadable(run.metrics_file, error)
            raise UserError(
                f"{run.metrics_file}: missing or damaged: delete its folder, if there is one, and run the "
                "study through snakemake"
            ) from None
        numbers[TRAINING_FLOPS] = sum(numbers.get(f"stage{stage}_training_flops", 0) for stage in (1, 2))
        wanted = {*scale.metrics, *(name for figure in scale.figures for name in (figure.x, figure.y))}
        missing = sorted(wanted - set(numbers))
        if missing:
            # The params alone do not tell that there are too few images for some figures; the evaluation warns.
            why = metrics.get("warnings") or f"it has {', '.join(sorted(numbers))}"
            raise UserError(
                f"{run.metrics_file}: has no {missing[0]!r} ({why}): take it out of the study's metrics and figures"
            )
        rows.append({**run.choices, "seed": run.seed, **numbers})
    return rows


def read_position_losses(runs: Sequence[StudyRun]) -> dict[tuple[str, ...], list[list[float]]]:
    """Stage 2's validation loss at each position of the raster, of every run, by the run's choices on all axes.

    Raises:
        UserError: a run's file is missing or damaged.
    """
    losses: dict[tuple[str, ...], list[list[float]]] = {}
    for run in runs:
        path = Path(run.stages["train_ar"].output) / "loss_per_position.csv"
        try:
            curve = [row["loss"] for row in read_history(path)]
        except (OSError, KeyError, ValueError):
            raise UserError(f"{path}: missing or damaged: delete its folder and run the study again") from None
        losses.setdefault(tuple(run.choices.values()), []).append(curve)
    return losses


def protocol_warnings(runs: Sequence[StudyRun]) -> list[str]:
    """Runs of one seed that were measured differently, each against the seed's first: their figures do not compare.

    Seeds are not held against each other: each has a classifier of its own, if that gives the features.
    """
    warnings = []
    first: dict[int, tuple[str, Row]] = {}
    for run in runs:
        name = ", ".join([*(f"{axis} {choice}" for axis, choice in run.choices.items()), f"seed {run.seed}"])
        metrics = json.loads(run.metrics_file.read_text(encoding="utf-8"))
        first_name, first_metrics = first.setdefault(run.seed, (name, metrics))
        differences = protocol_differences(first_metrics, metrics)
        if differences:
            warnings.append(protocol_warning((first_name, name), differences))
    return warnings


def summary_table(rows: Sequence[Row], axes: Sequence[str], metrics: Sequence[str]) -> list[list[str]]:
    """Header and lines: mean and standard deviation over seeds of each metric, for each cell of the grid."""
    lines = [[*axes, "seeds", *metrics]]
    for cell in _cells(rows, axes):
        group = [row for row in rows if all(row[axis] == cell[axis] for axis in axes)]
        values = [mean_text([row[metric] for row in group]) for metric in metrics]
        lines.append([*cell.values(), str(len(group)), *values])
    return lines


def published_table(rows: Sequence[Row], scale: Scale) -> list[list[str]]:
    """Header and lines: figures from the literature beside ours of the same cell, the spread being that of seeds."""
    lines = [["setting", "metric", "published", "here", "source"]]
    for published in scale.published:
        values: dict[int, list[float]] = {}
        for row in rows:
            if published.metric in row and all(row[axis] == name for axis, name in published.cell.items()):
                values.setdefault(row["seed"], []).append(row[published.metric])
        # What several generators share, such as a tokenizer's rFID, is one measurement and not several.
        here = mean_text([mean_and_spread(of_seed)[0] for of_seed in values.values()]) if values else "-"
        setting = ", ".join(published.cell.values())
        lines.append([setting, published.metric, f"{published.value:g}", here, published.source])
    return lines


def contrast_table(
    rows: Sequence[Row], axes: Sequence[str], metrics: Sequence[str], contrast: Contrast
) -> list[list[str]]:
    """Header and lines: each other value of the contrast's axis against the baseline, paired over seeds.

    Empty where there is no other value.
    """
    axis, baseline = contrast.axis, contrast.baseline
    others = [name for name in axes if name != axis]
    lines = [[*others, axis, "metric", f"difference to {baseline}", "95% interval", "p (paired)", "seeds"]]
    for cell in _cells(rows, axes):
        if cell[axis] == baseline:
            continue
        for metric in metrics:
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
    return lines if len(lines) > 1 else []


def write_study_page(
    path: Path, title: str, study: Study, sections: Sequence[PageSection], figures: Sequence[str] = ()
) -> None:
    """One self-contained HTML page.

    Args:
        path: the file.
        title: of the page.
        study: for its question.
        sections: in their order. One that is empty is left out with its heading.
        figures: names in metrics.json that the page is to explain.
    """
    shown = [
        {
            "heading": section.heading,
            "content": data_url(section.content) if isinstance(section.content, Path) else section.content,
            "note": section.note,
        }
        for section in sections
        if section.content
    ]
    names = dict.fromkeys(figures)
    write_page(
        path,
        "study.html.j2",
        title=title,
        question=study.question,
        sections=shown,
        figures=[(name, description(name)) for name in names],
        glossary=glossary(names),
    )


def _cells(rows: Sequence[Row], axes: Sequence[str]) -> list[dict[str, str]]:
    return [dict(zip(axes, cell, strict=True)) for cell in dict.fromkeys(tuple(row[a] for a in axes) for row in rows)]
