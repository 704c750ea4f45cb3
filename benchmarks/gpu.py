"""Everything that is measured on a GPU, in one run: stage 1, token extraction, stage 2 and sampling beside LlamaGen.

    python benchmarks/gpu.py --llamagen CHECKOUT --images FOLDER [--out FOLDER] [--only NAME ...]

The benchmarks of a wave warm up side by side, which compiles their networks, and then measure one after the other,
each alone on the GPU. A wave holds what fits the GPU's memory together. The output of each goes to a file of FOLDER;
the last line printed is one JSON object with the figures of all, and so is `report.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from turn import GO, READY, VARIABLE

HERE = Path(__file__).resolve().parent
# Name: script and arguments. {llamagen} and {images} are filled in.
WAVES: list[dict[str, str]] = [
    {
        **{
            f"sampling_{size}_{batch}": f"sampling.py --llamagen {{llamagen}} --gpu --sizes {size} --batches {batch}"
            for size, batches in {"B": (1, 32, 256), "XL": (1, 32), "3B": (1, 32)}.items()
            for batch in batches
        },
        "stage1": "stage1.py --llamagen {llamagen} --images {images} --batch 32 --turns 10 --precision bf16 --compile",
        "tokens": "tokens.py --llamagen {llamagen} --images {images} --only-tokenizing",
    },
    {
        "stage2_B": "stage2.py --llamagen {llamagen} --model B --batch 32 --precision bf16 --compile",
        "stage2_XL": "stage2.py --side ours --model XL --batch 32 --precision bf16 --compile",
        "stage2_XL_llamagen": "stage2.py --llamagen {llamagen} --side llamagen --model XL --batch 32 --precision bf16 "
        "--compile",
        "sampling_XL_256": "sampling.py --llamagen {llamagen} --gpu --sizes XL --batches 256",
    },
    {"stage1_preset": "stage1.py --preset --batch 128 --turns 8 --precision bf16 --compile"},
    {"sampling_3B_256": "sampling.py --llamagen {llamagen} --gpu --sizes 3B --batches 256"},
    {"stage2_3B": "stage2.py --side ours --model 3B --batch 16 --precision bf16 --compile"},
    {
        "stage2_3B_llamagen": "stage2.py --llamagen {llamagen} --side llamagen --model 3B --batch 16 --precision bf16 "
        "--compile"
    },
]
PREPARE_SECONDS, MEASURE_SECONDS = 300, 180


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llamagen", type=Path, required=True, help="clone of LlamaGen's repository")
    parser.add_argument("--images", type=Path, required=True, help="class folders of JPEG files")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="for reports and outputs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the benchmarks; all unless given")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for wave in WAVES:
        chosen = {name: line for name, line in wave.items() if args.only is None or name in args.only}
        report |= run_wave(chosen, args)
        report |= ratios(report)
        (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """Of steps that were measured in two processes, since the GPU does not hold both: theirs over ours."""
    found = {}
    for name, theirs in report.items():
        ours = report.get(name.removesuffix("_llamagen"))
        if name.endswith("_llamagen") and isinstance(ours, dict) and isinstance(theirs, dict):
            speeds = ours["bf16"]["ours"]["tokens_per_second"], theirs["bf16"]["llamagen"]["tokens_per_second"]
            found[f"{name.removesuffix('_llamagen')}_train_ratio"] = speeds[0] / speeds[1]
    return found


def run_wave(wave: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """Figures by name; what failed has a text instead."""
    running = {name: start(name, line, args) for name, line in wave.items()}
    deadline = time.monotonic() + PREPARE_SECONDS
    while time.monotonic() < deadline and not all(
        process.poll() is not None or Path(turn_file(name, args) + READY).exists() for name, process in running.items()
    ):
        time.sleep(0.05)
    say(f"warmed up, {PREPARE_SECONDS - deadline + time.monotonic():.0f} s: {', '.join(running)}")
    figures: dict[str, Any] = {}
    for name, process in running.items():
        Path(turn_file(name, args) + GO).touch()
        try:
            status = process.wait(MEASURE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        lines = log_file(name, args).read_text(encoding="utf-8", errors="replace").splitlines()
        figures[name] = json.loads(lines[-1]) if status == 0 else f"failed with status {status}: {lines[-1:]}"
        say(f"{name}: {json.dumps(figures[name])}")
    return figures


def start(name: str, line: str, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """One benchmark, its output in a file."""
    script, *arguments = line.split()
    places = {"llamagen": args.llamagen.resolve(), "images": args.images.resolve()}
    command = [sys.executable, str(HERE / script), *(argument.format(**places) for argument in arguments)]
    for suffix in (READY, GO):
        Path(turn_file(name, args) + suffix).unlink(missing_ok=True)
    # The processes share the cores while they compile.
    environment = os.environ | {VARIABLE: turn_file(name, args), "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    with open(log_file(name, args), "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def turn_file(name: str, args: argparse.Namespace) -> str:
    """Beginning of the paths by which a benchmark and this script wait for each other."""
    return str((args.out / name).resolve())


def log_file(name: str, args: argparse.Namespace) -> Path:
    """Where a benchmark's output goes."""
    return args.out / f"{name}.log"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
