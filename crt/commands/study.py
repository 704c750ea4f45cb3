"""`python -m crt study`: page of a study whose runs are complete; `snakemake study_NAME` calls it."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from crt.analysis.figures import draw_figure, draw_position_losses
from crt.analysis.statements import savings_lines, scaling_lines, winner_lines
from crt.analysis.study_page import (
    PageSection,
    contrast_table,
    protocol_warnings,
    published_table,
    read_position_losses,
    read_results,
    summary_table,
    write_study_page,
)
from crt.errors import UserError
from crt.evaluation.metric_table import axis_title
from crt.files import make_folder
from crt.history import write_rows
from crt.study import load_study, study_runs, study_stamp, study_target

# How to read the page's sections.
_PAIRED = (
    "Runs of one seed are held against each other: mean over the seeds of the difference, the 95% interval of that "
    "mean, and p by a two-sided paired t-test. It is not corrected for the number of rows: of twenty differences that "
    "are none, one has p below 0.05 by chance."
)
_POINTS = "Points are means over seeds, bars standard deviations."
_OVER_COMPUTE = (
    " Dashed: the scaling law below, fitted to each line's own compute-optimal cells. Grey: what nothing of less "
    "compute beats, whichever line it is of."
)
_SAVED = (
    "Between those points of each line that no cheaper one of it beats, joined by straight lines over the logarithm of "
    "compute."
)
_LAW = (
    "C: training FLOPs. L_min: what remains at any compute, at least 0. alpha: how fast the rest falls, with its 95% "
    "interval by bootstrap over the runs of those cells."
)
_POSITIONS = (
    "Means over seeds and all other axes. Runs of another number of codes than most have are left out. The first code "
    "is predicted from the class alone."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the study."""
    parser.add_argument("--study", type=Path, required=True, metavar="FILE", help="a file of studies/")
    parser.add_argument("--scale", required=True, help="one of the study's scales")


def run(args: argparse.Namespace) -> int:
    """Write results.csv, the figures and index.html into the study's folder, and print the table.

    Raises:
        UserError: a bad study file, or a run that has no results yet.
    """
    study = load_study(args.study)
    runs = study_runs(args.study, args.scale)
    scale = study.scales[args.scale]
    absent = [run.metrics_file for run in runs if not run.metrics_file.exists()]
    if absent:
        raise UserError(
            f"{args.study}: {len(absent)} of {len(runs)} runs have no results yet, such as {absent[0]}: run "
            f"`snakemake --cores all {study_target(args.study, args.scale, study)}`"
        )
    rows, axes = read_results(runs, scale), list(scale.axes)
    stamp = Path(study_stamp(args.study, args.scale, runs))
    folder = stamp.parent
    work = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    make_folder(work)
    write_rows(rows, work / "results.csv")
    table = summary_table(rows, axes, scale.metrics)
    warnings = protocol_warnings(runs)
    sections = [
        PageSection("Results, mean and standard deviation over seeds", table),
        PageSection("Warnings", warnings),
    ]
    if study.contrast is not None:
        paired = contrast_table(rows, axes, scale.metrics, study.contrast)
        sections.append(PageSection("Paired differences", paired, _PAIRED))
    if scale.published:
        sections.append(PageSection("Published figures", published_table(rows, scale)))
    for number, figure in enumerate(scale.figures):
        picture = work / f"figure_{number}.png"
        draw_figure(rows, figure, picture, scale.published)
        y = axis_title(figure.y)
        over_compute = "flops" in figure.x
        sections.append(
            PageSection(f"{y} over {axis_title(figure.x)}", picture, _POINTS + (_OVER_COMPUTE if over_compute else ""))
        )
        if over_compute:
            sections.append(PageSection(f"Best {y} at each compute", winner_lines(rows, figure)))
            if study.contrast is not None and figure.axes == [study.contrast.axis]:
                saved = savings_lines(rows, figure, study.contrast.baseline)
                sections.append(PageSection(f"Compute saved, by {y}", saved, _SAVED))
            law = f"Scaling law of {y}: L(C) = L_min + C^alpha e^lambda_0"
            sections.append(PageSection(law, scaling_lines(rows, figure), _LAW))
    axis = study.contrast.axis if study.contrast is not None else axes[0]
    picture = work / "loss_per_position.png"
    draw_position_losses(read_position_losses(runs), axes, axis, picture)
    sections.append(PageSection("Loss per token position", picture, _POSITIONS))
    figures = [*scale.metrics, *(name for figure in scale.figures for name in (figure.x, figure.y))]
    write_study_page(work / "index.html", f"Study {args.study.stem} ({args.scale})", study, sections, figures)
    (work / stamp.name).touch()
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(work, folder)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"\npage: {folder / 'index.html'}")
    return 0
