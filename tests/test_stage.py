"""The stage contract: what counts as a result, what is refused as an input, what a kill can leave behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest

from crt.__main__ import main
from crt.errors import UserError
from crt.manifest import MANIFEST, damaged_results, read_manifest
from crt.pipeline import stamp_name
from crt.snakemake_records import MAKE_ANEW
from crt.stage import clear_work, deletion_told, exclusive, open_run, publish, read_seconds
from tests.conftest import in_ascii_locale, raise_version, write_params


@pytest.fixture
def chain(tmp_path, params_file):
    """Publish made-up files as the results of the first three stages; returns a function that opens the next."""
    params = params_file()

    def make(name, inputs, text="x"):
        run = open_run(name, params, {key: tmp_path / key for key in inputs}, tmp_path / OUT[name])
        run.staging.mkdir(parents=True)
        (run.staging / "folder").mkdir()
        (run.staging / "folder" / "file.txt").write_text(text)
        run.summary["length"] = len(text)
        publish(run)
        return run

    make("prepare_data", ())
    make("train_tokenizer", ("data",))
    make("tokenize", ("data", "tokenizer"))
    return make, params


OUT = {"prepare_data": "data", "train_tokenizer": "tokenizer", "tokenize": "tokens", "train_ar": "ar"}


def test_published_folder_describes_itself(tmp_path, chain):
    manifest = read_manifest(tmp_path / "tokens")
    assert manifest.stage == "tokenize"
    assert set(manifest.params) == {"tokenize"}
    assert set(manifest.inputs) == {"prepare_data", "train_tokenizer"}
    assert set(manifest.inputs["train_tokenizer"]["params"]) == {"lambda", "seed", "train_tokenizer"}
    assert manifest.files["folder/file.txt"]["bytes"] == manifest.summary["length"] == 1
    assert not list((tmp_path / ".work").glob("*-*"))


def test_a_stage_is_handed_exactly_its_keys(tmp_path, chain):
    run = open_run("tokenize", chain[1], {k: tmp_path / k for k in ("data", "tokenizer")}, tmp_path / "tokens")
    assert run.params.tokenize.batch_size > 0
    with pytest.raises(AttributeError):
        run.params.seed  # noqa: B018


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"data": "tokens", "tokenizer": "tokenizer"},
            "tokens: made by tokenize: give --data the output folder of prepare_data",
        ),
        (
            {"data": "data", "tokenizer": "data"},
            "data: made by prepare_data: give --tokenizer the output folder of train_tokenizer",
        ),
    ],
)
def test_results_of_other_stages_than_the_options_name_are_refused(tmp_path, chain, inputs, message):
    with pytest.raises(UserError) as refused:
        open_run("tokenize", chain[1], {key: tmp_path / name for key, name in inputs.items()}, tmp_path / "out")
    assert message in str(refused.value)


def test_a_current_result_is_recognised_and_a_changed_one_is_not(tmp_path, chain):
    _make, params = chain

    def is_current():
        return open_run(
            "tokenize", params, {k: tmp_path / k for k in ("data", "tokenizer")}, tmp_path / "tokens"
        ).is_current()

    assert is_current()
    write_params(params, {"sample.guidance_scale": 9.0}, base=params)
    assert is_current()
    stamp = next((tmp_path / "tokens").glob("complete-*"))
    stamp.unlink()
    assert not is_current()
    stamp.touch()
    (tmp_path / "tokens" / "folder" / "file.txt").write_text("longer")
    assert not is_current()


def test_a_result_that_lost_only_its_stamp_is_no_work_lost(tmp_path, chain, monkeypatch):
    _make, params = chain

    def lacks_only_its_stamp():
        return open_run(
            "tokenize", params, {k: tmp_path / k for k in ("data", "tokenizer")}, tmp_path / "tokens"
        ).lacks_only_its_stamp()

    assert not lacks_only_its_stamp()
    run = open_run("tokenize", params, {k: tmp_path / k for k in ("data", "tokenizer")}, tmp_path / "tokens")
    (tmp_path / "tokens" / stamp_name(run.fingerprint)).unlink()
    assert lacks_only_its_stamp()
    with monkeypatch.context() as patch:
        patch.setenv(MAKE_ANEW, "1")
        assert not lacks_only_its_stamp()
        patch.setattr("crt.slurm.was_requeued", lambda: True)
        assert lacks_only_its_stamp()
        # A run that was to make it anew, and was stopped.
        run.staging.mkdir(parents=True)
        assert not lacks_only_its_stamp()
    assert not lacks_only_its_stamp()
    run.staging.rmdir()
    assert lacks_only_its_stamp()
    # The complete result of other params has another stamp.
    text = params.read_text()
    write_params(params, {"tokenize.batch_size": 77}, base=params)
    assert not lacks_only_its_stamp()
    params.write_text(text)
    (tmp_path / "tokens" / "folder" / "file.txt").write_text("longer")
    assert not lacks_only_its_stamp()


def test_inputs_made_with_other_params_are_refused_with_the_command_that_renews_them(tmp_path, chain):
    _make, params = chain
    write_params(params, {"lambda": 0.75}, base=params)
    with pytest.raises(UserError) as caught:
        open_run("train_ar", params, {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    assert str(caught.value) == (
        f"{tmp_path}/tokens: stale: train_tokenizer was run with lambda = 0.5, {params} now says 0.75: "
        "renew it with `snakemake --cores all tokenize` or `dvc repro tokenize` "
        "(`dvc repro -f -s tokenize` where DVC skips it)"
    )


@pytest.mark.parametrize("raised", ["prepare_data", "train_tokenizer", "tokenize"])
def test_inputs_made_by_an_earlier_version_of_any_stage_before_are_refused(tmp_path, chain, monkeypatch, raised):
    (tmp_path / "crt").mkdir()
    shutil.copy("dvc.yaml", tmp_path)
    raise_version(raised, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    assert f"{tmp_path}/tokens: stale: made by an earlier version of stage {raised}: renew it" in str(caught.value)


def test_inputs_from_before_a_key_was_introduced_are_refused(tmp_path, chain):
    path = tmp_path / "tokens" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["inputs"]["train_tokenizer"]["params"]["train_tokenizer"]["min_crop"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"train_tokenizer was run with train_tokenizer\.min_crop = null, "):
        open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "ar")


def test_inputs_from_before_a_key_was_removed_are_refused(tmp_path, chain):
    path = tmp_path / "tokens" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["inputs"]["train_tokenizer"]["params"]["train_tokenizer"]["old_key"] = 3
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"train_tokenizer was run with train_tokenizer\.old_key = 3, .* says null"):
        open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "ar")


def test_what_is_missing_or_damaged_is_told_with_the_stage_that_makes_it(tmp_path, chain, monkeypatch):
    (tmp_path / "out").mkdir()
    shutil.move(tmp_path / "tokens", tmp_path / "out" / "tokens")
    shutil.copy("dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^out/ar: not found: make it first with `snakemake --cores all train_ar` or "):
        read_manifest("out/ar")
    stamps = [next((tmp_path / "out/tokens").glob("complete-*")), tmp_path / "out/ar/complete-0123456789abcdef"]
    assert damaged_results(stamps) == []
    (tmp_path / "out/tokens" / MANIFEST).write_text("{")
    (line,) = damaged_results([stamp.relative_to(tmp_path) for stamp in stamps])
    assert line.startswith(f"out/tokens/{MANIFEST}: missing or damaged: delete out/tokens and run ")
    assert "`snakemake --cores all tokenize` or `dvc repro tokenize`" in line


def test_a_key_of_a_later_stage_does_not_matter(tmp_path, chain):
    _make, params = chain
    write_params(params, {"train_ar.steps": 7, "evaluate.batch_size": 5}, base=params)
    open_run("train_ar", params, {"tokens": tmp_path / "tokens"}, tmp_path / "ar")


def test_codes_of_another_tokenizer_are_refused(tmp_path, chain):
    make, params = chain
    shutil.rmtree(tmp_path / "tokenizer")
    make("train_tokenizer", ("data",), text="trained again, with other weights")
    with pytest.raises(UserError, match="tokens: was made from another train_tokenizer result"):
        open_run(
            "evaluate", params, {k: tmp_path / k for k in ("data", "tokenizer", "tokens")}, tmp_path / "evaluation"
        )


def test_a_model_of_another_tokenizers_codes_is_refused(tmp_path, chain):
    """Two steps away: the tokenizer made the codes that the model was trained on."""
    make, params = chain
    make("train_ar", ("tokens",))
    shutil.rmtree(tmp_path / "tokenizer")
    make("train_tokenizer", ("data",), text="trained again, with other weights")
    with pytest.raises(UserError, match="ar: was made from another train_tokenizer result"):
        open_run("sample", params, {key: tmp_path / key for key in ("tokenizer", "ar")}, tmp_path / "samples")


def rewrite_manifest(folder, **changes):
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, "not found: make it first with"),
        (lambda folder: (folder / MANIFEST).unlink(), "missing or damaged"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "missing or damaged"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "missing or damaged"),
        (partial(rewrite_manifest, fingerprint=1), "missing or damaged"),
        (partial(rewrite_manifest, params=[]), "missing or damaged"),
        (partial(rewrite_manifest, files={"a": 1}), "missing or damaged"),
        (partial(rewrite_manifest, files={"a": {"bytes": 1}}), "missing or damaged"),
        (partial(rewrite_manifest, inputs={"prepare_data": {}}), "missing or damaged"),
        (partial(rewrite_manifest, inputs={"prepare_data": "text"}), "missing or damaged"),
        (lambda folder: next(folder.glob("complete-*")).unlink(), "incomplete, no stamp"),
        (lambda folder: (folder / "folder" / "file.txt").unlink(), "file.txt: is missing"),
        (lambda folder: (folder / "folder" / "file.txt").write_text(""), "has 0 bytes instead of 1"),
    ],
)
def test_damaged_inputs_are_refused_in_one_line(tmp_path, chain, damage, expected):
    damage(tmp_path / "tokens")
    with pytest.raises(UserError) as caught:
        open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_imported_model_is_no_input_of_a_stage_and_is_not_to_be_deleted(tmp_path, chain):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model: an imported model, for the library .*`Generator.load`") as caught:
        open_run("sample", chain[1], {"tokenizer": tmp_path / "tokenizer", "ar": model}, tmp_path / "samples")
    assert "\n" not in str(caught.value)
    assert "delete" not in str(caught.value)
    # A stage's own result has a stamp, whatever became of its manifest.
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    (tmp_path / "tokenizer" / MANIFEST).unlink()
    with pytest.raises(UserError, match="missing or damaged: delete"):
        read_manifest(tmp_path / "tokenizer")


@pytest.mark.parametrize("schema", [0, 99])
def test_a_manifest_of_another_schema_is_refused(tmp_path, chain, schema):
    path = tmp_path / "tokens" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": schema}))
    with pytest.raises(UserError, match=f"has schema {schema}, this version reads 1"):
        read_manifest(tmp_path / "tokens")


def test_only_one_process_writes_an_output(tmp_path, chain):
    run = open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    again = open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    with exclusive(run), pytest.raises(UserError, match="another process is writing it"), exclusive(again):
        pass
    with exclusive(again):
        pass


def test_a_job_goes_back_into_the_queue_behind_the_one_that_writes_its_output(tmp_path, chain, monkeypatch):
    """A script answers for Slurm."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho BatchFlag=1 Requeue=1 JobState=RUNNING\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    handler = signal.getsignal(signal.SIGTERM)
    run = open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    again = open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    try:
        for holder in ("8", "9"):
            monkeypatch.setenv("SLURM_JOB_ID", holder)
            with exclusive(run):
                monkeypatch.setenv("SLURM_JOB_ID", "10")
                with pytest.raises(UserError) as caught, exclusive(again):
                    pass
            assert str(caught.value) == (
                f"{tmp_path}/ar: Slurm job {holder} is writing it: job 10 goes back into the queue until that has ended"
            )
        # A process outside of Slurm holds it after a job did.
        monkeypatch.delenv("SLURM_JOB_ID")
        with exclusive(run):
            monkeypatch.setenv("SLURM_JOB_ID", "10")
            with pytest.raises(UserError, match="another process is writing it"), exclusive(again):
                pass
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_the_result_to_be_replaced_is_not_read_however_it_is_called(tmp_path, chain, monkeypatch):
    out = os.path.relpath(tmp_path / "ar")  # as in dvc.yaml, from the project's root
    run = open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, out)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "ar")
    for folder in (out, str(tmp_path / "ar"), str(tmp_path / "link"), "~/ar"):
        with pytest.raises(UserError, match=f"^train_ar.init_from: {folder} is where train_ar puts its result"):
            run.refuse_own_output("train_ar.init_from", folder)
    for folder in (None, "ar", str(tmp_path / "tokens")):
        run.refuse_own_output("train_ar.init_from", folder)


