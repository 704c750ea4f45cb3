"""`python -m crt check`: check a params file without running anything."""

from __future__ import annotations

import argparse
from pathlib import Path

from crt.errors import UserError
from crt.params import Params, load_params
from crt.pipeline import PARAMS_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the params file."""
    parser.add_argument(
        "--params", type=Path, default=Path(PARAMS_FILE), metavar="FILE", help="params file (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Check the file, all of it, what only the last stages would refuse, and that the weights fit to begin with.

    Raises:
        UserError: one line for each wrong key.
    """
    params = load_params(args.params)
    if params.sample.num_images < 2:  # sample draws it, long before evaluate would refuse it
        raise UserError(f"{args.params}: sample.num_images: evaluate needs two images at least, got 1: raise it")
    if params.sample.labels is not None:
        _check_labels(params, args.params)
    if params.train_tokenizer.init_from is not None or params.train_ar.init_from is not None:
        _check_initial_weights(params)
    print(f"{args.params}: valid")
    return 0


def _check_labels(params: Params, file: Path) -> None:
    """Raises UserError for a label that is no class of the images, where the source tells how many they have."""
    from crt.plan.work import source_classes

    source, most = params.prepare_data.source, max(params.sample.labels or [0])
    classes = source_classes(source)
    if classes is not None and most >= classes:
        raise UserError(f"{file}: sample.labels: {most} is not a class: {source} has classes 0 to {classes - 1}")


def _check_initial_weights(params: Params) -> None:
    # Here, since both bring torch.
    from crt.ar.initial_weights import check_initial_config as check_transformer
    from crt.plan.work import ar_config
    from crt.tokenizer.initial_weights import check_initial_config as check_tokenizer

    check_tokenizer(params.train_tokenizer)
    check_transformer(params.train_ar, ar_config(params, classes=1))
