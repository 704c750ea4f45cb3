"""The sampling stage as its command runs it: what its file holds, that nothing but the recipe shows in it."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from crt import chunks, interrupt
from crt.__main__ import main
from crt.ar.generator import Generator
from crt.errors import UserError
from crt.evaluation import export
from crt.progress import Progress
from crt.stages import sample
from crt.tokenizer.model import Tokenizer
from tests.ar.conftest import SMALL, publish_model, publish_tokens, small_config
from tests.ar.test_processes import in_processes, kill_and_repeat, launcher
from tests.conftest import ROOT, run_out_of_memory, write_params

Make = Callable[..., list[str]]


@pytest.fixture
def sample_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make params, tokenizer and model; returns the command line of `sample` on them."""
    monkeypatch.chdir(ROOT)

    def make(folder: Path = tmp_path, model: dict[str, Any] | None = None, **changes: Any) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        params = write_params(folder / "params.yaml", SMALL | {"sample.guidance_scale": 2.0} | dotted)
        publish_tokens(folder, params)
        publish_model(folder, params, **model or {})
        inputs = ["--tokenizer", str(folder / "tokenizer"), "--ar", str(folder / "ar")]
        return ["sample", "--params", str(params), *inputs, "--out", str(folder / "samples")]

    return make


def file_of(command: list[str]) -> Path:
    return Path(command[command.index("--out") + 1]) / "samples.h5"


def last_line(capsys: pytest.CaptureFixture) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "internal"))]
    return line


@pytest.mark.parametrize("labels", [None, [3, 3, 0]])
def test_the_file_holds_what_was_asked_for(sample_run: Make, tmp_path: Path, labels: list[int] | None) -> None:
    """Oracle: the generator and the tokenizer, called directly, all images at once."""
    command = sample_run(sample__labels=labels, sample__top_k=20, sample__top_p=0.9, sample__temperature=0.8)
    assert main(command) == 0
    expected_labels = np.resize(np.arange(5) if labels is None else labels, 20)
    codes = Generator.load(tmp_path / "ar").generate(
        expected_labels, guidance=2.0, seed=0, temperature=0.8, top_k=20, top_p=0.9
    )
    images = Tokenizer.load(tmp_path / "tokenizer").decode(codes)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with h5py.File(file_of(command)) as file:
        assert np.array_equal(file["labels"], expected_labels)
        assert np.array_equal(file["codes"], codes)
        assert file["images"].dtype == np.uint8
        # Another batch size may round the decoder's last bit the other way.
        assert np.abs(file["images"][()].astype(int) - pixels).max() <= 1
        assert json.loads(file.attrs["class_names"]) == list("abcde")
        assert (file.attrs["seed"], file.attrs["guidance_scale"]) == (0, 2.0)
        assert file["images"].chunks is None


class StopAt(Progress):
    """A progress bar that receives a signal, or fails, once so many images are done."""

    plan: tuple[int, Callable[[], None]] | None = None

    def update(self, done: int, **figures: float) -> None:
        super().update(done, **figures)
        if StopAt.plan is not None and StopAt.plan[0] == done:
            action, StopAt.plan = StopAt.plan[1], None
            action()


def _fail() -> None:
    raise RuntimeError("as if killed")


