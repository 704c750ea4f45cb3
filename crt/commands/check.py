"""`python -m crt check`: check a params file without running anything."""

from __future__ import annotations

import argparse
from pathlib import Path

from crt.params import load_params
from crt.pipeline import PARAMS_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", type=Path, default=Path(PARAMS_FILE), help="params file (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    load_params(args.params)
    print(f"{args.params}: valid")
    return 0
