"""Images made on the spot, and the stage as the command line runs it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crt.__main__ import main


def noise(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    """An image of its own for each seed: (height, width, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def class_folders(root: Path, classes: dict[str, int], first_seed: int = 0) -> Path:
    """PNG files of noise, so many per class folder, all different."""
    seed = first_seed
    for name, count in classes.items():
        for number in range(count):
            write(root / name / f"{number:03d}.png", encode(noise(seed)))
            seed += 1
    return root


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def make() -> Any:
    """The helpers above, by name."""
    return type("Make", (), {f.__name__: staticmethod(f) for f in (noise, encode, write, class_folders, lines)})


@pytest.fixture
def prepare(params_file: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    """Run the stage with changed keys of its section; returns exit status and output folder."""

    def run(out: Path | None = None, **changes: Any) -> tuple[int, Path]:
        out = out or tmp_path / "out" / "prepared"
        return main(["prepare_data", "--params", str(stage_params(params_file, **changes)), "--out", str(out)]), out

    return run


def stage_params(params_file: Callable[..., Path], **changes: Any) -> Path:
    values = {"source": "imagefolder", "image_size": 16, "max_images_per_class": None, **changes}
    values = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    size = values["image_size"] if values.get("storage", "pixels") == "pixels" else 16
    return params_file(**{f"prepare_data__{k}": v for k, v in values.items()}, train_tokenizer__image_size=size)


@pytest.fixture
def params_of(params_file: Callable[..., Path]) -> Callable[..., Path]:
    """The params file that `prepare` would use, for runs in a process of their own."""
    return lambda **changes: stage_params(params_file, **changes)


@pytest.fixture
def refused(prepare: Callable[..., tuple[int, Path]], capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the stage, which must end with status 2 and one line of error; returns that line."""

    def run(**changes: Any) -> str:
        capfd.readouterr()
        status, out = prepare(**changes)
        errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
        assert status == 2, errors
        assert len(errors) == 1 and errors[0].startswith("error: "), errors
        assert not out.exists()
        return errors[0]

    return run