def test_an_interrupted_run_ends_with_the_same_bytes(
    sample_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, torn = sample_run(tmp_path / "whole"), sample_run(tmp_path / "torn")
    assert main(whole) == 0
    monkeypatch.setattr(chunks, "Progress", StopAt)
    monkeypatch.setattr(StopAt, "plan", (8, _fail))
    assert main(torn) == 1
    (chunk,) = (tmp_path / "torn" / ".work").glob("samples-*/chunks/*/*")
    written = chunk.stat().st_mtime_ns
    StopAt.plan = (16, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert main(torn) == 128 + signal.SIGTERM
    finally:
        interrupt._received.clear()
    assert chunk.stat().st_mtime_ns == written  # not made again
    assert main(torn) == 0
    assert file_of(torn).read_bytes() == file_of(whole).read_bytes()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writing_and_exporting_stop_and_continue(
    sample_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an uninterrupted run. A signal while each kind of file is written; finished ones are not made again."""
    monkeypatch.setattr(export, "_IMAGES_AT_ONCE", 5)
    changes = {"sample__export": ["npz", "png"], "sample__guidance_sweep": [1.0]}
    whole, torn = (sample_run(tmp_path / name, **changes) for name in ("whole", "torn"))
    assert main(whole) == 0
    plan = [
        ("write samples.h5", 8),
        ("export samples.npz", 5),
        ("export samples_png", 10),
        ("write samples_guidance_1.0.h5", 16),
        ("export samples_guidance_1.0_png", 15),
    ]

    class StopAsPlanned(Progress):
        def update(self, done: int, **figures: float) -> None:
            super().update(done, **figures)
            if plan and plan[0] == (self.label, done):
                del plan[0]
                os.kill(os.getpid(), signal.SIGTERM)

    for module in (sample, export):
        monkeypatch.setattr(module, "Progress", StopAsPlanned)
    finished: dict[str, int] = {}
    while plan:
        left = len(plan)
        assert main(torn) == 128 + signal.SIGTERM
        interrupt._received.clear()
        assert len(plan) == left - 1
        (staging,) = (tmp_path / "torn" / ".work").glob("samples-*/staging")
        files = [path for path in staging.rglob("*") if path.suffix in (".h5", ".npz", ".png")]
        times = {str(path.relative_to(staging)): path.stat().st_mtime_ns for path in files}
        assert {name: times[name] for name in finished} == finished
        finished = times
    assert len([name for name in finished if name.endswith(".png")]) == 20 + 15
    assert main(torn) == 0
    made = tmp_path / "torn" / "samples"
    assert {name: (made / name).stat().st_mtime_ns for name in finished} == finished
    assert files_in(made) == files_in(tmp_path / "whole" / "samples")


def test_the_first_images_of_a_larger_run_are_those_of_a_smaller(sample_run: Make, tmp_path: Path) -> None:
    few, many = sample_run(tmp_path / "few"), sample_run(tmp_path / "many", sample__num_images=29)
    assert main(few) == main(many) == 0
    with h5py.File(file_of(few)) as smaller, h5py.File(file_of(many)) as larger:
        for name in ("images", "codes", "labels"):
            assert np.array_equal(smaller[name], larger[name][:20])


def test_two_processes_write_the_same_bytes(sample_run: Make, tmp_path: Path) -> None:
    one, two = sample_run(tmp_path / "one"), sample_run(tmp_path / "two")
    assert main(one) == 0
    statuses, _ = in_processes(tmp_path, [(two, None)])
    assert statuses == [[0], [0]]
    assert file_of(two).read_bytes() == file_of(one).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments_leave_no_trace(sample_run: Make, tmp_path: Path, processes: int) -> None:
    """Oracle: the uninterrupted run. Twenty kills: at the start, between chunks, and while the file is put together."""
    changes = {"sample__num_images": 4000, "sample__batch_size": 10}
    whole, killed = sample_run(tmp_path / "whole", **changes), sample_run(tmp_path / "killed", **changes)
    assert main(whole) == 0

    def made() -> int:
        return len(list((tmp_path / "killed" / ".work").glob("samples-*/chunks/*/*.safetensors")))

    command = [*launcher(processes), "-m", "crt", *killed]
    struck = kill_and_repeat(command, made, 20, random.Random(processes), kills=20, end=400)
    assert struck >= 18  # the last ones may come too late
    assert file_of(killed).read_bytes() == file_of(whole).read_bytes()


def test_a_label_that_is_no_class_is_refused(sample_run: Make, capsys: pytest.CaptureFixture) -> None:
    assert main(sample_run(sample__labels=[0, 7])) == 2
    assert "sample.labels: 7 is not a class" in last_line(capsys)


def test_a_model_of_another_tokenizer_is_refused(
    sample_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(sample_run(tmp_path / "content", model={"tokenizer_content": "another"})) == 2
    assert "codes of another tokenizer" in last_line(capsys)
    assert main(sample_run(tmp_path / "size", model={"codebook_size": 40})) == 2
    assert "trained on 40 codes, the tokenizer has 32" in last_line(capsys)


def test_unknown_origins_are_accepted() -> None:
    """Imported models do not know their tokenizer's digest, an imported tokenizer has no manifest."""

    class Codes:
        codebook_size = 32

    sample.check_same_codes(small_config(tokenizer_content=None), Codes(), "digest")
    sample.check_same_codes(small_config(tokenizer_content="digest"), Codes(), None)
    with pytest.raises(UserError, match="another tokenizer"):
        sample.check_same_codes(small_config(tokenizer_content="digest"), Codes(), "other")


def test_too_little_gpu_memory_is_said_in_one_line(
    sample_run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Generator, "generate", run_out_of_memory)
    assert main(sample_run()) == 2
    line = "error: sample: out of GPU memory: lower sample.batch_size, or set sample.precision to bf16"
    assert last_line(capsys) == line


def test_images_are_decoded_by_algorithms_that_repeat(sample_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU cuDNN otherwise chooses by speed, and the same codes may become other pixels after a restart."""
    settings = []

    def decode(self: Tokenizer, *codes: Any) -> torch.Tensor:
        settings.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))
        return decode_codes(self, *codes)

    decode_codes = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", decode)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
        assert main(sample_run()) == 0
    assert set(settings) == {(True, False)}


def test_a_damaged_model_is_refused(sample_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = sample_run()
    weights = tmp_path / "ar" / "model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    assert main(command) == 2
    assert "model.safetensors: truncated or damaged" in last_line(capsys)
