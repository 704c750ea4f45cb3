"""`python -m crt results`: the metrics of the current evaluation, what they were measured by, and the pictures.

`python -m crt results A B` prints two results side by side, and warns if they were measured differently.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crt.commands.check import add_arguments as add_params_argument
from crt.errors import UserError
from crt.evaluation.comparable import protocol_differences, protocol_warning
from crt.evaluation.metric_table import RESULTS
from crt.evaluation.wording import has_classes, meaning, protocol_text, shown
from crt.files import refuse_unreadable
from crt.manifest import check_content, read_current
from crt.params import load_params
from crt.pipeline import load_stages

_WIDTH = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the params file, and the results to compare."""
    add_params_argument(parser)
    parser.add_argument(
        "results", type=Path, nargs="*", metavar="RESULT", help="evaluation folders or metrics.json files to print"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table.

    Raises:
        UserError: the evaluation is missing or was made with other params, or a named result cannot be read.
    """
    if args.results:
        return _print_results(args.results)
    stage = load_stages()["evaluate"]
    folder = Path(stage.output)
    read_current(folder, load_params(args.params).model_dump(by_alias=True), args.params, stage.name)
    check_content(folder)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    files = {"all metrics": stage.metrics[0], "report": folder / "report.html"}
    files |= {picture.stem: picture for picture in sorted(folder.glob("*.png"))}
    print("\n".join(["", *table(metrics, files), ""]))
    for name, path in files.items():
        print(f"  {name:{_width(files)}} {path}")
    print()
    return 0


def table(metrics: dict[str, Any], others: Iterable[str] = ()) -> list[str]:
    """Lines for a person: figures with their meaning, then what they were measured by, then warnings.

    Args:
        metrics: content of a metrics.json.
        others: names that are to fit into the first column too.
    """
    width = _width(others)
    figures = shown(metrics, has_classes(metrics))
    lines = [
        f"  {name:{width}} {metrics[name]:10.4g}   {meaning(text, metrics)}"
        for name, text in RESULTS.items()
        if name in figures
    ]
    notes = [("measured by", protocol_text(metrics))]
    notes += [("warning", warning) for warning in metrics.get("warnings", "").split("; ") if warning]
    for name, text in notes:
        first = f"  {name:{width}} "
        lines += ["", textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first))]
    return lines


def _width(others: Iterable[str] = ()) -> int:
    """Of the first column."""
    return max(len(name) for name in (*others, *RESULTS))


def _print_results(paths: list[Path]) -> int:
    found = [_read(path) for path in paths]
    if len(found) == 1:
        print("\n".join(["", *table(found[0]), ""]))
        return 0
    width = _width()
    columns = [max(len(str(path)), 12) for path in paths]
    print("\n  " + " " * width + "".join(f"  {path!s:>{c}}" for path, c in zip(paths, columns, strict=True)))
    figures = [shown(metrics, has_classes(metrics)) for metrics in found]
    for name in RESULTS:
        if any(name in values for values in figures):
            cells = (f"{values[name]:.4g}" if name in values else "-" for values in figures)
            print(f"  {name:{width}}" + "".join(f"  {cell:>{c}}" for cell, c in zip(cells, columns, strict=True)))
    for path, metrics in zip(paths[1:], found[1:], strict=True):
        differences = protocol_differences(found[0], metrics)
        if differences:
            print(f"\nwarning: {protocol_warning((str(paths[0]), str(path)), differences)}")
    print()
    return 0


def _read(path: Path) -> dict[str, Any]:
    file = path / "metrics.json" if path.is_dir() else path
    try:
        metrics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        table(metrics)  # all that a table takes is there
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        refuse_unreadable(file, error)
        raise UserError(
            f"{file}: missing, or no metrics of an evaluation by this version: give its output folder or metrics.json"
        ) from None
    return metrics
