"""Curves of a training run: a CSV file that continues exactly where a resumed run does.

It holds only what the run computes (no times), so an interrupted run ends with the same bytes as an
uninterrupted one. DVC plots the files as they are.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from crt.files import replacing


class History:
    """Append-only CSV with a `step` column and one column per figure.

    Args:
        path: the file.
        columns: names of the figures, without `step`.
        resume_step: rows with a greater step are dropped, since the resumed run writes them again.
    """

    def __init__(self, path: str | Path, columns: list[str], resume_step: int = 0) -> None:
        self.path, self.columns = Path(path), ["step", *columns]
        kept = [row for row in read_history(self.path) if row["step"] <= resume_step] if self.path.exists() else []
        # Under a temporary name: a kill while the kept rows are written must not lose them.
        with replacing(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "step": int(row["step"])} for row in kept)

    def has(self, step: int) -> bool:
        """Whether there is a row of this step."""
        return any(row["step"] == step for row in read_history(self.path))

    def append(self, step: int, figures: Mapping[str, float]) -> None:
        """Add one row and hand it to the operating system."""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow({"step": step, **figures})


def write_rows(rows: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """All rows as CSV, in one go; empty where a row lacks a column that another has."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_history(path: str | Path) -> list[dict[str, float]]:
    """Rows of a history file; an unfinished last line (a kill while writing) is dropped."""
    text = Path(path).read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1].splitlines()
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(complete)]
