"""`python -m crt check`: check a params file without running anything."""

from __future__ import annotations

import argparse
from pathlib import Path

from crt.params import load_params
from crt.pipeline import PARAMS_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the params file."""
    parser.add_argument("--params", type=Path, default=Path(PARAMS_FILE), help="params file (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Check the file, all of it.

    Raises:
        UserError: one line for each wrong key.
    """
    load_params(args.params)
    print(f"{args.params}: valid")
    return 0
