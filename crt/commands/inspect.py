"""`python -m crt inspect`: what made a token cache, how it uses its codebook, and a picture that shows if it is right.

The picture has a row for each of some images, evenly spread: its label, then pairs of an original view and what
the codes of that view decode to. Wrong labels, mixed-up views and another tokenizer's codes all show at a glance.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from crt.data.packed import PackedImages
from crt.data.transforms import to_uint8
from crt.errors import UserError
from crt.files import replacing
from crt.manifest import MANIFEST, read_manifest
from crt.pictures import image_grid, save_png
from crt.progress import Progress, start_logging
from crt.tokenizer.model import Tokenizer
from crt.tokens.cache import TokenCache, locate_splits
from crt.tokens.encode import Encoder
from crt.tokens.layout import UNKNOWN, content_of
from crt.tokens.statistics import count_codes
from crt.tokens.views import render_views

_GRID_ROWS = 8
_GRID_VIEWS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the cache and what the picture needs."""
    parser.add_argument(
        "path", type=Path, metavar="FOLDER_OR_FILE", help="output of the tokenize stage, or train.h5 or val.h5 in it"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="data set that was tokenized, for the picture")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="tokenizer that did it, for the picture")
    parser.add_argument("--out", type=Path, metavar="PNG", help="where the picture goes")


def run(args: argparse.Namespace) -> int:
    """Print the figures and, if asked, write the picture.

    Raises:
        UserError: no cache, the data set or tokenizer is another one than the cache's, or no picture can go there.
    """
    start_logging(None)
    picture = (args.data, args.tokenizer, args.out)
    if any(picture) and not all(picture):
        raise UserError("the picture needs all of --data, --tokenizer and --out")
    if args.out is not None:
        _check_place(args.out)
    folder, splits = locate_splits(args.path)
    caches = [TokenCache(folder, split) for split in splits]
    shown = _open_images(caches, args.data, args.tokenizer) if all(picture) else None
    if (folder / MANIFEST).exists():
        _print_origin(folder)
    for cache in caches:
        _print_split(cache)
    if shown is not None:
        _draw(caches, *shown, args.out)
    return 0


