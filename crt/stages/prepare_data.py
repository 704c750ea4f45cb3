"""Stage prepare_data: a source of images to a packed, checked, split data set.

Reads the source that the params name. Writes `index.json`, HDF5 shards (see `crt.data.packed`), and two
lists: `rejected.jsonl`, files that could not be decoded and why, and `duplicates.jsonl`, training images
left out because validation has them too. Cost: every image is decoded twice (see `crt.data.store`), on all
CPUs that the process may use.

A first pass checks all images. Then everything about the data set is known, and a second pass writes shards (see
`crt.data.packing`). A killed run continues behind the last chunk or shard, and ends with the same bytes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from crt.data.listing import Listing, first_three, printable
from crt.data.packed import INDEX, SCHEMA, SPLITS
from crt.data.packing import PackedSplit, Shard, check_split, pack_shards, plan_shards
from crt.data.source import Source
from crt.data.sources import open_source
from crt.data.splits import has_class_to_split, shared_with, split_by_content
from crt.data.store import Checked, Form, SourceChanged
from crt.errors import UserError
from crt.files import write_json
from crt.launch import environment_rank
from crt.params import PrepareData
from crt.progress import logger
from crt.stage import StageRun

REJECTED = "rejected.jsonl"
MIN_VAL_IMAGES = 2  # of which evaluation takes a covariance
# Shares that a message proposes.
_VAL_FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def run(run: StageRun) -> None:
    """Fill `run.staging` with the packed data set. One process does it; others of the job return at once.

    Raises:
        UserError: the source is missing or not laid out as it must be, too many of its files cannot be
            decoded, or a split would have too few.
    """
    if environment_rank()[0] != 0:
        return
    params: PrepareData = run.params.prepare_data
    source = open_source(params, run.work)
    for note in source.notes:
        logger.info("prepare_data: %s", printable(note))
    if "all" in source.splits and not params.val_fraction:
        raise UserError(
            f"prepare_data.val_fraction: 0 leaves no validation image, and {_where(params)} has no validation split: "
            "set it to a share of the images, such as 0.1"
        )
    splits = {name: _first_per_class(source, name, params) for name in source.splits}
    form = Form(params.storage, params.image_size, params.resize_filter)
    checked = {name: check_split(listing, source.containers, form, run.work, name) for name, listing in splits.items()}
    rejected = _rejected(splits, checked, params.max_rejected_fraction, run.work)
    kept = {name: _accepted(splits[name], checked[name]) for name in splits}
    packed, duplicates = _split(kept, params)
    _refuse_small_splits(source, kept, packed, params)
    _note_lost_classes(source, kept, packed, run.target)
    shards = plan_shards(packed, params.images_per_shard)
    _drop_unexpected(run.staging, {shard.name for shard in shards})
    try:
        pack_shards(shards, source.containers, form, run.work, run.staging)
    except SourceChanged:
        shutil.rmtree(run.work / "checked", ignore_errors=True)
        raise
    _write_lines(run.staging / REJECTED, rejected)
    _write_lines(run.staging / "duplicates.jsonl", duplicates)
    write_json(run.staging / INDEX, _index(source, packed, shards, params))
    run.summary.update(
        classes=len(source.class_ids),
        train_images=len(packed["train"].listing),
        val_images=len(packed["val"].listing),
        rejected_files=len(rejected),
        duplicates_dropped=len(duplicates),
    )
    counts = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in run.summary.items())
    logger.info("prepare_data: %s", counts)


def _first_per_class(source: Source, split: str, params: PrepareData) -> Listing:
    """The candidates of one split; where images are yet to be split, the limit per class applies after that."""
    listing = source.splits[split]
    if params.max_images_per_class is None or split == "all":
        return listing
    return listing.select(_first_rows(listing.labels, params.max_images_per_class))


def _first_rows(labels: np.ndarray, limit: int) -> np.ndarray:
    """Rows of the first `limit` of each class; `labels` is sorted."""
    starts = np.searchsorted(labels, labels, side="left")
    return np.flatnonzero(np.arange(len(labels)) - starts < limit)


def _rejected(
    splits: dict[str, Listing], checked: dict[str, Checked], max_fraction: float, work: Path
) -> list[dict[str, Any]]:
    """One record per file that could not be decoded.

    Raises:
        UserError: they are more than `max_fraction` of all files; all of them are then listed in `work`.
    """
    rejected = [
        {"split": name, "source_id": splits[name].ids[row], "reason": reason}
        for name in splits
        for row, reason in sorted(checked[name].reasons.items())
    ]
    total = sum(len(listing) for listing in splits.values())
    if rejected:
        examples = ", ".join(f"{printable(record['source_id'])} ({record['reason']})" for record in rejected[:3])
        more = ", ..." if len(rejected) > 3 else ""
        share = f"{len(rejected)} of {total} files ({100 * len(rejected) / total:.3g}%) cannot be decoded"
        if len(rejected) > max_fraction * total:
            path = work / REJECTED
            _write_lines(path, rejected)
            raise UserError(
                f"{share}, more than prepare_data.max_rejected_fraction {max_fraction:g} allows: "
                f"{examples}{more}: fix or delete them ({path} lists all), or raise the limit"
            )
        logger.warning("prepare_data: %s and are left out: %s%s", share, examples, more)
    return rejected


def _accepted(listing: Listing, checked: Checked) -> PackedSplit:
    rows = np.flatnonzero(checked.payload_bytes > 0)
    return PackedSplit(listing, checked.digests, checked.payload_bytes, checked.checksums).select(rows)


def _split(kept: dict[str, PackedSplit], params: PrepareData) -> tuple[dict[str, PackedSplit], list[dict[str, str]]]:
    """Training and validation images, and a record per training image dropped because validation has it."""
    if "all" in kept:
        train, val = _set_aside(kept["all"], params.val_fraction, params.max_images_per_class)
    else:
        train, val = kept["train"], kept["val"]
    shared = shared_with(train.digests, val.digests)
    duplicates = []
    if shared.any():
        twins: dict[bytes, str] = {}
        for digest, name in zip(val.digests, val.listing.ids, strict=True):
            twins.setdefault(digest.tobytes(), name)
        duplicates = [
            {"source_id": train.listing.ids[row], "same_as": twins[train.digests[row].tobytes()]}
            for row in np.flatnonzero(shared)
        ]
    return {"train": train.select(np.flatnonzero(~shared)), "val": val}, duplicates


def _set_aside(everything: PackedSplit, val_fraction: float, limit: int | None) -> tuple[PackedSplit, PackedSplit]:
    """Training and validation images of a source that has no validation split, at most `limit` of a class in each."""
    in_val = split_by_content(everything.listing.labels, everything.digests, val_fraction)
    train, val = everything.select(np.flatnonzero(~in_val)), everything.select(np.flatnonzero(in_val))
    if limit is not None:
        train, val = (part.select(_first_rows(part.listing.labels, limit)) for part in (train, val))
    return train, val


def _refuse_small_splits(
    source: Source, kept: dict[str, PackedSplit], packed: dict[str, PackedSplit], params: PrepareData
) -> None:
    """Tell of splits too small for later stages now, rather than after hours of training.

    Raises:
        UserError: no training image is left, or fewer validation images than a distance of distributions needs.
    """
    where = _where(params)
    if not len(packed["train"].listing):
        raise UserError(f"{where}: no training image is left, all were rejected or serve validation: add images")
    num_val = len(packed["val"].listing)
    if num_val >= MIN_VAL_IMAGES:
        return
    left = "1 image is" if num_val else "no image is"
    few = f"{where}: {left} left for validation, evaluate needs {MIN_VAL_IMAGES}"
    limit = params.max_images_per_class
    if "val" in source.splits:
        if limit is not None and np.bincount(source.splits["val"].labels).max(initial=0) > limit:
            raise UserError(f"{few}: raise prepare_data.max_images_per_class, or add images to the validation split")
        raise UserError(f"{few}: add images to the validation split")
    for fraction in _VAL_FRACTIONS:
        if fraction > params.val_fraction and _suffices(kept["all"], fraction, limit):
            raise UserError(f"{few}: raise prepare_data.val_fraction, to {fraction:g} at least, or add images")
    if limit is not None and any(_suffices(kept["all"], fraction, None) for fraction in _VAL_FRACTIONS):
        raise UserError(f"{few}: raise prepare_data.max_images_per_class, or add images")
    raise UserError(f"{few}: add images, until a class has {MIN_VAL_IMAGES + 1} that differ")


def _suffices(everything: PackedSplit, val_fraction: float, limit: int | None) -> bool:
    """Whether so large a share leaves images enough for both splits."""
    train, val = _set_aside(everything, val_fraction, limit)
    return len(train.listing) > 0 and len(val.listing) >= MIN_VAL_IMAGES


def _where(params: PrepareData) -> str:
    return params.path or params.source


def _note_lost_classes(
    source: Source, kept: dict[str, PackedSplit], packed: dict[str, PackedSplit], target: Path
) -> None:
    """Tell of classes that no training image is left of: they stay, since other classes' numbers depend on them."""
    num_train, num_val = (
        np.bincount(packed[split].listing.labels, minlength=len(source.class_ids)) for split in SPLITS
    )
    lost = num_train == 0
    if "all" in kept and not has_class_to_split(kept["all"].listing.labels, kept["all"].digests):
        moved = np.flatnonzero(lost & (num_val > 0))
        verb = "serves" if len(moved) == 1 else "serve"
        logger.warning(
            "prepare_data: each class has one image, so %d of them %s validation, and their classes are never trained: "
            "merge classes, or give a flat folder, and delete %s: %s",
            len(moved),
            verb,
            target,
            first_three([source.class_ids[label] for label in moved]),
        )
        lost &= num_val == 0
    rows = np.flatnonzero(lost)
    if len(rows):
        logger.warning(
            "prepare_data: %s no training image left, since all were rejected or are validation images too: %s",
            "1 class has" if len(rows) == 1 else f"{len(rows)} classes have",
            first_three([source.class_ids[label] for label in rows]),
        )


def _index(source: Source, packed: dict[str, PackedSplit], shards: list[Shard], params: PrepareData) -> dict[str, Any]:
    num_classes = len(source.class_ids)
    return {
        "schema": SCHEMA,
        "source": params.source,
        "storage": params.storage,
        "image_size": params.image_size,
        "classes": [
            {"id": _text(name), "name": _text(title)}
            for name, title in zip(source.class_ids, source.class_names, strict=True)
        ],
        "splits": {
            split: {
                "images": len(packed[split].listing),
                "images_per_class": np.bincount(packed[split].listing.labels, minlength=num_classes).tolist(),
                "shards": [
                    {"file": shard.name, "images": len(shard.content.listing)}
                    for shard in shards
                    if shard.split == split
                ],
            }
            for split in SPLITS
        },
    }


def _drop_unexpected(staging: Path, expected: set[str]) -> None:
    for path in staging.iterdir():
        if path.name not in expected:
            path.unlink()


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    lines = [json.dumps({key: _text(value) for key, value in record.items()}, ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _text(value: str) -> str:
    """Text of a file name, whose bytes that are no UTF-8 become backslash escapes."""
    return value.encode("utf-8", "backslashreplace").decode()
