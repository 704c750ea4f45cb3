"""`python -m crt import_llamagen FILE FOLDER`: LlamaGen's tokenizer or transformer in this project's format."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from crt.ar.import_llamagen import import_llamagen_ar, is_llamagen_ar, is_text_conditional
from crt.errors import UserError
from crt.files import make_folder
from crt.foreign import read_checkpoint
from crt.tokenizer.import_llamagen import import_llamagen_tokenizer, is_llamagen_tokenizer

# Pixels per code along each side, of the tokenizer that LlamaGen's class-conditional transformers were trained on.
_DOWNSAMPLING = 16
# Sides of the images that LlamaGen released such transformers for.
_USUAL, _LARGE = 256, 384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("file", type=Path, metavar="FILE", help="checkpoint, such as vq_ds16_c2i.pt or c2i_B_256.pt")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the result goes; must not exist yet")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the images that a transformer writes, which its weights do not tell; "
        f"default: {_LARGE} where the file's name has this number, else {_USUAL}",
    )


def run(args: argparse.Namespace) -> int:
    """Import one checkpoint; what it holds is seen from its weights.

    Raises:
        UserError: the file is missing, damaged or none of LlamaGen's, the folder exists, or the image size is no
            multiple of a code's pixels or given for a tokenizer.
    """
    size = args.image_size
    if size is not None and (size < 1 or size % _DOWNSAMPLING):
        raise UserError(
            f"--image-size {size}: each code stands for {_DOWNSAMPLING} x {_DOWNSAMPLING} pixels: "
            f"give a multiple of {_DOWNSAMPLING}, such as 256 or 384"
        )
    if args.folder.exists():
        raise UserError(f"{args.folder}: exists: delete it, or name another folder")
    state = read_checkpoint(args.file)
    temporary = args.folder.with_name(args.folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    notes: list[str] = []
    try:
        if is_llamagen_tokenizer(state):
            if size is not None:
                raise UserError("a tokenizer, which serves images of any size: leave out --image-size")
            config: Any = import_llamagen_tokenizer(state, temporary)
        elif is_llamagen_ar(state):
            size, reason = _image_size(args.file, size)
            side = size // _DOWNSAMPLING
            config = import_llamagen_ar(state, temporary, (side, side))
            notes.append(
                f"{args.file}: grid of {side} x {side} codes, for images of {size} px, {reason}: "
                "if that is wrong, import it anew with --image-size"
            )
        elif is_text_conditional(state):
            raise UserError(
                "a transformer that draws by a text: only class-conditional ones can be imported, "
                "those that LlamaGen names c2i"
            )
        else:
            raise UserError("checkpoint: neither a LlamaGen tokenizer nor a class-conditional transformer")
        os.replace(temporary, args.folder)
    except UserError as error:
        raise UserError(f"{args.file}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{args.folder}: {config}", *notes, sep="\n", file=sys.stderr)
    return 0


def _image_size(path: Path, asked: int | None) -> tuple[int, str]:
    """Side of a transformer's images: what was asked for, or as the checkpoint's name says; and why, in words."""
    if asked is not None:
        return asked, "as asked for"
    if re.search(rf"(?<!\d){_LARGE}(?!\d)", path.name):
        return _LARGE, "as the file's name says"
    return _USUAL, "LlamaGen's usual size"
