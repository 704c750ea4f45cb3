"""What a person watches while a network trains: curves for TensorBoard and DVCLive, and pictures.

Everything goes to a folder beside the stage's log (`out/tokenizer.live`, `out/ar.live`), never into the result: it
holds times, which no two runs share. A continued run goes on in the same files, from its checkpoint's step.

    tensorboard --logdir out
"""

from __future__ import annotations

import csv
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from crt.errors import UserError
from crt.pictures import save_png
from crt.stage import StageRun

if TYPE_CHECKING:
    from dvclive import Live as DVCLive

# Curves keep about so many points.
_POINTS = 2_000


class Live:
    """The curves, on rank 0.

    Args:
        folder: theirs alone.
        steps: of the whole run.
        first_step: points after it are dropped, since the run makes them again; 0 starts anew.

    Raises:
        UserError: the folder's name is not UTF-8.
    """

    def __init__(self, folder: Path, steps: int, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if any("\ud800" <= letter <= "\udfff" for letter in str(folder)):  # bytes that are not UTF-8
            raise UserError(f"{folder}: TensorBoard writes into no folder whose name is not UTF-8: choose another")
        if first_step == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self.folder, self.every, self.last_step = folder, -(-steps // _POINTS), first_step
        # DVCLive writes its summary in place: a kill may have left half of it, and the run states the step itself.
        (folder / "dvclive" / "metrics.json").unlink(missing_ok=True)
        for path in (folder / "dvclive" / "plots").rglob("*.tsv"):
            _drop_later_rows(path, first_step)
        self.dvclive = _dvclive(folder / "dvclive", resume=first_step > 0)
        threading.excepthook = _say_unless_said
        self.tensorboard = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def training(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a point to each curve of training, if it is time for one."""
        if step % self.every == 0 or step - self.last_step >= self.every:
            self.last_step = step
            self.log(step, figures)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a point to each curve; those of validations have a name with `validation/` in front."""
        self.dvclive.step = step
        for name, value in figures.items():
            self.dvclive.log_metric(name, value)
            self.tensorboard.add_scalar(name, value, step)
        self.dvclive.make_summary()

    def positions(self, step: int, losses: np.ndarray) -> None:
        """Add the loss of each code of the raster, (T,)."""
        for position, loss in enumerate(losses):
            self.tensorboard.add_scalar(f"loss_per_position/step_{step:08d}", loss, position)
        self.tensorboard.flush()

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Write NAME/step_N.png and show it."""
        path = self.folder / name / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        save_png(image, path)
        self.tensorboard.add_image(name, np.asarray(image), step, dataformats="HWC")
        self.tensorboard.flush()

    def close(self) -> None:
        """Flush the files."""
        self.tensorboard.close()
        self.dvclive.end()


def _dvclive(folder: Path, *, resume: bool) -> DVCLive:
    """Only the files: no experiment, no dvc.yaml, no report."""
    from dvclive import Live as DVCLive

    class Files(DVCLive):
        """Where there is no DVC repository DVCLive would make one, and where Git has no commit it would fail."""

        def _init_dvc(self) -> None:
            if _has_revision():
                super()._init_dvc()
            else:
                self._dvc_file = self._init_dvc_file()

    return Files(str(folder), resume=resume, report=None, save_dvc_exp=False, dvcyaml=False)


def _has_revision() -> bool:
    """Whether the working folder is in a DVC repository that Git keeps, with a commit."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError

    try:
        with Repo() as repo:
            repo.scm.get_rev()
    except (DvcException, SCMError):
        return False
    return True


def _say_unless_said(failure: threading.ExceptHookArgs) -> None:
    """A disk's errors in TensorBoard's thread are raised anew in the one that trains, at its next call."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _drop_later_rows(path: Path, last_step: int) -> None:
    text = path.read_text(encoding="utf-8")
    # A kill while writing leaves an unfinished last line, or nothing at all.
    lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines(), delimiter="\t"))
    if not lines:
        path.unlink()
        return
    header, *rows = lines
    column = header.index("step")
    kept = [row for row in rows if len(row) == len(header) and int(row[column]) <= last_step]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *kept])


def live_folder(run: StageRun) -> Path:
    """Where the curves of a run go."""
    return run.out.with_name(run.out.name + ".live")
