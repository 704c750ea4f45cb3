"""Images made on the spot, and the stage as the command line runs it."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crt.__main__ import main
from crt.yaml_files import read_yaml

_TINY: dict[str, Any] = {}


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
def params_of(params_file: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write the params file of the tiny run with changed keys of this stage's section, as JSON, which YAML includes."""

    def write_params(**changes: Any) -> Path:
        values = read_yaml(params_file()) if not _TINY else copy.deepcopy(_TINY)
        _TINY.update(copy.deepcopy(values))
        section = {"source": "imagefolder", "image_size": 16, "max_images_per_class": None, **changes}
        assert set(section) <= set(values["prepare_data"])
        values["prepare_data"].update({k: str(v) if isinstance(v, Path) else v for k, v in section.items()})
        if values["prepare_data"]["storage"] == "pixels":
            values["train_tokenizer"]["image_size"] = section["image_size"]
        return write(tmp_path / "params.json", json.dumps(values).encode())

    return write_params


@pytest.fixture
def prepare(params_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the stage with changed keys of its section, in this process; returns exit status and output folder."""
    monkeypatch.setattr("crt.data.packing.available_cpus", lambda: 1)

    def run(out: Path | None = None, **changes: Any) -> tuple[int, Path]:
        out = out or tmp_path / "out" / "prepared"
        return main(["prepare_data", "--params", str(params_of(**changes)), "--out", str(out)]), out

    return run


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