def _check_place(out: Path) -> None:
    """Raises UserError where no file can be written: better before the counting than after it."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder: name the picture's file, such as {out / 'codes.png'}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}: make it, or name another place")
    try:  # as root may write everywhere, but for /proc and the like
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(
            f"--out {out}: {out.parent} cannot be written ({error.strerror}): make it writable, or name another place"
        ) from None


def _print_origin(folder: Path) -> None:
    manifest = read_manifest(folder)
    print(f"{folder}: made by {manifest.stage} version {manifest.version}, recipe {manifest.fingerprint[:16]}")
    for section, values in manifest.params.items():
        print(f"  {section:18} {json.dumps(values)}")


def _print_split(cache: TokenCache) -> None:
    header, rows = cache.header, np.bincount(cache.labels, minlength=cache.num_classes)
    tokens = len(cache) * cache.num_views * cache.num_tokens
    progress = Progress(f"counting {cache.split}", tokens, "tokens")
    use, position_entropy = count_codes(cache, progress.update)
    lines = {
        "data set": header.data_content,
        "tokenizer": header.tokenizer_content,
        "rows": f"{len(cache)} images x {cache.num_views} views x {cache.num_tokens} tokens ({_times(cache.grid)})",
        "views": ", ".join(cache.views),
        "classes": f"{cache.num_classes}, of {rows.min()} to {rows.max()} rows: {_shortened(cache.class_names)}",
        "stored": f"{header.code_type.name} in {header.num_shards} shards, {cache.file_bytes / 1e6:.3f} MB, "
        f"{cache.file_bytes / tokens:.4f} bytes per token",
        "codes in use": f"{use.codes_used} of {cache.codebook_size} ({use.share:.1%})",
        "entropy": f"{use.entropy:.3f} bits of at most {np.log2(cache.codebook_size):.3f}",
        "by position": f"{position_entropy.min():.3f} to {position_entropy.max():.3f} bits:",
    }
    print(f"{cache.folder / header.index_name}: complete, schema and shards good")
    for name, value in lines.items():
        print(f"  {name:18} {value}")
    for line in position_entropy:
        print("    " + " ".join(f"{bits:5.2f}" for bits in line))


def _open_images(caches: list[TokenCache], data: Path, tokenizer_folder: Path) -> tuple[list[PackedImages], Tokenizer]:
    """The images of each cache, and the tokenizer.

    Raises:
        UserError: they are not those that the caches were made from.
    """
    tokenizer, found = Tokenizer.load(tokenizer_folder).eval(), []
    for cache in caches:
        _check_tokenizer(cache, tokenizer, tokenizer_folder)
        # An imported cache took both its splits from the training images.
        found.append(PackedImages(data, "train" if cache.data_content == UNKNOWN else cache.split))
        _check_data(cache, found[-1], data)
    return found, tokenizer


def _draw(caches: list[TokenCache], images_of: list[PackedImages], tokenizer: Tokenizer, out: Path) -> None:
    """Originals beside what their codes decode to, each row with its label; and the share of codes found again."""
    rows, labels = [], []
    for cache, images in zip(caches, images_of, strict=True):
        chosen = np.unique(np.linspace(0, len(cache) - 1, _GRID_ROWS).astype(np.int64))
        views = np.unique(np.linspace(0, cache.num_views - 1, _GRID_VIEWS).astype(np.int64))
        names = [cache.views[view] for view in views]
        same = []
        for row in chosen:
            codes = cache.codes(np.full(len(views), row), views)
            originals = render_views(images.image(int(cache.source_index[row])), names, tokenizer.image_size)
            with Encoder(tokenizer, "float32", len(views)) as encode:
                same.append(encode(torch.from_numpy(originals)).numpy() == codes)
            with torch.inference_mode():
                decoded = to_uint8(tokenizer.decode(torch.from_numpy(codes))).numpy()
            rows.append(np.stack([originals, decoded], axis=1).reshape(-1, *originals.shape[1:]))
            labels.append(f"{cache.split} {row}: {cache.class_names[cache.labels[row]]}")
        print(
            f"{cache.split}: in the picture {len(chosen)} rows, pairs of original and decoded codes of views "
            f"{', '.join(names)}; encoding them again in float32 gives {np.mean(same):.2%} of the codes"
        )
    with replacing(out) as temporary:
        save_png(image_grid(rows, labels), temporary)
    print(f"{out}: written")


def _check_tokenizer(cache: TokenCache, tokenizer: Tokenizer, folder: Path) -> None:
    content = content_of(folder)
    if cache.known_tokenizer not in (None, content) or tokenizer.codebook_size != cache.codebook_size:
        raise UserError(
            f"{folder}: is not the tokenizer that made the codes in {cache.folder / cache.header.index_name} "
            f"(content {content[:16]}, not {cache.tokenizer_content[:16]}): name that one"
        )


def _check_data(cache: TokenCache, images: PackedImages, folder: Path) -> None:
    path = cache.folder / cache.header.index_name
    content = content_of(folder)
    if cache.data_content not in (UNKNOWN, content):
        raise UserError(
            f"{folder}: is not the data set that the codes in {path} were made from "
            f"(content {content[:16]}, not {cache.data_content[:16]}): name that one"
        )
    if cache.source_index.max() >= len(images):
        raise UserError(f"{folder}: has {len(images)} images, {path} has codes of image {cache.source_index.max()}")
    different = np.flatnonzero(images.labels[cache.source_index] != cache.labels)
    if different.size:
        row = different[0]
        raise UserError(
            f"{path}: labels disagree with {folder} in {different.size} of {len(cache)} rows, first in row {row} "
            f"({cache.labels[row]}, not {images.labels[cache.source_index[row]]}): do both number classes alike?"
        )


def _times(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _shortened(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