def test_what_a_kill_left_of_a_published_run_is_removed(tmp_path, chain):
    make, params = chain
    run = make("train_ar", ("tokens",))
    (run.work / "replaced").mkdir(parents=True)
    again = open_run("train_ar", params, {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    with exclusive(run):  # another process that is still publishing
        clear_work(again)
        assert run.work.exists()
    clear_work(again)
    assert not run.work.exists()
    # What is not current needs its working folder.
    run.work.mkdir()
    next((tmp_path / "ar").glob("complete-*")).unlink()
    clear_work(again)
    assert run.work.exists()


def test_work_that_cannot_be_removed_yet_does_not_fail_a_published_run(tmp_path, chain, monkeypatch):
    """As on NFS, where a file that is still open keeps its folder."""
    make, params = chain

    def refused(*_, **__):
        raise OSError(errno.ENOTEMPTY, "not empty")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refused)
        run = make("train_ar", ("tokens",))
        assert read_manifest(run.out).stage == "train_ar"
        assert run.work.exists()
    clear_work(open_run("train_ar", params, {"tokens": tmp_path / "tokens"}, tmp_path / "ar"))
    assert not run.work.exists()


def test_working_state_of_other_params_is_not_resumed(tmp_path, chain):
    _make, params = chain
    first = open_run("train_ar", params, {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    write_params(params, {"seed": 1}, base=params)
    with pytest.raises(UserError, match="seed = 0"):
        open_run("train_ar", params, {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    write_params(params, {"seed": 0, "train_ar.steps": 9}, base=params)
    second = open_run("train_ar", params, {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    assert first.work != second.work


def test_publishing_replaces_the_old_result_as_a_whole(tmp_path, chain):
    make, _params = chain
    (tmp_path / "tokens" / "left over").touch()
    make("tokenize", ("data", "tokenizer"), text="new")
    assert (tmp_path / "tokens" / "folder" / "file.txt").read_text() == "new"
    assert not (tmp_path / "tokens" / "left over").exists()


def test_a_result_appears_with_all_that_belongs_to_it(tmp_path, chain, monkeypatch):
    """Beside what an earlier attempt, killed at this point, had put aside; oracle: what is renamed to the output."""
    run = open_run("tokenize", chain[1], {k: tmp_path / k for k in ("data", "tokenizer")}, tmp_path / "tokens")
    (run.work / "replaced" / "older").mkdir(parents=True)
    run.staging.mkdir()
    (run.staging / "codes").touch()
    appeared, rename = {}, os.replace

    def noted(source, target):
        appeared[target] = sorted(os.listdir(source)) if os.path.isdir(source) else None
        rename(source, target)

    monkeypatch.setattr(os, "replace", noted)
    publish(run)
    assert appeared[run.out] == ["codes", stamp_name(run.fingerprint), MANIFEST]


def test_working_state_of_other_inputs_is_not_resumed(tmp_path, chain):
    make, params = chain
    first = open_run("tokenize", params, {k: tmp_path / k for k in ("data", "tokenizer")}, tmp_path / "tokens")
    shutil.rmtree(tmp_path / "tokenizer")
    make("train_tokenizer", ("data",), text="trained again under the same recipe")
    second = open_run("tokenize", params, {k: tmp_path / k for k in ("data", "tokenizer")}, tmp_path / "tokens")
    assert first.fingerprint == second.fingerprint
    assert first.work != second.work
    assert first.is_current() and not second.is_current()


def test_a_run_that_was_killed_while_it_published_ends_with_the_same_manifest(tmp_path, chain, monkeypatch):
    """What the first attempt had put beside the files is none of them."""
    make, params = chain
    manifest = (tmp_path / "tokens" / MANIFEST).read_bytes()
    shutil.rmtree(tmp_path / "tokens")
    with monkeypatch.context() as patch:
        patch.setattr("crt.stage.shutil.rmtree", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make("tokenize", ("data", "tokenizer"))
    run = open_run("tokenize", params, {k: tmp_path / k for k in ("data", "tokenizer")}, tmp_path / "tokens")
    assert (run.staging / MANIFEST).exists() and (run.staging / stamp_name(run.fingerprint)).exists()
    run.summary["length"] = 1
    publish(run)
    assert (tmp_path / "tokens" / MANIFEST).read_bytes() == manifest


def test_what_fails_after_the_result_appeared_is_told_as_it_is(tmp_path, chain, monkeypatch):
    """Its working folder is gone then, too, but nobody deleted it."""
    run = open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    run.staging.mkdir(parents=True)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("crt.stage.publish_metrics", mock.Mock(side_effect=full))
    with pytest.raises(OSError, match=full.strerror), deletion_told(run):
        publish(run)


@pytest.mark.parametrize(("text", "status"), [("another", 2), ("x", 0), (None, 0)], ids=["other", "same", "deleted"])
def test_nothing_is_published_of_inputs_that_were_replaced_meanwhile(
    tmp_path, chain, monkeypatch, capsys, text, status
):
    """Another engine may make them anew; where that gives the same bytes, or none, no work is lost."""
    make, params = chain
    shutil.rmtree(tmp_path / "tokens")

    def work(run):
        (run.staging / "codes").write_text("x")
        shutil.rmtree(tmp_path / "tokenizer")
        if text:
            make("train_tokenizer", ("data",), text=text)

    monkeypatch.setattr("crt.__main__.import_large", lambda name: SimpleNamespace(run=work))
    inputs = ["--data", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["tokenize", "--params", str(params), *inputs, "--out", str(tmp_path / "tokens")]) == status
    assert (tmp_path / "tokens").exists() == (status == 0)
    assert not list((tmp_path / ".work").glob("tokens-*"))
    if status:
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: {tmp_path}/tokenizer: was replaced while tokenize ran, in vain: run the same command again"
        )


def test_wall_times_are_kept_beside_the_result_and_change_no_digest(tmp_path, params_file, monkeypatch):
    """Oracle: the same result without its page of times, and the clock."""
    clock = [100.0]
    monkeypatch.setattr("crt.stage.time.monotonic", lambda: clock[0])
    params, contents = params_file(), []
    for text in ("took 5 s", "took 7 s"):
        run = open_run("prepare_data", params, {}, tmp_path / "data")
        run.staging.mkdir(parents=True)
        (run.staging / "result").write_text("the same")
        (run.staging / "page").write_text(text)
        run.started = clock[0]
        clock[0] += 5
        run.note_seconds()  # as if stopped here
        run = open_run("prepare_data", params, {}, tmp_path / "data")
        run.timed_files.add("page")
        run.started = clock[0]
        clock[0] += 2
        manifest = publish(run)
        contents.append(manifest.content)
        assert manifest.files["page"]["bytes"] == len(text)
        assert read_seconds(tmp_path / "data", run.fingerprint) == 7
        assert read_seconds(tmp_path / "data", "another recipe") is None
    assert contents[0] == contents[1]
    assert read_seconds(tmp_path / "elsewhere", run.fingerprint) is None


def test_a_time_that_cannot_be_noted_or_read_hides_nothing(tmp_path, params_file):
    run = open_run("prepare_data", params_file(), {}, tmp_path / "data")
    run.note_seconds()  # stopped before it had a folder
    run.work.mkdir(parents=True)
    for damaged in ("", "{", "null"):
        (run.work / "seconds.json").write_text(damaged)
        assert run.seconds_before() == 0
    run.note_seconds()
    assert run.seconds_before() > 0


def thesis(out):
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")


def foreign_manifest(out):
    thesis(out)
    (out / MANIFEST).write_text('{"name": "of a web page", "version": 1}')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (thesis, "exists and is not a stage's output: choose another folder, or empty it"),
        (foreign_manifest, "exists and is not a stage's output"),
        (lambda out: out.write_text("years of work"), "exists and is a file: choose another folder"),
    ],
)
def test_what_no_stage_made_is_never_replaced(tmp_path, chain, make, message):
    run = open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    run.staging.mkdir(parents=True)
    make(tmp_path / "ar")
    with pytest.raises(UserError, match=f"^{tmp_path}/ar: {message}"):
        open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "ar")
    # It may also appear while the stage runs.
    with pytest.raises(UserError, match=f"^{tmp_path}/ar: {message}"):
        publish(run)
    kept = tmp_path / "ar" / "thesis.txt" if (tmp_path / "ar").is_dir() else tmp_path / "ar"
    assert kept.read_text() == "years of work"


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / MANIFEST).unlink(),
        lambda out: (out / MANIFEST).write_text("{"),
        lambda out: next(out.glob("complete-*")).unlink(),
        lambda out: [next(out.glob("complete-*")).unlink(), os.truncate(out / MANIFEST, 100)],
        lambda out: [shutil.rmtree(out), out.mkdir()],
        lambda out: [shutil.rmtree(out), out.mkdir(), (out / ".gitignore").touch(), (out / ".nfs0001").touch()],
    ],
    ids=["no manifest", "damaged manifest", "no stamp", "no stamp and a manifest cut short", "empty", "hidden"],
)
def test_a_damaged_result_or_an_empty_folder_is_replaced(tmp_path, chain, damage):
    make, _params = chain
    damage(tmp_path / "tokens")
    make("tokenize", ("data", "tokenizer"), text="new")
    assert (read_manifest(tmp_path / "tokens").summary["length"]) == 3


@pytest.mark.parametrize(("out", "held"), [("tokens", "tokens"), ("", "params.yaml"), ("link", "tokens")])
def test_an_output_that_is_or_holds_an_input_is_refused(tmp_path, chain, out, held):
    (tmp_path / "link").symlink_to(tmp_path / "tokens")
    with pytest.raises(UserError, match=f"would be replaced, but is or holds {tmp_path}/{held} "):
        open_run("train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / out)


def test_an_output_that_holds_what_runs_share_is_refused(tmp_path, chain):
    with pytest.raises(UserError, match=f"would be replaced, but is or holds {tmp_path}/out/shared .--shared.: choose"):
        open_run(
            "train_ar", chain[1], {"tokens": tmp_path / "tokens"}, tmp_path / "out", shared=tmp_path / "out/shared"
        )


def test_a_link_to_the_output_stays_and_the_work_is_done_beside_what_it_names(tmp_path, chain):
    make, params = chain
    (tmp_path / "disk").mkdir()
    shutil.move(tmp_path / "tokens", tmp_path / "disk" / "codes")
    (tmp_path / "tokens").symlink_to(tmp_path / "disk" / "codes")
    run = make("tokenize", ("data", "tokenizer"), text="new")
    assert run.work.parent == tmp_path / "disk" / ".work"
    assert (tmp_path / "tokens").is_symlink()
    assert (tmp_path / "disk" / "codes" / "folder" / "file.txt").read_text() == "new"
    assert read_seconds(tmp_path / "tokens", run.fingerprint) is not None
    again = open_run("tokenize", params, {k: tmp_path / k for k in ("data", "tokenizer")}, tmp_path / "tokens")
    assert again.is_current()
    direct = open_run("tokenize", params, {k: tmp_path / k for k in ("data", "tokenizer")}, tmp_path / "disk" / "codes")
    with exclusive(again), pytest.raises(UserError, match="another process is writing it"), exclusive(direct):
        pass
    # A link to a folder that is still to be made.
    shutil.rmtree(tmp_path / "disk" / "codes")
    make("tokenize", ("data", "tokenizer"))
    assert (tmp_path / "disk" / "codes" / MANIFEST).exists()


def test_metrics_are_also_written_into_a_folder_that_is_still_to_be_made(tmp_path, params_file):
    metrics = tmp_path / "new" / "metrics.json"
    run = open_run("prepare_data", params_file(), {}, tmp_path / "data", metrics)
    run.staging.mkdir(parents=True)
    (run.staging / "metrics.json").write_text('{"psnr": 20}')
    publish(run)
    assert json.loads(metrics.read_text()) == {"psnr": 20}
    run.staging.mkdir(parents=True)
    (run.staging / "metrics.json").write_text('{"psnr": 21}')
    publish(run)
    assert json.loads(metrics.read_text()) == {"psnr": 21}


def test_metrics_are_copied_as_they_are_in_every_locale(tmp_path):
    (tmp_path / "metrics.json").write_text('{"warnings": "ä"}', encoding="utf-8")
    in_ascii_locale(
        "-c",
        f"from pathlib import Path; from types import SimpleNamespace; from crt.stage import publish_metrics\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "publish_metrics(SimpleNamespace(out=folder, metrics=folder / 'copy.json'))",
    )
    assert json.loads((tmp_path / "copy.json").read_text(encoding="utf-8")) == {"warnings": "ä"}
