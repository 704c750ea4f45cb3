"""`python -m crt status`: say of each stage whether its result is there and agrees with the params in force."""

from __future__ import annotations

import argparse
from pathlib import Path

from crt.commands.check import add_arguments  # noqa: F401
from crt.errors import UserError
from crt.manifest import check_ancestors, read_current
from crt.params import load_params
from crt.pipeline import load_stages


def run(args: argparse.Namespace) -> int:
    """Print a line for each stage; returns 0 if all are current, else 1."""
    values = load_params(args.params).model_dump(by_alias=True)
    all_current, present = True, {}
    for stage in load_stages().values():
        if not Path(stage.output).exists():
            state, text = "not made", stage.output
        else:
            try:
                manifest = read_current(stage.output, values, args.params, stage.name)
                present[stage.name] = Path(stage.output), manifest.content
                check_ancestors(Path(stage.output), manifest, present)
                state, text = "current", f"{stage.output} (recipe {manifest.fingerprint[:16]})"
            except UserError as error:
                # The column says it already.
                state, text = "stale", str(error).replace(": stale: ", ": ", 1)
        all_current &= state == "current"
        print(f"{stage.name:16} {state:9} {text}")
    return 0 if all_current else 1
