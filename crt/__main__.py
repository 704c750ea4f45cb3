"""Command line: `python -m crt COMMAND`. Stages take a params file, input folders and an output folder; no other knobs.

Exit status: 0 done (or already current), 2 bad input with one line that says so, 128 + N stopped by signal N; others
as `--help` says.
"""

from __future__ import annotations

import signal

# Ctrl-C while the rest is imported ends the process as it ends any other, without Python's traceback.
_EARLY = __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _EARLY:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import io
import logging
import os
import shutil
import sys
import time
import traceback
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path

from crt import __version__, interrupt, slurm
from crt.errors import UserError
from crt.files import make_folder
from crt.launch import environment_rank, import_large, launch_command, leave, name_user, wait_briefly
from crt.manifest import check_content
from crt.progress import duration, logger, restore_log, start_logging
from crt.stage import (
    StageRun,
    check_inputs,
    check_unchanged,
    clear_work,
    deletion_told,
    exclusive,
    open_run,
    publish,
    publish_metrics,
)
from crt.system_errors import system_message

# What each stage does and the folders it reads, by the name of their option; dvc.yaml states which folder that is.
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "prepare_data": ("a source of images to a packed, checked, split data set", ()),
    "train_tokenizer": ("train a VQGAN with the causal regularizer", ("data",)),
    "tokenize": ("the data set as codes, in HDF5", ("data", "tokenizer")),
    "train_ar": ("train a class-conditional transformer over the codes, under DeepSpeed", ("tokens",)),
    "sample": ("class-conditional images with classifier-free guidance", ("tokenizer", "ar")),
    "evaluate": (
        "reconstruction and generation metrics, with grids to look at",
        ("data", "tokenizer", "tokens", "ar", "samples"),
    ),
}
COMMANDS = {
    "check": "check a params file",
    "plan": "parameters, FLOPs, memory and hours of a params file on a cluster",
    "status": "say which stages' results are current",
    "results": "print the results of the last evaluation",
    "evaluator_check": "score real ImageNet images, beside the published figures",
    "study": "write the page of a study whose runs are complete",
    "import_llamagen": "turn a checkpoint of LlamaGen into this project's format",
    "inspect": "show what a token cache holds, in figures and a picture",
    "verify": "check every block of a token cache",
    "import_codes": "turn a LlamaGen code folder into a token cache",
}
# Stages that look at their inputs before they save, so that their checkpoints are of one input alone.
_CHECK_EACH_CHECKPOINT = ("train_tokenizer", "train_ar")
# Errors whose frames hold HDF5's objects: it crashes where those of a file that it could not write are destroyed.
_kept: list[Exception] = []


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; mistakes of the user never show a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logger.handlers.clear()
    # filelock does without flock where a file system has none; `exclusive` says what that means when it matters.
    warnings.filterwarnings("ignore", message="flock not supported")
    # Of a home where it may keep nothing, in three lines.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    wait_briefly()
    name_user()
    try:
        return _run_command(arguments)
    except KeyboardInterrupt:  # a stage at work heeds the signal itself, and ends where it can continue
        _report("stopped by SIGINT: run the same command again")
        return 128 + signal.SIGINT


def _run_command(arguments: list[str]) -> int:
    args = argparse.Namespace()
    log_file: Path | None = None
    try:
        args = _parse(arguments)
        if args.command in STAGES:
            # Not with_name, which fails where --out is `.`; the stage refuses that with a line.
            log_file = args.out.parent / f"{args.out.name}.log"
            return _run_stage(args, arguments, log_file)
        return int(args.function(args) or 0)
    except UserError as error:
        for line in str(error).splitlines():
            _report(f"error: {line}")
        return 2
    except interrupt.Stopped as stop:
        _report(str(stop))
        if environment_rank()[0] == 0:
            slurm.continue_later(stop.signum, _report)
        return stop.exit_status
    except Exception as error:
        message = system_message(error, getattr(args, "out", None))
        if message:
            _report(f"error: {message}")
            _kept.append(error)
            return 2
        if log_file is None or not _append(log_file, traceback.format_exc()):
            raise
        _report(f"internal error: {type(error).__name__}: {error} (traceback in {log_file}; please report it)")
        return 1


