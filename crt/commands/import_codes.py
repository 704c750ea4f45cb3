"""`python -m crt import_codes`: a LlamaGen code folder becomes a token cache, as the tokenize stage would make one."""

from __future__ import annotations

import argparse
import hashlib
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from crt.data.packed import PackedImages
from crt.errors import UserError
from crt.files import make_folder
from crt.params import MAX_CODEBOOK
from crt.pipeline import recipe_fingerprint, stage_version
from crt.progress import Progress, start_logging
from crt.stage import StageRun, check_out, exclusive, publish
from crt.tokens.cache import TokenCache
from crt.tokens.layout import BLOCK_ROWS, UNKNOWN, CacheHeader, content_of, write_index, write_shard
from crt.tokens.llamagen import CodeFolder
from crt.tokens.views import view_names

# Of ten crops, the one that validation uses: the centre.
_CENTRE_CROP = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folders, and what they do not say of themselves."""
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="LlamaGen's --code-path, one or more")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="token cache to write")
    parser.add_argument(
        "--views",
        nargs="+",
        required=True,
        metavar="VIEW",
        help="what the augmentations are, over all folders: `ten_crop@1.1 ten_crop@1.05`, or `center flip`",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        required=True,
        metavar="F",
        help="share of the images, evenly spread, that becomes the validation split",
    )
    codebook = parser.add_mutually_exclusive_group(required=True)
    codebook.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="tokenizer that made the codes")
    codebook.add_argument("--codebook-size", type=int, metavar="K", help="if that is not at hand: its codebook's size")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="prepared data set, for class names and to check labels"
    )
    parser.add_argument(
        "--num-images", type=int, metavar="N", help="images, if files behind them repeat the first ones"
    )


def run(args: argparse.Namespace) -> int:
    """Read, check and convert; the result has a manifest, so train_ar takes it as its `--tokens`.

    Raises:
        UserError: the folders are not as described, or disagree with each other, the data set or the tokenizer;
            or the output folder must not be replaced.
    """
    start_logging(None)
    read = {f"folder {number}": folder for number, folder in enumerate(args.folders, 1)}
    read |= {f"--{key}": getattr(args, key) for key in ("tokenizer", "data") if getattr(args, key)}
    check_out(args.out, read)
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val-fraction {args.val_fraction}: give a number between 0 and 1, such as 0.01")
    folders = [CodeFolder(folder, args.num_images) for folder in args.folders]
    names = _check_views(folders, args)
    codebook_size, grid, tokenizer_content = _codebook(args, folders[0].num_tokens)
    labels = _labels(folders)
    class_names = _class_names(args, labels)

    marks = np.floor(np.arange(len(labels) + 1) * args.val_fraction + 1e-9)
    validation = np.diff(marks) > 0
    if validation.all() or not validation.any():
        raise UserError(f"--val-fraction {args.val_fraction}: leaves one split of {len(labels)} images empty")
    centre = "center" if "center" in names else next(name for name in names if name.endswith(f"/{_CENTRE_CROP}"))
    splits = {"train": (np.flatnonzero(~validation), names), "val": (np.flatnonzero(validation), (centre,))}

    run = _stage_run(args, folders, labels, tokenizer_content)
    with exclusive(run):
        shutil.rmtree(run.work, ignore_errors=True)
        make_folder(run.staging)
        for split, (rows, views) in splits.items():
            header = CacheHeader(
                split=split,
                rows=len(rows),
                views=views,
                grid=grid,
                codebook_size=codebook_size,
                num_classes=len(class_names),
                tokenizer_content=tokenizer_content,
                data_content=UNKNOWN,
                block_rows=BLOCK_ROWS,
            )
            columns = [names.index(view) for view in views]
            _convert(run, header, folders, rows=rows, columns=columns, labels=labels)
            write_index(run.staging, run.work / "index.tmp", header, class_names)
        caches = [TokenCache(run.staging, split) for split in splits]
        run.summary.update({f"{cache.split}_rows": len(cache) for cache in caches})
        run.summary.update(views=list(names), tokens_per_image=caches[0].num_tokens)
        publish(run)
    print(f"{args.out}: {len(labels)} images; look at it with `python -m crt inspect {args.out}`")
    return 0


def _check_views(folders: Sequence[CodeFolder], args: argparse.Namespace) -> tuple[str, ...]:
    """Names of the views over all folders, in their order."""
    names = view_names(args.views)
    present = [folder.num_views for folder in folders]
    if len(names) != sum(present):
        raise UserError(
            f"--views {' '.join(args.views)}: {len(names)} views, but the files hold {sum(present)} per image"
        )
    if len({(folder.num_images, folder.num_tokens) for folder in folders}) > 1:
        sizes = ", ".join(f"{folder.num_images} images of {folder.num_tokens} tokens" for folder in folders)
        raise UserError(f"the folders hold {sizes}: import only such as belong together, or state --num-images")
    if not any(name == "center" or name.endswith(f"/{_CENTRE_CROP}") for name in names):
        raise UserError(f"--views {' '.join(args.views)}: none is central, which validation needs: add another folder")
    return names


def _codebook(args: argparse.Namespace, num_tokens: int) -> tuple[int, tuple[int, int], str]:
    """(codebook size, grid, content digest of the tokenizer)."""
    if args.tokenizer is not None:
        from crt.tokenizer.model import Tokenizer

        tokenizer = Tokenizer.load(args.tokenizer)
        if tokenizer.num_tokens != num_tokens:
            raise UserError(f"{args.tokenizer}: makes {tokenizer.num_tokens} tokens, the files hold {num_tokens}")
        return tokenizer.codebook_size, tokenizer.grid, content_of(args.tokenizer)
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise UserError(f"{args.folders[0]}: {num_tokens} tokens form no square: state --tokenizer")
    if not 2 <= args.codebook_size <= MAX_CODEBOOK:
        raise UserError(
            f"--codebook-size {args.codebook_size}: give the number of codes, 2 to {MAX_CODEBOOK}, such as 16384"
        )
    return args.codebook_size, (side, side), UNKNOWN


def _labels(folders: Sequence[CodeFolder]) -> np.ndarray:
    """(N,) int64 labels, on which all folders must agree."""
    progress = Progress("labels", folders[0].num_images * len(folders), "files")
    all_labels = [folder.labels(lambda: progress.update(progress.done + 1)) for folder in folders]
    for folder, labels in zip(folders, all_labels, strict=True):
        different = np.flatnonzero(labels != all_labels[0])
        if different.size:
            raise UserError(
                f"{folder.labels_folder / f'{different[0]}.npy'}: differs from the label in "
                f"{folders[0].labels_folder}: the folders do not belong together"
            )
    return all_labels[0]


def _class_names(args: argparse.Namespace, labels: np.ndarray) -> list[str]:
    if args.data is None:
        return [str(label) for label in range(int(labels.max()) + 1)]
    images = PackedImages(args.data, "train")
    if len(images) == len(labels) and not np.array_equal(images.labels, labels):
        row = int(np.flatnonzero(images.labels != labels)[0])
        raise UserError(
            f"{args.data}: gives image {row} the label {images.labels[row]}, the code folder {labels[row]}: "
            "do both number classes and images alike?"
        )
    if labels.max() >= images.num_classes:
        raise UserError(f"{args.data}: has {images.num_classes} classes, the code folder's labels reach {labels.max()}")
    return images.class_names


def _convert(
    run: StageRun,
    header: CacheHeader,
    folders: Sequence[CodeFolder],
    *,
    rows: np.ndarray,
    columns: Sequence[int],
    labels: np.ndarray,
) -> None:
    """Write the shards of one split: images `rows`, views `columns`."""
    progress = Progress(f"import {header.split}", header.rows, "images")
    for index in range(header.num_shards):
        images = rows[header.shard_range(index).start : header.shard_range(index).stop]
        codes = np.empty((len(images), len(columns), header.num_tokens), header.code_type)
        for place, image in enumerate(images):
            views = np.concatenate([folder.codes(int(image), header.codebook_size) for folder in folders])
            codes[place] = views[columns]
            progress.update(progress.done + 1)
        write_shard(
            run.staging,
            run.work / "shard.tmp",
            header,
            index,
            codes=codes,
            labels=labels[images],
            source_index=images,
        )


def _stage_run(
    args: argparse.Namespace, folders: Sequence[CodeFolder], labels: np.ndarray, tokenizer_content: str
) -> StageRun:
    """A run of `tokenize` without params and inputs, whose fingerprint is that of what is imported."""
    digest = hashlib.sha256(labels.tobytes())
    for text in (*args.views, str(args.val_fraction), str(args.codebook_size), tokenizer_content):
        digest.update(text.encode() + b"\0")
    for folder in folders:
        digest.update(folder.sample_digest())
    version = stage_version("tokenize")
    return StageRun(
        name="tokenize",
        params=SimpleNamespace(),
        inputs={},
        manifests={},
        out=args.out,
        version=version,
        fingerprint=recipe_fingerprint("tokenize", version, {}, {"import_codes": digest.hexdigest()}),
        values={},
    )
