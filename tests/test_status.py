"""What `python -m crt status` says of each stage. Oracle: which results were published, and which key was changed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from crt.__main__ import main
from crt.manifest import damaged_results, read_manifest
from crt.pipeline import load_stages, path_variables
from crt.stage import open_run, publish
from tests.conftest import ROOT, TINY, write_params


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's folder without any result, in which the command is run."""
    (tmp_path / "crt").mkdir()
    for name in ("dvc.yaml", "crt/stage_versions.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    write_params(tmp_path / "params.yaml", TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names: str, text: str = "") -> None:
    """Publish made-up results."""
    options = {path: key for key, path in path_variables().items()}
    for name in names:
        stage = load_stages()[name]
        run = open_run(name, "params.yaml", {options[path]: path for path in stage.inputs}, stage.output)
        run.staging.mkdir(parents=True)
        (run.staging / "file").write_text(name + text)
        publish(run)


def states(capsys: pytest.CaptureFixture) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}


def test_each_stage_is_current_or_not_made(project: Path, capsys: pytest.CaptureFixture) -> None:
    names = list(load_stages())
    assert main(["status"]) == 1
    assert states(capsys) == {name: f"not made  {stage.output}" for name, stage in load_stages().items()}
    make(*names[:-1])
    assert main(["status"]) == 1  # also where the last stage alone lacks
    told = states(capsys)
    assert told["evaluate"] == "not made  out/evaluation"
    for name in names[:-1]:
        folder = load_stages()[name].output
        assert told[name] == f"current   {folder} (recipe {read_manifest(folder).fingerprint[:16]})"
    make(names[-1])
    assert main(["status"]) == 0
    assert all(text.startswith("current ") for text in states(capsys).values())


def test_results_of_a_tokenizer_that_was_trained_again_are_told(project: Path, capsys: pytest.CaptureFixture) -> None:
    """Params are the same, bytes are not, as on a GPU or with other threads: both engines' stamps say nothing of it."""
    names = list(load_stages())
    make(*names)
    shutil.rmtree("out/tokenizer")
    make("train_tokenizer", text="again")
    assert main(["status"]) == 1
    told = states(capsys)
    assert [told[name].split()[0] for name in names] == ["current"] * 2 + ["stale"] * 4
    remedies = [
        f"{load_stages()[name].output}: was made from another train_tokenizer result than the one in out/tokenizer: "
        f"delete {load_stages()[name].output} and run `snakemake --cores all {name}` or `dvc repro {name}`"
        for name in names[2:]
    ]
    assert [told[name].split(maxsplit=1)[1] for name in names[2:]] == remedies
    stamps = [next(Path(stage.output).glob("complete-*")) for stage in load_stages().values()]
    assert damaged_results(stamps) == remedies
    for name in names[2:]:
        shutil.rmtree(load_stages()[name].output)
        make(name)
    assert main(["status"]) == 0


def test_a_stale_result_is_told_with_the_key_and_the_remedy(project: Path, capsys: pytest.CaptureFixture) -> None:
    make(*load_stages())
    write_params(project / "other.yaml", TINY | {"sample.guidance_scale": 3.0})
    assert main(["status", "--params", "other.yaml"]) == 1
    told = states(capsys)
    assert [name for name, text in told.items() if text.startswith("stale ")] == ["sample", "evaluate"]
    changed = r"sample was run with sample\.guidance_scale = [\d.]+, other\.yaml now says 3\.0: "
    for name, folder in (("sample", "out/samples"), ("evaluate", "out/evaluation")):
        assert re.match(rf"stale     {folder}: {changed}.*\b{name}\b", told[name])


def test_what_another_stage_made_is_not_current(project: Path, capsys: pytest.CaptureFixture) -> None:
    make(*load_stages())
    shutil.rmtree("out/tokens")
    shutil.copytree("out/samples", "out/tokens")
    assert main(["status"]) == 1
    told = states(capsys)
    assert re.match(r"stale     out/tokens: made by sample: move it away, and run .*\btokenize\b", told.pop("tokenize"))
    assert all(text.startswith("current ") for text in told.values())


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda out: (out / "file").write_bytes(bytes(8)), "out/evaluation/file: damaged: its content is not what"),
        (lambda out: shutil.rmtree(out) or shutil.copytree("out/samples", out), "out/evaluation: made by sample: move"),
    ],
    ids=["zeros", "another stage's"],
)
def test_results_of_a_spoiled_evaluation_are_one_line(
    project: Path, capsys: pytest.CaptureFixture, spoil, told
) -> None:
    make(*load_stages())
    spoil(Path("out/evaluation"))
    assert main(["results"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {told}") and error.count("\n") == 1


def test_a_file_in_the_place_of_a_result_is_not_called_absent(project: Path, capsys: pytest.CaptureFixture) -> None:
    Path("out").mkdir()
    Path("out/tokens").touch()
    assert main(["status"]) == 1
    assert states(capsys)["tokenize"].startswith(
        "stale     out/tokens: is not a folder: move it away, and make it with"
    )


def test_a_damaged_result_is_not_current_though_all_after_it_are(project: Path, capsys: pytest.CaptureFixture) -> None:
    make(*load_stages())
    Path("out/tokenizer/file").unlink()
    assert main(["status"]) == 1
    told = states(capsys)
    assert told.pop("train_tokenizer").startswith(
        "stale     out/tokenizer/file: is missing: delete out/tokenizer and run"
    )
    assert all(text.startswith("current ") for text in told.values())
