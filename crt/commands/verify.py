"""`python -m crt verify`: check every block of a token cache against its checksum."""

from __future__ import annotations

import argparse
from pathlib import Path

from crt.errors import UserError
from crt.files import sha256_file
from crt.manifest import MANIFEST, read_manifest
from crt.progress import Progress, start_logging
from crt.tokens.cache import locate_splits
from crt.tokens.layout import read_index
from crt.tokens.verify import verify_split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the place of the cache."""
    parser.add_argument(
        "path", type=Path, metavar="FOLDER_OR_FILE", help="output of the tokenize stage, or train.h5 or val.h5 in it"
    )


def run(args: argparse.Namespace) -> int:
    """Check the blocks of every split, then whole files if the folder has a manifest.

    Raises:
        UserError: one line for each damaged block or file.
    """
    start_logging(None)
    folder, splits = locate_splits(args.path)
    wrong: list[str] = []
    for split in splits:
        try:
            wrong += _damage(folder, split)
        except UserError as error:  # its index; the other split is checked all the same
            wrong += str(error).splitlines()
    if not wrong and (folder / MANIFEST).exists():
        wrong += _changed_files(folder)
    if wrong:
        raise UserError("\n".join(wrong))
    return 0


def _damage(folder: Path, split: str) -> list[str]:
    """A line for each damaged block of one split; prints one where it has none.

    Raises:
        UserError: the split's index is missing or damaged.
    """
    header = read_index(folder / f"{split}.h5")[0]
    progress, rows = Progress(f"verify {split}", header.rows, "rows"), 0
    wrong: list[str] = []
    for shard_rows, lines in verify_split(folder, split):
        wrong += lines
        rows += shard_rows
        progress.update(rows)
    if not wrong:
        blocks = sum(len(header.blocks(index)) for index in range(header.num_shards))
        print(f"{folder / header.index_name}: {header.rows} rows, {header.num_shards} shards, {blocks} blocks: good")
    return wrong


def _changed_files(folder: Path) -> list[str]:
    """A line for each file whose bytes differ from the manifest: damage between the blocks."""
    files = read_manifest(folder).files
    return [
        f"{folder / name}: differs from {MANIFEST}, outside its blocks: restore it, or delete {folder} and run tokenize"
        for name, entry in files.items()
        if sha256_file(folder / name) != entry["sha256"]
    ]
