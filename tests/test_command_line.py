"""`python -m crt` as a user meets it: exit statuses, one-line errors, disks that are full or cannot be written."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from crt.__main__ import COMMANDS, STAGES, main
from crt.manifest import check_content, read_manifest
from crt.pipeline import load_stages
from crt.processes import free_port
from crt.snakemake_records import MAKE_ANEW
from crt.stage import exclusive, open_run, publish
from tests.conftest import ROOT
from tests.tokens.caches import make_header, random_codes, write_cache


def on_a_disk_of_its_own(script: str, folder) -> str:
    """Run a shell script where it may mount file systems, as any user may in a namespace; skips where not."""
    folder.mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip(f"no file system of its own can be mounted here: {result.stderr.strip()}")
    return result.stdout + result.stderr


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(params_file, tmp_path):
    params, disk = params_file(prepare_data__max_images_per_class=None), tmp_path / "disk"
    command = f"{sys.executable} -m crt prepare_data --params {params} --out {disk}/prepared"
    text = on_a_disk_of_its_own(
        f"""mount -t tmpfs -o size=600k none {disk} || exit 99
        {command}; echo "status $?"; ls {disk}/prepared
        mount -o remount,size=50m {disk}
        {command}; echo "status $?"; cp -r {disk}/prepared {tmp_path}/copy""",
        disk,
    )
    assert "status 2" in text
    assert "status 0" in text
    assert "No space left on device: free some space and run the same command again" in text
    assert "Traceback" not in text
    assert read_manifest(tmp_path / "copy").summary["train_images"] > 1000


@pytest.mark.parametrize("stage", ["prepare_data", "train_tokenizer"])
def test_a_folder_that_cannot_be_written_is_one_line(params_file, tmp_path, stage):
    params, disk, data = params_file(), tmp_path / "disk", tmp_path / "data"
    assert main(["prepare_data", "--params", str(params), "--out", str(data)]) == 0
    inputs = f"--data {data}" if stage == "train_tokenizer" else ""
    text = on_a_disk_of_its_own(
        f"""mount -t tmpfs none {disk} && mount -o remount,ro {disk} || exit 99
        {sys.executable} -m crt {stage} --params {params} {inputs} --out {disk}/out; echo "status $?" """,
        disk,
    )
    assert "status 2" in text
    assert "Read-only file system: choose a folder that can be written" in text
    assert "Traceback" not in text


def test_a_folder_that_somebody_deletes_while_a_stage_trains_is_one_line(params_file, tmp_path):
    """DVCLive and its libraries, at work in that folder, have nothing to add. To them a rename is as a deletion."""
    params, data, out = params_file(train_tokenizer__steps=10_000), tmp_path / "data", tmp_path / "out" / "tokenizer"
    assert main(["prepare_data", "--params", str(params), "--out", str(data)]) == 0
    command = ["train_tokenizer", "--params", str(params), "--data", str(data), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "crt", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("out/.work/tokenizer-*/checkpoint.pt")):
        time.sleep(0.05)
    (work,) = tmp_path.glob("out/.work/tokenizer-*")
    (tmp_path / "out").rename(tmp_path / "gone")
    lines = process.communicate()[1].splitlines()
    assert process.returncode == 2
    assert lines[-1] == f"error: {work}: was deleted while train_tokenizer ran: run the same command again"
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize(("place", "is_told"), [("crt.stage.write_json", True), ("crt.stage.publish_metrics", False)])
def test_a_deleted_folder_is_told_up_to_the_result_and_not_after_it(counted, monkeypatch, capsys, place, is_told):
    """With its last rename the folder is gone as well."""
    command, runs = counted

    def fails(*_arguments):
        shutil.rmtree(runs[0] / "staging", ignore_errors=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(place, fails)
    assert main(command) == 2
    assert ("was deleted" if is_told else "No space left") in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EMFILE, "Too many open files: raise the limit (`ulimit -n`)"),
        (errno.EBUSY, "Device or resource busy: end what uses it, or choose another folder"),
        (errno.EIO, "Input/output error: check its disk or network"),
        (errno.ESTALE, "Stale file handle: check its network file system"),
        (errno.ENOLCK, "No locks available: choose a folder on a file system with locks"),
        (errno.ENOTDIR, "Not a directory: move the file away that stands in place of a folder"),
        (errno.EISDIR, "Is a directory: move the folder away that stands in place of a file"),
        (errno.ENOMEM, "Cannot allocate memory: free some memory, or raise its limit (`ulimit -v`, the job's)"),
        (errno.EAGAIN, "Resource temporarily unavailable: raise the limit of processes (`ulimit -u`)"),
    ],
)
def test_what_a_file_system_refuses_is_one_line(params_file, tmp_path, monkeypatch, capsys, code, remedy):
    def refused(run):
        raise OSError(code, os.strerror(code), "data/file")

    monkeypatch.setattr("crt.stages.prepare_data.run", refused)
    assert main(["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]) == 2
    expected = f"error: data/file: {remedy} and run the same command again; finished work is kept"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_a_pool_without_a_thread_is_one_line(params_file, tmp_path, monkeypatch, capsys):
    """Under `ulimit -u`: the pool raises another error while it is shut down."""

    def without_threads(run):
        try:
            raise RuntimeError("can't start new thread")
        finally:
            raise RuntimeError("cannot join thread before it is started")

    monkeypatch.setattr("crt.stages.prepare_data.run", without_threads)
    assert main(["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]) == 2
    assert "raise the limit of processes (`ulimit -u`) and run" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_behind_the_error_of_a_library_is_one_line(params_file, tmp_path, monkeypatch, capsys):
    """As torch's writer does: it raises again, in other words, while it closes the file that could not be written."""

    def full(run):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1459136 vs 1459024")

    monkeypatch.setattr("crt.stages.prepare_data.run", full)
    assert main(["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]) == 2
    assert "data: No space left on device: free some space and run" in capsys.readouterr().err


def test_a_copy_that_finds_no_space_names_the_file_that_it_writes(params_file, tmp_path, monkeypatch, capsys):
    """As DeepSpeed copies a script of its own beside each checkpoint. A limit of sizes is as a full disk."""
    (tmp_path / "from").write_bytes(bytes(2**14))

    def full(run):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, before[1]))
        try:
            shutil.copyfile(tmp_path / "from", tmp_path / "to")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr("crt.stages.prepare_data.run", full)
    assert main(["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]) == 2
    assert f"error: {tmp_path / 'to'}: File too large: raise the limit" in capsys.readouterr().err


def test_a_file_that_hdf5_could_not_write_does_not_crash_the_process(params_file, tmp_path):
    """With datasets in hand when the file is closed. A limit of sizes is as a full disk, with another number."""
    code = """if True:
        import resource, sys, h5py, numpy
        from crt.__main__ import main
        from crt.launch import leave
        import crt.stages.prepare_data

        def run(run):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))
            with h5py.File(run.staging / "a.h5", "w", libver=("v110", "v110")) as file:
                images = file.create_dataset("images", (60, 16, 16, 3), numpy.uint8)
                codes = file.create_dataset("codes", (60, 16), numpy.uint16)
                images[:], codes[:] = 1, 1

        crt.stages.prepare_data.run = run
        leave(main(sys.argv[1:]))"""
    command = ["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/data: File too large: raise the limit")
    assert done.returncode == 2


@pytest.mark.parametrize(("code", "name"), [(errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Disk quota")])
def test_a_disk_that_torch_writes_by_itself_is_asked_what_is_wrong(
    params_file, tmp_path, monkeypatch, capsys, code, name
):
    """Given a path, as by DeepSpeed, its writer in C++ tells no number at all. Oracle: what a write ends with."""

    def full(run):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0")

    def refused(dir):
        raise OSError(code, os.strerror(code))

    command = ["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]
    monkeypatch.setattr("crt.stages.prepare_data.run", full)
    assert main(command) == 1
    monkeypatch.setattr("crt.system_errors.tempfile.TemporaryFile", refused)
    assert main(command) == 2
    assert f"error: {tmp_path / 'data'}: {name}" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_torch_could_not_close_on_a_full_disk_is_one_line(params_file, tmp_path, monkeypatch, capsys):
    """As when the disk is full before the last bytes, which its writer keeps until then."""
    command = ["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]
    monkeypatch.setattr("crt.stages.prepare_data.run", lambda run: torch.save(torch.zeros(9), "/dev/full"))
    monkeypatch.setattr("crt.system_errors._write_error", lambda folder: errno.ENOSPC)
    assert main(command) == 2
    assert f"error: {tmp_path / 'data'}: No space left on device: free" in capsys.readouterr().err.splitlines()[-1]


def test_a_limit_of_sizes_that_torch_met_by_itself_is_told(tmp_path):
    code = f"""if True:
        import resource
        from pathlib import Path
        from crt.system_errors import _write_error
        print(_write_error(Path({str(tmp_path)!r})))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**24, 2**24))
        print(_write_error(Path({str(tmp_path)!r})))"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert said.split() == ["None", str(errno.EFBIG)]


def test_a_disk_that_is_full_for_one_process_of_several_is_no_error_of_the_program_in_the_others(params_file, tmp_path):
    """They meet the end of that one's connections, in the library's words."""
    code = """if True:
        import errno, os, sys, torch
        from crt.__main__ import main
        from crt.distributed import join_world
        from crt.launch import leave
        import crt.stages.prepare_data

        def run(run):
            with join_world() as world:
                torch.distributed.all_reduce(torch.zeros(1))
                if not world.is_main:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")
                torch.distributed.all_reduce(torch.zeros(1))

        crt.stages.prepare_data.run = run
        leave(main(sys.argv[1:]))"""
    command = ["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, *command],
            cwd=ROOT,
            env=os.environ | place | {"RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    last = [process.communicate()[1].splitlines()[-1] for process in both]
    assert last[0].startswith("error: another process of this stage has ended: do what its own message says")
    assert last[1].startswith("[rank 1] error: file: No space left on device: free some space")
    assert [process.returncode for process in both] == [2, 2]


def test_a_library_for_which_there_is_no_memory_is_one_line(params_file, tmp_path, monkeypatch, capsys):
    def full(run):
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setattr("crt.stages.prepare_data.run", full)
    assert main(["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: out of memory: free some, or raise its limit")


def test_no_folder_for_temporary_files_is_one_line(params_file, tmp_path, monkeypatch, capsys):
    """None is left where the disk is full that holds /tmp and the project both; torch and Matplotlib ask for one."""
    command = ["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]
    monkeypatch.setattr("crt.stages.prepare_data.run", lambda run: tempfile.mkdtemp())
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    assert main(command) == 2
    told = "error: no folder for temporary files can be written: free some space in /tmp, or set TMPDIR to another, and"
    assert capsys.readouterr().err.splitlines()[-1].startswith(told)

    def as_matplotlib_does(run):
        try:
            tempfile.mkdtemp()
        except OSError as error:
            raise OSError("Matplotlib requires access to a writable cache directory") from error

    monkeypatch.setattr("crt.stages.prepare_data.run", as_matplotlib_does)
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(told)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [("check --params nowhere", 2), ("check --params params.yaml >/dev/full", 2), ("check --params params.yaml", 0)],
)
def test_messages_for_which_a_disk_has_no_room_do_not_change_the_status(arguments, status):
    command = f"{sys.executable} -m crt {arguments} 2>/dev/full"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, check=False).returncode == status


def test_a_current_result_is_current_though_there_is_no_room_to_say_so(params_file, tmp_path):
    command = ["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]
    assert main(command) == 0
    with open("/dev/full", "w") as full:
        again = [sys.executable, "-m", "crt", *command]
        assert subprocess.run(again, cwd=ROOT, stderr=full, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status"), [("check --params params.yaml", 0), ("check --params nowhere", 2), ("--help", 0)]
)
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(arguments, status, closed):
    command = f"{sys.executable} -m crt {arguments} {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    if closed == "2>&-":
        assert not done.stderr
        assert bool(done.stdout) == (status == 0)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_is_printed_to_a_full_disk_is_one_line(unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "crt", "check"],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: output: No space left on device: free some space")


def test_a_stage_without_streams_writes_none_of_what_it_says_into_its_files(params_file, tmp_path):
    command = f"{sys.executable} -m crt prepare_data --params {params_file()} --out {tmp_path}/data <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, check=False).returncode == 0
    check_content(tmp_path / "data")
    assert "done in" in (tmp_path / "data.log").read_text()
    # Which is the log that engines show.
    assert replace(load_stages(ROOT)["prepare_data"], output=f"{tmp_path}/data").log == f"{tmp_path}/data.log"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sample__num_images": 1}, "num_images: evaluate needs two images at least, got 1: raise it"),
        ({"sample__labels": [9, 10]}, "labels: 10 is not a class: digits has classes 0 to 9"),
    ],
)
def test_check_refuses_what_only_the_last_stages_would(params_file, capsys, changes, expected):
    path = params_file(**changes)
    assert main(["check", "--params", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: sample.{expected}\n"
    assert main(["check", "--params", str(params_file(sample__num_images=2, sample__labels=[9]))]) == 0


def test_what_a_command_does_not_know_is_told_with_its_own_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", "params.yaml"])
    assert ended.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: python -m crt check ") and error.endswith("unrecognized arguments: params.yaml")


def test_outside_the_project_the_remedy_is_to_go_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check"]) == 2
    assert "params.yaml: cannot be read (No such file or directory): run from the project's root folder" in (
        capsys.readouterr().err
    )
    # Where its data are, the graph says.
    assert main(["evaluator_check"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: dvc.yaml: not found: run from the project's root folder")


@pytest.mark.parametrize("command", [*STAGES, *COMMANDS])
def test_help_is_given_outside_the_project_too(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m crt {command}" in capsys.readouterr().out


def test_a_mount_point_is_refused_before_any_work(params_file, tmp_path):
    params, disk = params_file(), tmp_path / "disk"
    text = on_a_disk_of_its_own(
        f"""mount -t tmpfs none {disk} || exit 99
        {sys.executable} -m crt prepare_data --params {params} --out {disk}; echo "status $?" """,
        disk,
    )
    # The helper puts what went to stderr last.
    assert text.splitlines() == [
        "status 2",
        f"error: {disk}: is a mount point, which cannot be replaced: name a folder in it, or make a link to one",
    ]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "--out .: is replaced as a whole: name a folder for this result alone"),
        ("crt/..", "--out crt/..: is replaced as a whole"),
        ("/", "--out /: is replaced as a whole"),
        ("{tmp}/file/x", "{tmp}/file: is a file, so {tmp}/file/x cannot be made: choose another folder"),
        ("{tmp}/link/x", "{tmp}/link: is not a folder: move it away, or choose another place"),
        ("{tmp}/" + 300 * "x", "{tmp}/" + 300 * "x" + ": File name too long: choose a shorter name"),
        ("/proc/foo", "/proc: no folder can be made in it: choose another place than /proc/"),
        ("/proc/foo/bar", "/proc: no folder can be made in it: choose another place than /proc/foo"),
        ("{tmp}/images", "{tmp}/images: would be replaced, but is or holds {tmp}/images (prepare_data.path): choose"),
    ],
)
def test_an_output_that_cannot_be_one_is_refused_in_one_line(params_file, tmp_path, capsys, out, message):
    (tmp_path / "file").touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    params = params_file(prepare_data__source="imagefolder", prepare_data__path=str(tmp_path / "images"))
    before = sorted(tmp_path.iterdir())
    assert main(["prepare_data", "--params", str(params), "--out", out.format(tmp=tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message.format(tmp=tmp_path)}")
    assert sorted(tmp_path.iterdir()) == before


def test_a_stage_outside_the_projects_folder_says_where_to_run_it(params_file, tmp_path, monkeypatch, capsys):
    command = ["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    where = "run from the project's root folder, where dvc.yaml stands"
    assert capsys.readouterr().err == f"error: dvc.yaml: not found: {where}\n"


@pytest.mark.parametrize("name", [".work", "data.log", ".work/data.lock"])
def test_what_stands_where_a_stage_writes_is_named_in_one_line(params_file, tmp_path, capsys, name):
    place = tmp_path / "out" / name
    place.parent.mkdir(parents=True)
    place.touch() if name == ".work" else place.mkdir()
    assert main(["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "out/data")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {place}: ")
    assert "move" in line


def test_metrics_that_cannot_be_written_are_refused_before_the_work(counted, tmp_path, monkeypatch, capsys):
    command, runs = counted
    path = tmp_path / "metrics.json"
    path.mkdir()
    for metrics, message in (
        (path, f"--metrics {path}: is a folder: name a file, such as {path}/metrics.json"),
        (Path("/proc/foo/metrics.json"), "/proc: no folder can be made in it: choose another place than /proc/foo"),
    ):
        asked = partial(open_run, metrics=metrics)
        monkeypatch.setattr("crt.__main__.open_run", lambda *args, asked=asked, **_: asked(*args[:4]))
        assert main(command) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert not runs


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to")]
)
def test_too_little_memory_is_one_line(params_file, tmp_path, monkeypatch, capsys, error):
    def refused(run):
        raise error

    monkeypatch.setattr("crt.stages.prepare_data.run", refused)
    assert main(["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: out of memory: free some, or raise its limit (`ulimit -v`, the job's) and run the same command again; "
        "finished work is kept"
    )


def test_an_error_of_the_program_is_logged_with_its_traceback(params_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("crt.stages.prepare_data.run", lambda run: 1 / 0)
    assert main(["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")]) == 1
    shown = capsys.readouterr().err
    assert "internal error: ZeroDivisionError" in shown
    assert "Traceback" not in shown
    assert "Traceback" in (tmp_path / "data.log").read_text()
    assert not (tmp_path / "data").exists()


@pytest.fixture
def counted(params_file, tmp_path, monkeypatch):
    """The command of a stage that makes one file, and the list of its runs."""
    runs: list[Path] = []

    def made(run):
        runs.append(run.work)
        (run.staging / "file").touch()

    monkeypatch.setattr("crt.stages.prepare_data.run", made)
    return ["prepare_data", "--params", str(params_file()), "--out", str(tmp_path / "data")], runs


@pytest.mark.parametrize(("processes", "status"), [(1, 0), (2, 2)])
def test_a_result_that_another_process_made_meanwhile_is_not_made_again(
    counted, monkeypatch, capsys, processes, status
):
    """The other process starts and ends after this one found no result, before it holds the lock."""
    command, runs = counted

    @contextmanager
    def late(run):
        monkeypatch.setattr("crt.__main__.exclusive", exclusive)
        monkeypatch.setattr("crt.__main__.environment_rank", lambda: (0, 1, 0))
        assert main(command) == 0
        with exclusive(run):
            yield

    monkeypatch.setattr("crt.__main__.exclusive", late)
    monkeypatch.setattr("crt.__main__.environment_rank", lambda: (0, processes, 0))
    assert main(command) == status
    assert len(runs) == 1
    shown = capsys.readouterr().err
    assert ("is current" if processes == 1 else "another process has just made it: run the same command") in shown


def test_the_working_folder_of_a_run_killed_after_publishing_goes_at_the_next(counted, monkeypatch):
    command, runs = counted

    def killed(run):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr("crt.stage.publish_metrics", lambda run: 1 / 0)  # the step after the last rename
            publish(run)

    monkeypatch.setattr("crt.__main__.publish", killed)
    assert main(command) == 0
    assert runs[0].exists()
    assert main(command) == 0
    assert not runs[0].exists()
    assert len(runs) == 1


@pytest.mark.parametrize(("large", "shown"), [(2**30, []), (1, ["data: checksums: 1/1 bytes (100%)"])])
def test_a_finished_result_is_not_called_current_where_a_byte_is_another(
    counted, tmp_path, monkeypatch, capsys, large, shown
):
    """Oracle: the SHA-256 of two known texts. The size stays, so that nothing cheaper tells."""

    def made(run):
        runs.append(run.work)
        (run.staging / "file").write_text("a")

    command, runs = counted
    monkeypatch.setattr("crt.stages.prepare_data.run", made)
    monkeypatch.setattr("crt.manifest._LARGE", large)
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 0
    *lines, last = capsys.readouterr().err.splitlines()
    assert "is current" in last
    assert [line.partition(",")[0] for line in lines] == [f"{tmp_path}/{line}" for line in shown]
    (tmp_path / "data" / "file").write_text("b")
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {tmp_path}/data/file: damaged: its content is not what prepare_data wrote "
        f"(SHA-256 3e23e8160039594a, not ca978112ca1bbdca): restore it, or delete {tmp_path}/data to make it again"
    )
    assert len(runs) == 1
    shutil.rmtree(tmp_path / "data")
    assert main(command) == 0
    assert len(runs) == 2


def test_the_stamp_alone_is_restored_in_a_sound_result_and_in_no_damaged_one(counted, tmp_path, monkeypatch, capsys):
    command, runs = counted
    assert main(command) == 0
    (stamp,) = (tmp_path / "data").glob("complete-*")
    stamp.unlink()
    assert main(command) == 0
    assert stamp.exists()
    (tmp_path / "data" / "file").write_text("")
    stamp.unlink()
    monkeypatch.setattr("crt.manifest.sha256_file", lambda *_: "another")
    assert main(command) == 2
    assert "data/file: damaged" in capsys.readouterr().err
    assert not stamp.exists()
    assert len(runs) == 1
    # As `snakemake -F` does.
    monkeypatch.setenv(MAKE_ANEW, "1")
    assert main(command) == 0
    assert len(runs) == 2


def values_of(params, text, other):
    params.write_text(params.read_text().replace(text, other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda params: values_of(params, "max_images_per_class: 12", "max_images_per_class: 13"),
            "{params}: prepare_data.max_images_per_class changed from 12 to 13 while prepare_data ran: {out} holds the "
            "result of the old value: run the same command again",
        ),
        (
            lambda params: values_of(params, "seed: 0", "seed: zero"),
            '{params}: seed: must be a whole number, got "zero"; so since prepare_data began: {out} holds the result '
            "of the old values: correct it and run the same command again",
        ),
        (
            lambda params: params.unlink(),
            "{params}: cannot be read (No such file or directory): give the path of a YAML file; so since prepare_data "
            "began: {out} holds the result of the old values: correct it and run the same command again",
        ),
        (lambda params: values_of(params, "max_rejected_fraction: 0.01", "max_rejected_fraction: 0.02"), None),
        (lambda params: values_of(params, "guidance_scale: 1.75", "guidance_scale: 9"), None),
        (lambda params: values_of(params, "image_size: 16 ", "image_size: 0x10 "), None),
    ],
    ids=["changed", "invalid", "gone", "neutral", "of another stage", "spelt otherwise"],
)
@pytest.mark.parametrize("current", [False, True], ids=["made", "current"])
def test_params_that_change_while_a_stage_runs_are_not_passed_off_as_its_own(
    counted, tmp_path, monkeypatch, capsys, change, message, current
):
    """The stage publishes first: its result is right for the values that it was made with."""

    def at_its_end(function):
        def wrapped(*args):
            result = function(*args)
            before = params.read_text()
            change(params)
            assert not params.exists() or params.read_text() != before
            return result

        return wrapped

    command, runs = counted
    params = tmp_path / "params.yaml"
    before = params.read_text()
    if current:
        assert main(command) == 0
    place = "crt.__main__.check_content" if current else "crt.__main__.publish"
    monkeypatch.setattr(place, at_its_end(check_content if current else publish))
    assert main(command) == (2 if message else 0)
    last = capsys.readouterr().err.splitlines()[-1]
    if message:
        assert last == f"error: {message.format(params=params, out=tmp_path / 'data')}"
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    params.write_text(before)
    assert main(command) == 0
    assert "is current" in capsys.readouterr().err
    assert len(runs) == 1


def test_a_version_that_changes_while_a_stage_runs_is_told(counted, tmp_path, monkeypatch, capsys):
    def changed(run):
        publish(run)
        monkeypatch.setattr("crt.stage.stage_version", lambda name: {}[name])

    command, _ = counted
    monkeypatch.setattr("crt.__main__.publish", changed)
    assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"crt/stage_versions.yaml: prepare_data changed from \d+ to null while prepare_data ran: ", last)


def test_without_flock_the_lock_of_a_killed_process_may_be_deleted(counted, tmp_path, monkeypatch, capsys, recwarn):
    """A file system that has no flock, and a lock file that another machine left."""

    def no_flock(*_arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    command, runs = counted
    monkeypatch.setattr("fcntl.flock", no_flock)
    lock = tmp_path / ".work" / "data.lock"
    lock.parent.mkdir()
    lock.write_text("4711\nanother-machine\n")
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path}/data: another process is writing it (lock {lock}): wait for it, or stop it; "
        "if there is none, on any machine, delete that lock file"
    ]
    lock.unlink()
    assert main(command) == 0
    assert len(runs) == 1
    assert not [warning for warning in recwarn if warning.category is UserWarning]


@pytest.mark.parametrize(
    "place",
    ["crt.commands.verify.run", "crt.commands.verify.add_arguments", "crt.commands.verify.verify_split"],
)
def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys, place):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    header = make_header(rows=1)
    cache = write_cache(tmp_path / "tokens", header, *random_codes(header))
    monkeypatch.setattr(place, interrupted)
    assert main(["verify", str(cache.folder)]) == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines() == ["stopped by SIGINT: run the same command again"]


def test_ctrl_c_while_python_still_imports_ends_quietly(tmp_path):
    """A module of argparse's name stands for an import that takes long; it comes before any other of ours."""
    (tmp_path / "argparse.py").write_text("import time\nprint('imports', flush=True)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "crt", "check"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "imports\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == -signal.SIGINT


def test_bad_params_stop_a_stage_before_it_starts(params_file, tmp_path, capsys):
    params = params_file()
    params.write_text(params.read_text().replace("seed:", "sed:"))
    assert main(["prepare_data", "--params", str(params), "--out", str(tmp_path / "data")]) == 2
    assert "unknown key: did you mean 'seed'?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [params]


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["met at the end", "met in print"])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(unbuffered):
    """As `| head` does once it has its lines."""
    reader, writer = os.pipe()
    os.close(reader)
    command, environment = [sys.executable, "-m", "crt", "results", "metrics.json", "metrics.json"], dict(os.environ)
    environment["PYTHONUNBUFFERED"] = unbuffered
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_a_home_that_cannot_be_written_is_nothing_to_say(tmp_path):
    """Matplotlib, which keeps its list of fonts there, has three lines about it, in every stage that draws."""
    script = "from crt.__main__ import main; status = main(['check']); import matplotlib.font_manager; exit(status)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL"))}
    environment |= {"HOME": "/proc/nowhere", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", [*STAGES, *COMMANDS])
def test_every_command_explains_itself(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert command in capsys.readouterr().out