def _run_stage(args: argparse.Namespace, arguments: list[str], log_file: Path) -> int:
    name = args.command
    inputs = {key: getattr(args, key) for key in STAGES[name][1]}
    run = open_run(
        name, args.params, inputs, args.out, getattr(args, "metrics", None), shared=getattr(args, "shared", None)
    )
    kept_log = log_file.parent / ".work" / log_file.name
    unmarked = run.lacks_only_its_stamp()
    if unmarked or run.is_current():
        if environment_rank()[0] == 0:
            start_logging(None)
            # Here and nowhere else: DVC calls a stage because some file changed, and would record it as it lies.
            check_content(run.out)
            if unmarked:
                run.restore_stamp()
        if kept_log.exists() and not log_file.exists():
            restore_log(log_file, kept_log)
        clear_work(run)
        return _leave_as_is(run, args.params)
    command = launch_command(name, arguments)
    if command is not None:
        os.execvp(command[0], command)
    rank, processes, _ = environment_rank()
    # All that is written to, before the work and not after it.
    for folder in (run.out.parent, run.metrics and run.metrics.parent, run.shared_folder):
        if folder:
            make_folder(folder)
    if rank == 0:
        restore_log(log_file, kept_log)
    start_logging(log_file, rank)
    interrupt.listen()
    started = time.monotonic()
    with exclusive(run) if rank == 0 else nullcontext():
        if rank == 0 and run.is_current():  # another process made it since this one looked
            if processes > 1:  # the others have set out, and would wait for this one
                raise UserError(f"{run.out}: another process has just made it: run the same command again")
            return _leave_as_is(run, args.params)
        job = f", Slurm job {slurm.job_id()}" if slurm.job_id() else ""
        plural = "" if processes == 1 else "es"
        logger.info("%s: starts, recipe %s, %d process%s%s", name, run.fingerprint[:16], processes, plural, job)
        make_folder(run.staging)
        with deletion_told(run):
            try:
                import_large(f"crt.stages.{name}").run(run)
            except BaseException:
                if rank == 0:
                    run.note_seconds()
                raise
        if rank == 0:
            try:
                check_inputs(run)
            except UserError:
                if name not in _CHECK_EACH_CHECKPOINT:
                    shutil.rmtree(run.work, ignore_errors=True)  # what is kept there may be of both inputs
                raise
            with deletion_told(run):
                publish(run)
            logger.info("%s: done in %s: %s", name, duration(time.monotonic() - started), run.out)
            check_unchanged(run, args.params)
    return 0


def _leave_as_is(run: StageRun, params_file: Path) -> int:
    """Exit status for a result that is current."""
    publish_metrics(run)
    check_unchanged(run, params_file)
    _print(f"{run.name}: {run.out} is current; to make it anew, delete it and run again")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; what a command does not know is told with that command's own usage."""
    parser, commands = _parser(arguments)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _parser(arguments: list[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each command."""
    parser = argparse.ArgumentParser(
        prog="python -m crt",
        description="Causally Regularized Tokenization, stage by stage.",
        epilog="Exit status: 0 done, or already current; 1 not all is current (status), other figures than published "
        "(evaluator_check), or an error of the program; 2 bad input, told in one line; 128 + N stopped by signal N.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (description, inputs) in STAGES.items():
        command = commands.add_parser(name, help=description, description=f"Stage: {description}.")
        command.add_argument("--params", type=Path, required=True, metavar="FILE", help="params file")
        for key in inputs:
            command.add_argument(
                f"--{key}", type=Path, required=True, metavar="FOLDER", help="output of an earlier stage"
            )
        command.add_argument(
            "--out", type=Path, required=True, metavar="FOLDER", help="output folder, replaced as a whole"
        )
        if name == "evaluate":
            command.add_argument("--metrics", type=Path, metavar="FILE", help="also write the metrics here")
            command.add_argument(
                "--shared", type=Path, metavar="FOLDER", help="keeps what evaluations of the same data have in common"
            )
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=f"{description[0].upper()}{description[1:]}.")
        if name in arguments[:1]:  # import only what runs: most commands need torch
            module = import_large(f"crt.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(function=module.run)
    return parser, dict(commands.choices)


def _append(path: Path, text: str) -> bool:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return False
    return True


def _report(message: str) -> None:
    if logger.handlers:
        logger.error(message)
    else:
        _print(message)


def _print(message: str) -> None:
    """To stderr; the exit status tells enough where that is a file on a full disk."""
    with suppress(OSError):
        print(message, file=sys.stderr)


def _open_closed_streams() -> None:
    """Give what is printed and read a place to go where the caller closed it, as `>&-` and some schedulers do.

    Python has no stream there, and the next file that is opened would take its number: what libraries print would go
    into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, so this one
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


if __name__ == "__main__":
    _open_closed_streams()
    # As stderr does: a locale that lacks a sign of what is printed is no reason to fail.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            if _EARLY:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # `main` catches what it raises
            status = main()
        except SystemExit as ended:  # argparse's, or a process that leaves the message to the first one
            status = int(ended.code or 0)
        sys.stdout.flush()  # here, where a closed pipe can be met, and not while the interpreter ends
    except OSError as error:
        # Whoever read has seen enough (`| head`), or what is printed goes to a file on a full disk.
        message = None if isinstance(error, BrokenPipeError) else system_message(error, None)
        if not message and not isinstance(error, BrokenPipeError):
            raise
        # What is left goes nowhere, so that ending writes no error either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if message:
            _report(f"error: {message}")
        status = 2 if message else 128 + signal.SIGPIPE
    leave(status)
