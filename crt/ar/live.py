"""What a person watches while stage 2 trains: curves for TensorBoard and DVCLive, and pictures of its samples.

Everything goes to a folder beside the stage's log (`out/ar.live`), never into the result: it holds times, which no two
runs share. A continued run goes on in the same files, from its checkpoint's step.

    tensorboard --logdir out/ar.live
"""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from crt.ar.generator import Generator
from crt.ar.model import ARTransformer
from crt.data.transforms import to_uint8
from crt.distributed import World
from crt.evaluation.grids import image_grid, save_png
from crt.pipeline import load_stages
from crt.progress import logger
from crt.stage import StageRun
from crt.tokenizer.model import Tokenizer
from crt.tokens.layout import content_of

# Curves keep about so many points.
_POINTS = 2_000
# LlamaGen's for its smaller models; the picture is for looking at, the stage `sample` has its own.
_GUIDANCE = 2.0


class Live:
    """The curves, on rank 0.

    Args:
        folder: theirs alone.
        steps: of the whole run.
        first_step: points after it are dropped, since the run makes them again; 0 starts anew.
    """

    def __init__(self, folder: Path, steps: int, first_step: int) -> None:
        from dvclive import Live as DVCLive
        from torch.utils.tensorboard import SummaryWriter

        if first_step == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self.folder, self.every = folder, -(-steps // _POINTS)
        # DVCLive writes its summary in place: a kill may have left half of it, and the run states the step itself.
        (folder / "dvclive" / "metrics.json").unlink(missing_ok=True)
        for path in (folder / "dvclive" / "plots").rglob("*.tsv"):
            _drop_later_rows(path, first_step)
        # Only the files: no experiment, no dvc.yaml, no report.
        self.dvclive = DVCLive(
            str(folder / "dvclive"), resume=first_step > 0, report=None, save_dvc_exp=False, dvcyaml=False
        )
        self.tensorboard = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

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

    def picture(self, step: int, rows: list[np.ndarray], labels: list[str]) -> None:
        """Write samples/step_N.png and show it: rows of uint8 (n, S, S, 3), each with its class."""
        image = image_grid(rows, labels)
        path = self.folder / "samples" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        save_png(image, path)
        self.tensorboard.add_image("samples", np.asarray(image), step, dataformats="HWC")
        self.tensorboard.flush()

    def close(self) -> None:
        """Flush the files."""
        self.tensorboard.close()
        self.dvclive.end()


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


class SampleGrid:
    """Draws the first few classes from the model as it stands.

    Args:
        run: of train_ar; the cache's own tokenizer decodes, where its folder is found.
        num_images: of the picture; 0 draws none.
        world: all processes draw together, as ZeRO 3 needs; rank 0 decodes.
    """

    def __init__(self, run: StageRun, num_images: int, class_names: list[str], world: World) -> None:
        self.num_images, self.class_names, self.world, self.seed = num_images, class_names, world, run.params.seed
        # Without dropped labels the model learns no unconditional prediction.
        self.guidance = _GUIDANCE if run.params.train_ar.model.label_dropout > 0 else 1.0
        folder = find_tokenizer(run) if num_images else None
        found = torch.tensor(folder is not None, device=world.device)
        torch.distributed.broadcast(found, 0)
        self.enabled = bool(found)
        self.tokenizer = Tokenizer.load(folder, world.device) if folder is not None and world.is_main else None
        if num_images and not self.enabled and world.is_main:
            logger.info("train_ar: draws no samples: the tokenizer that made the codes is not where dvc.yaml has it")

    @torch.no_grad()
    def draw(self, model: ARTransformer) -> tuple[list[np.ndarray], list[str]]:
        """Rows of uint8 (n, S, S, 3) and their classes; empty on other ranks than 0. A collective call.

        Args:
            model: in evaluation mode, on the device; draws change no generator's state.
        """
        labels = np.arange(self.num_images) % len(self.class_names)
        codes = Generator(model).generate(labels, self.guidance, self.seed)
        if self.tokenizer is None:
            return [], []
        images = to_uint8(self.tokenizer.decode(codes.to(self.world.device))).cpu().numpy()
        classes = np.unique(labels)
        return [images[labels == label] for label in classes], [self.class_names[label] for label in classes]


def find_tokenizer(run: StageRun) -> Path | None:
    """The folder of the tokenizer that made the codes, by its content: where dvc.yaml has it, or beside the cache.

    None if it is at neither place, or unknown.
    """
    made_by = run.manifests["tokenize"].inputs.get("train_tokenizer")
    if made_by is None:  # codes that were imported
        return None
    wanted = made_by["content"]
    usual = Path(load_stages()["train_tokenizer"].output)
    for folder in (run.inputs["tokens"].parent / usual.name, usual):
        if (folder / "manifest.json").exists() and content_of(folder) == wanted:
            return folder
    return None


def matmul_rate(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """FLOPs per second of a large square matrix product on this device, measured now: what MFU is a share of."""
    side = 8192 if device.type == "cuda" else 1024
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[precision]
    # Random: a GPU that multiplies constants draws less power and runs faster than it ever does at work.
    draws = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, dtype=dtype, device=device, generator=draws) for _ in range(2))
    best, end = float("inf"), time.monotonic() + seconds
    while True:
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        if time.monotonic() > end:
            return 2 * side**3 / best
